"""What can be chosen by name, and where it lives. Imports nothing heavy, so `trimtab list` answers at once."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trimtab.core.errors import unknown_name


@dataclass(frozen=True)
class Entry:
    """One line of a table: where the object lives, what it does in one sentence, and who described it first."""

    where: str  # "module:object"
    summary: str
    source: str


class Table(dict[str, Entry]):
    """Names of one kind -> entries, in the order in which they are listed."""

    def __init__(self, kind: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.kind = kind


def find(table: Table, name: str) -> Any:
    """The object that `name` stands for in `table`, imported on first use.

    raises    UnknownName with the nearest spelling when the table has no such name
    """
    if name not in table:
        raise unknown_name(table.kind, name, table)
    module, attribute = table[name].where.split(":")
    return getattr(import_module(module), attribute)
