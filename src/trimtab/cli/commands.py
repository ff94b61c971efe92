"""The table of commands: what `trimtab --help` lists without importing any of them.

A command is a module with a docstring (its first line is the promise), EXAMPLE (a line that runs), `add_arguments` and
`run`, which prints its result on stdout through `output.emit` and raises TrimtabError for stated reasons. With
PASSES_ON = True words that it does not know are kept as `args.passed_on`.
"""

import argparse
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

from trimtab.core.errors import unknown_name


@runtime_checkable
class Command(Protocol):
    """What a command's module holds."""

    __doc__: str | None
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> None: ...


@dataclass(frozen=True)
class Line:
    """A command's module, its summary in the list of commands, and the group that it is listed in."""

    module: str
    summary: str
    group: str


SPACES, LOGITS, STUDIES = "all spaces", "logits: fused models", "studies and embedded models"
GROUPS = (SPACES, LOGITS, STUDIES)

COMMANDS: dict[str, Line] = {
    "list": Line("trimtab.cli.list", "List the methods of every space, by family.", SPACES),
    "show": Line("trimtab.cli.show", "Describe one method: settings, units, ranges, source, example.", SPACES),
    "fuse": Line("trimtab.cli.fuse", "Write a fused model: strong + base + experts + strategy.", LOGITS),
    "generate": Line("trimtab.cli.generate", "Continue prompts with a fused model.", LOGITS),
    "chat": Line("trimtab.cli.chat", "Talk with a fused model; answers stream.", LOGITS),
    "batch": Line("trimtab.cli.batch", "Answer a file of OpenAI requests; goes on after a crash.", LOGITS),
    "eval": Line("trimtab.cli.eval", "Score a fused model through lm-evaluation-harness.", LOGITS),
    "explain": Line("trimtab.cli.explain", "Write a page that shows which expert spoke at each token.", LOGITS),
    "serve": Line("trimtab.cli.serve", "Serve a fused model with vLLM: the OpenAI API, steered per request.", LOGITS),
    "demo": Line("trimtab.cli.demo", "The whole story on the embedded zoo: tables, a report page.", STUDIES),
    "zoo": Line("trimtab.cli.zoo", "The embedded models and tasks: list, check, build again.", STUDIES),
    "study": Line("trimtab.cli.study", "Run a study on the zoo: its tables, intervals, pictures and page.", STUDIES),
    "results": Line("trimtab.cli.results", "Measure everything and write docs/results.md.", STUDIES),
}


def load_command(name: str) -> Command:
    """The module of a command; raises UnknownName with the nearest spelling."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    return cast(Command, import_module(COMMANDS[name].module))
