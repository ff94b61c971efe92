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
    """A command's module and its summary in the list of commands."""

    module: str
    summary: str


COMMANDS: dict[str, Line] = {
    "demo": Line("trimtab.cli.demo", "The whole story on the embedded zoo: tables, intervals, a report page."),
    "fuse": Line("trimtab.cli.fuse", "Write a fused model: strong + base + experts + strategy, as one directory."),
    "generate": Line("trimtab.cli.generate", "Continue prompts with a fused model."),
    "chat": Line("trimtab.cli.chat", "Talk with a fused model; answers stream."),
    "batch": Line("trimtab.cli.batch", "Answer a file of OpenAI requests with a fused model, through crashes."),
    "eval": Line("trimtab.cli.eval", "Score a fused model through lm-evaluation-harness."),
    "explain": Line(
        "trimtab.cli.explain", "Write a page that shows, token by token, which expert spoke and how loudly."
    ),
    "serve": Line("trimtab.cli.serve", "Serve a fused model with vLLM: the OpenAI API, steered per request."),
    "list": Line("trimtab.cli.list", "List the strategies: amounts and choosers."),
    "show": Line("trimtab.cli.show", "Describe one strategy: settings, units, ranges, source, example."),
    "zoo": Line("trimtab.cli.zoo", "The embedded models and tasks: what is there, and how to build it again."),
    "study": Line("trimtab.cli.study", "Run a study on the zoo: its tables, intervals, pictures and page."),
    "results": Line("trimtab.cli.results", "Measure everything and write docs/results.md."),
}


def load_command(name: str) -> Command:
    """The module of a command; raises UnknownName with the nearest spelling."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    return cast(Command, import_module(COMMANDS[name].module))
