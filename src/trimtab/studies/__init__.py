"""Studies: what was measured, as data. One folder per experiment; the machinery lies in `measure`.

A study is a module with a docstring (its first line is the promise), EXAMPLE (a line that runs), `add_arguments` and
`run(args, tools) -> Outcome`; it imports nothing heavy before it runs. `trimtab study NAME` finds it in STUDIES, or in
another package that names it as an entry point:

    [project.entry-points."trimtab.studies"]
    mine = "my_package.my_study"
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from trimtab.core.errors import unknown_name

GROUP = "trimtab.studies"
STUDIES: dict[str, str] = {
    "dlf": "trimtab.studies.dlf.study",
    "regime": "trimtab.studies.regime.study",
    "task_arithmetic": "trimtab.studies.task_arithmetic.study",
}


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    document   ready for JSON, as `--json` prints it
    shown      for a terminal: tables (`measure.tables.Grid`) and lines of text, in order
    failure    why the study counts as failed; empty where it does not
    """

    document: dict[str, Any]
    shown: Sequence[Any]
    failure: str = ""


@dataclass(frozen=True)
class Tools:
    """What a study is given by the program that runs it.

    advance    shows progress: what is being done, how much is done, how much there is
    claim      a file or a folder -> the same, where it may be written; raises InputError where something is there
    """

    advance: Callable[[str, int, int], None]
    claim: Callable[[Path], Path]

    def on_cell(self, cell: Any, done: int, total: int) -> None:
        """Shows the progress of `run_conditions`."""
        self.advance(f"{cell.task}: {cell.condition.name}", done, total)


@runtime_checkable
class Study(Protocol):
    """What a study's module holds."""

    __doc__: str | None
    EXAMPLE: str

    def add_arguments(self, parser: Any) -> None: ...
    def run(self, args: Any, tools: Tools) -> Outcome: ...


def known_studies() -> dict[str, str]:
    """Name -> module, those of other packages last."""
    return STUDIES | {point.name: point.value for point in entry_points(group=GROUP)}


def find_study(name: str) -> Study:
    """The module of a study; raises UnknownName with the nearest spelling."""
    known = known_studies()
    if name not in known:
        raise unknown_name("study", name, known)
    return cast(Study, import_module(known[name]))
