"""Describe one strategy: an amount or a chooser with its settings, units, ranges, source and an example."""

import argparse
from typing import Any

from trimtab.cli import output
from trimtab.cli.options import flag_of
from trimtab.core.errors import unknown_name
from trimtab.logits.registry import AMOUNTS, CHOOSERS

EXAMPLE = "trimtab show dynamic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="STRATEGY", help="an amount or a chooser, see `trimtab list`")


def run(args: argparse.Namespace) -> None:
    """Everything that the registry and the settings dataclass say about one name."""
    if args.name not in AMOUNTS and args.name not in CHOOSERS:
        raise unknown_name("strategy", args.name, (*AMOUNTS, *CHOOSERS))
    result = describe(args.name)
    output.emit(args.json, output.document(result), lambda: show(result))


def describe(name: str) -> dict[str, Any]:
    """Summary, source, settings and an example of an amount or a chooser."""
    from trimtab.logits.strategy.fusion import describe_settings

    kind = "amount" if name in AMOUNTS else "chooser"
    entry = AMOUNTS[name] if kind == "amount" else CHOOSERS[name]
    settings = [
        {
            "name": setting.name,
            "flag": flag_of(setting.name),
            "type": setting.type,
            "default": setting.default,
            "unit": setting.unit,
            "range": setting.range,
            "doc": setting.doc,
        }
        for setting in describe_settings(name)
    ]
    return {
        "name": name,
        "kind": kind,
        "summary": entry.summary,
        "source": entry.source,
        "settings": settings,
        "example": example(name, kind),
    }


def example(name: str, kind: str) -> str:
    """A command that runs on the embedded models."""
    choosers = {"sum": "--strategy static --chooser sum", "only": "--strategy dynamic --chooser only --speaker facts"}
    choice = f"--strategy {name}" if kind == "amount" else choosers.get(name, f"--strategy dynamic --chooser {name}")
    members = "--strong zoo:strong --base zoo:small --expert facts=zoo:small/facts"
    return f"trimtab fuse {members} {choice} -o runs/{name}"


def show(result: dict[str, Any]) -> None:
    """The description as text and one table."""
    from rich.table import Table

    console = output.console()
    console.print(f"[bold]{result['name']}[/bold]  ({result['kind']})\n{result['summary']}\n{result['source']}\n")
    if result["settings"]:
        table = Table(box=None, pad_edge=False)
        for head in ("setting", "default", "range", "unit", "meaning"):
            table.add_column(head, overflow="fold")
        for setting in result["settings"]:
            default = "" if setting["default"] is None else str(setting["default"])
            table.add_row(setting["flag"], default, setting["range"], setting["unit"], setting["doc"])
        console.print(table)
    else:
        console.print("No settings.")
    console.print(f"\nexample:\n  {result['example']}", soft_wrap=True)
