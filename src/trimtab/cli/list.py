"""List the strategies: an amount (what to do with one expert's delta) with a chooser (which experts speak)."""

import argparse

from trimtab.cli import output
from trimtab.core.registry import Table
from trimtab.logits.registry import AMOUNTS, CHOOSERS

EXAMPLE = "trimtab list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> None:
    """Both registries, in their order."""
    result = {"amounts": describe(AMOUNTS), "choosers": describe(CHOOSERS)}
    output.emit(args.json, output.document(result), show)


def describe(table: Table) -> dict[str, dict[str, str]]:
    """Names with their summary and source."""
    return {name: {"summary": entry.summary, "source": entry.source} for name, entry in table.items()}


def show() -> None:
    """Two plain blocks; nothing heavier than print, so that the answer is there at once."""
    width = max(len(name) for name in (*AMOUNTS, *CHOOSERS))
    for title, table in (("amounts  (--strategy)", AMOUNTS), ("choosers  (--chooser)", CHOOSERS)):
        print(title)
        for name, entry in table.items():
            print(f"  {name:<{width}}  {entry.summary}\n  {'':<{width}}    {entry.source}")
        print()
    print("`trimtab show NAME` has the settings of each.")
