"""Which module of a package imports which, read from the source; and what of it the rules of the house forbid."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

SPACES = ("guidance", "logits", "supervision", "weights")  # none imports another; nor does any folder with a registry
OF_SPACES = {"core", "models"}
# What each part may import besides itself. The package root holds the version and lazy names; errors live in core.
ALLOWED: Mapping[str, set[str]] = {
    "core": set(),
    "measure": {"core"},
    "zoo": {"core"},
    "models": {"core", "zoo"},
    **dict.fromkeys(SPACES, OF_SPACES),
    "serving": {"core", "models", "logits"},
    "batch": {"core", "models", "logits", "serving"},
    "studies": {"core", "zoo", "models", "measure", *SPACES},
    "cli": {"core", "measure", "studies", "zoo", "models", "batch", "serving", *SPACES},
    "__main__": {"cli"},
}


@dataclass(frozen=True)
class Source:
    """A package's source.

    root     its folder, whose name is the package's
    homes    lazy public names of the root -> the module that defines them
    """

    root: Path
    homes: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.root.name

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Every module by its dotted name."""
        found = {}
        for file in sorted(self.root.rglob("*.py")):
            parts = file.relative_to(self.root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        return found

    def part_of(self, module: str) -> str:
        """The folder, or the file, right below the root; "" of the root itself."""
        return module.split(".")[1] if "." in module else ""

    def imports_of(self, module: str, typing_too: bool = True) -> set[str]:
        """Modules of the package that a module imports, anywhere in it; names of the root count as their home.

        typing_too    whether what is imported for annotations only counts
        """
        found = set()
        for node in _nodes(ast.parse(self.modules[module].read_text(encoding="utf-8")), typing_too):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively, line {node.lineno}"
                found |= {self._home(node.module or "", alias.name) for alias in node.names}
        return {name for name in found if name == self.name or name.startswith(f"{self.name}.")}

    def _home(self, module: str, name: str) -> str:
        if module == self.name and name in self.homes:
            return self.homes[name]
        return f"{module}.{name}" if f"{module}.{name}" in self.modules else module

    @cached_property
    def spaces(self) -> set[str]:
        """The four that have a name, and every folder with a registry of its own."""
        return {*SPACES, *(file.parent.name for file in self.root.glob("*/registry.py"))} - {"core"}

    def allowed(self, part: str) -> set[str]:
        """The parts that a part may import."""
        if part in self.spaces:
            return {part, "", *OF_SPACES}
        more = self.spaces if set(SPACES) <= ALLOWED.get(part, set()) else set()
        return {part, "", *ALLOWED.get(part, ()), *more}

    def parts(self) -> dict[str, set[str]]:
        """Part -> the other parts that it imports."""
        found: dict[str, set[str]] = {}
        for module in self.modules:
            part = self.part_of(module)
            found.setdefault(part, set()).update({self.part_of(name) for name in self.imports_of(module)} - {part, ""})
        return found

    def forbidden(self) -> list[str]:
        """Imports that `ALLOWED` does not allow: "MODULE imports MODULE"."""
        found = []
        for module in self.modules:
            part = self.part_of(module)
            allowed = self.allowed(part)
            names = self.imports_of(module) if part else ()
            found += [f"{module} imports {name}" for name in sorted(names) if self.part_of(name) not in allowed]
        return found

    def check_no_cycle(self) -> None:
        """Raise CycleError where modules import one another round about; lazy names and annotations are no imports."""
        graph = {name: self.imports_of(name, typing_too=False) - {self.name, name} for name in self.modules}
        del graph[self.name]
        TopologicalSorter(graph).prepare()


def _nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_for_typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not is_for_typing or typing_too:
            yield node
            yield from _nodes(node, typing_too)
