"""What can be chosen by name, and where it lives. Imports nothing heavy, so `trimtab list` answers at once.

Each space has a module `registry.py`. Its docstring's first line says what the space is, and it lists

    FAMILIES = (Family(...), ...)                    what can be chosen by name in this space
    METHODS = {"amount": {"halved": Entry(...)}}     methods that it adds to families of other spaces; may be left out
    PAGE = "strategies.md"                           its generated page in docs/; SPACE.md by default
    RENDER = "trimtab.logits.docs:render"            what writes that page, where the plain one does not suffice

Spaces of this package are found by their folder. Other packages name theirs as entry points:

    [project.entry-points."trimtab.families"]
    mine = "my_package.registry"
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.core.errors import TrimtabError, unknown_name

GROUP = "trimtab.families"


@dataclass(frozen=True)
class Entry:
    """One method: where it lives, and what it does in one sentence.

    where     "module:object"; the module's docstring says who described it first, in a paragraph "Source: ..."
    example   a command that runs, where the family's own example does not fit
    """

    where: str
    summary: str
    example: str = ""


@dataclass(frozen=True, eq=False)
class Family(Mapping[str, Entry]):
    """Methods of one kind: names -> entries, in the order in which they are listed, additions of other packages last.

    name      of one: "amount"
    base      "module:class" that every method derives from
    summary   what methods of this family decide, in one sentence
    entries   its own methods
    option    of the command line that chooses one; "" where there is none
    example   a command that runs, with {name} for the method
    aliases   former name -> name
    """

    name: str
    base: str
    summary: str
    entries: Mapping[str, Entry]
    option: str = ""
    example: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name] if name in self.entries else _additions(self.name)[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        yield from _additions(self.name)  # asked for only where the own names did not suffice

    def __len__(self) -> int:
        return len(self.entries) + len(_additions(self.name))

    def example_of(self, name: str) -> str:
        """A command that runs with this method; "" where the family has none."""
        return self[name].example or self.example.format(name=name)


def canonical(family: Family, name: str) -> str:
    """The name of today for a name or a former name; raises UnknownName with the nearest spelling."""
    name = family.aliases.get(name, name)
    if name not in family:
        raise unknown_name(family.name, name, family)
    return name


def find(family: Family, name: str) -> Any:
    """The class that `name` stands for in `family`, imported on first use.

    raises    UnknownName with the nearest spelling when the family has no such name; TrimtabError when what stands
              there is not of the family
    """
    where = family[canonical(family, name)].where
    found, base = load(where), load(family.base)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise TrimtabError(
            f"{family.name} '{name}' is {where}, which is no {base.__name__}.",
            f"Every {family.name} derives from {family.base}.",
            f"derive it, or name another class in the registry: class ...({base.__name__}).",
        )
    return found


def load(where: str) -> Any:
    """The object at "module:object"."""
    module, attribute = where.split(":")
    return getattr(import_module(module), attribute)


def name_in(family: Family, method: object) -> str:
    """The name that the class of a method has in its family; raises UnknownName where it has none."""
    kind = type(method)
    for name, entry in family.items():
        if entry.where == f"{kind.__module__}:{kind.__qualname__}":
            return name
    raise unknown_name(family.name, kind.__qualname__, family)


def words_of(entry: Entry) -> str:
    """The docstring of a method's module, read without importing the module."""
    spec = find_spec(entry.where.split(":")[0])
    if spec is None or spec.origin is None:
        raise TrimtabError(f"there is no module {entry.where}.", "A registry names it.", "correct the line there.")
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def source_of(entry: Entry) -> str:
    """Who described a method first: the paragraph "Source: ..." of its module, in one line; "" where there is none."""
    paragraphs = words_of(entry).split("\n\n")
    found = [" ".join(text.split()) for text in paragraphs if text.lstrip().startswith("Source: ")]
    return found[0].removeprefix("Source: ") if found else ""


# --- all spaces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """One place where a tuned difference can be added, with what can be chosen there.

    name       of its package, "logits"
    summary    what it is, in one sentence
    page       its generated page in docs/
    render     "module:function" that writes the page; "" for the plain one of `trimtab.core.pages`
    """

    name: str
    summary: str
    families: tuple[Family, ...]
    page: str
    render: str = ""


@cache
def spaces() -> tuple[Space, ...]:
    """All spaces: those of this package by name, then those of other packages.

    raises    TrimtabError for two families of one name, for methods that are added to a family that does not exist,
              and for a registry of another package that cannot be imported
    """
    found = tuple(_space(module) for module in registries() if getattr(module, "FAMILIES", ()))
    names = [family.name for space in found for family in space.families]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise TrimtabError(f"two spaces have a family '{min(twice)}'.", fix="rename one, or uninstall its package.")
    for module in registries():
        for name in getattr(module, "METHODS", {}):
            if name not in names:
                error = unknown_name("family", name, names)
                raise TrimtabError(f"{module.__name__} adds methods to no known family.", str(error), error.fix)
    return found


def families() -> tuple[Family, ...]:
    """The families of all spaces."""
    return tuple(family for space in spaces() for family in space.families)


def methods() -> Iterator[tuple[Family, str]]:
    """Every method of every family."""
    for family in families():
        for name in family:
            yield family, name


@cache
def registries() -> tuple[ModuleType, ...]:
    """The registry modules of this package's spaces, and of other packages."""
    root = Path(__file__).parents[1]
    own = [file.parent.name for file in sorted(root.glob("*/registry.py")) if file.parent != Path(__file__).parent]
    return tuple(chain((import_module(f"trimtab.{name}.registry") for name in own), _foreign()))


def _foreign() -> Iterator[ModuleType]:
    from importlib.metadata import entry_points  # a quarter of what `trimtab list` costs: only where it is needed

    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            yield import_module(point.value)
        except Exception as error:
            package = point.dist.name if point.dist else point.name
            raise TrimtabError(
                f"the registry {point.value} of the package {package} cannot be imported: {error}.",
                f"The package names it as an entry point of the group {GROUP}.",
                f"mend it, or pip uninstall {package}.",
            ) from error


def _space(module: ModuleType) -> Space:
    package = module.__name__.rpartition(".")[0]
    name = package.removeprefix("trimtab.") or module.__name__
    summary = (module.__doc__ or "").strip().split("\n")[0]
    page, render = getattr(module, "PAGE", f"{name}.md"), getattr(module, "RENDER", "")
    return Space(name, summary, tuple(module.FAMILIES), page, render)


@cache
def _additions(family: str) -> dict[str, Entry]:
    """The methods that registries add to a family of another space; raises TrimtabError for a name that is taken."""
    found: dict[str, Entry] = {}
    for module in registries():
        for name, entry in getattr(module, "METHODS", {}).get(family, {}).items():
            own = next((f.entries for f in _listed() if f.name == family), {})
            if name in found or name in own:
                raise TrimtabError(
                    f"{module.__name__} adds a method '{name}' to the family '{family}', which has one.",
                    fix="rename it, or uninstall the package.",
                )
            found[name] = entry
    return found


def _listed() -> Iterator[Family]:
    for module in registries():
        yield from getattr(module, "FAMILIES", ())
