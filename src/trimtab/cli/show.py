"""Describe one method: what it does, its settings with units and ranges, its source, and an example that runs."""

import argparse
from typing import Any

from trimtab.cli import output
from trimtab.core.errors import InputError, unknown_name
from trimtab.core.registry import Family, canonical, families, find, methods, source_of, words_of
from trimtab.core.settings import Setting, settings_of, shown

EXAMPLE = "trimtab show dynamic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="a method, or FAMILY:NAME; see `trimtab list`")


def run(args: argparse.Namespace) -> None:
    """Everything that the registry, the module and the settings say about one name."""
    result = describe(*located(args.name))
    output.emit(args.json, output.document(result), lambda: show(result))


def located(text: str) -> tuple[Family, str]:
    """The family and the name of a method.

    raises    UnknownName with the nearest spelling; InputError where several families have the name
    """
    wanted, colon, name = text.rpartition(":")
    found = [
        family
        for family in families()
        if family.aliases.get(name, name) in family and (not colon or wanted in (family.name, f"{family.name}s"))
    ]
    if not found:
        raise unknown_name("method", text, [f"{f.name}:{n}" if colon else n for f, n in methods()])
    if len(found) > 1:
        both = [f"{family.name}:{name}" for family in found]
        raise InputError(f"'{name}' is in several families.", f"Known: {', '.join(both)}.", f"say {both[0]}.")
    return found[0], canonical(found[0], name)


def describe(family: Family, name: str) -> dict[str, Any]:
    """Summary, words, source, settings and an example of a method."""
    entry = family[name]
    return {
        "name": name,
        "kind": family.name,
        "summary": entry.summary,
        "source": source_of(entry),
        "about": words_of(entry),
        "settings": [describe_setting(item) for item in settings_of(find(family, name))],
        "example": family.example_of(name),
    }


def describe_setting(item: Setting) -> dict[str, Any]:
    """One setting for JSON."""
    return {
        "name": item.name,
        "flag": f"--set {item.name}=VALUE",
        "type": item.type,
        "default": item.default,
        "is_required": item.is_required,
        "unit": item.unit,
        "range": item.range,
        "doc": item.doc,
    }


def show(result: dict[str, Any]) -> None:
    """The description as text and one table."""
    from rich.table import Table

    console = output.console()
    console.print(f"[bold]{result['name']}[/bold]  ({result['kind']})\n{result['summary']}\n")
    console.print(result["about"], markup=False)
    console.print()
    if result["settings"]:
        table = Table(box=None, pad_edge=False)
        for head in ("--set", "type", "default", "range", "unit", "meaning"):
            table.add_column(head, overflow="fold")
        for setting in result["settings"]:
            default = "" if setting["default"] is None else shown(setting["default"])
            cells = (setting["name"], setting["type"], "required" if setting["is_required"] else default)
            table.add_row(*cells, setting["range"], setting["unit"], setting["doc"])
        console.print(table)
    else:
        console.print("No settings.")
    if result["example"]:
        console.print(f"\nexample:\n  {result['example']}", soft_wrap=True)
