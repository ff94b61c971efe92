"""The embedded world, tasks and models: what makes the library work with no download."""

from trimtab.zoo.store import check_files, names, read_manifest, resolve, root
from trimtab.zoo.style import in_own_style
from trimtab.zoo.tasks import TASKS, TUNED_TASKS, Item, Split, Task, few_shot, items_path, load_items

__all__ = [
    "TASKS",
    "TUNED_TASKS",
    "Item",
    "Split",
    "Task",
    "check_files",
    "few_shot",
    "in_own_style",
    "items_path",
    "load_items",
    "names",
    "read_manifest",
    "resolve",
    "root",
]
