"""List the methods of every space, or of one family: what can be chosen by name.

A method of another package is listed like trimtab's own.
"""

import argparse
from collections.abc import Sequence

from trimtab.cli import output
from trimtab.core.errors import unknown_name
from trimtab.core.registry import Family, families, source_of, spaces

EXAMPLE = "trimtab list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FAMILY."""
    parser.add_argument("family", metavar="FAMILY", nargs="?", help="such as amounts; all of them by default")


def run(args: argparse.Namespace) -> None:
    """The families in their order, with the space that each belongs to."""
    listed = families() if args.family is None else (family_called(args.family),)
    result = {plural(family): describe(family) for family in listed}
    output.emit(args.json, output.document(result), lambda: show(listed))


def plural(family: Family) -> str:
    """The name of a family as its heading says it."""
    return f"{family.name}s"


def family_called(name: str) -> Family:
    """The family of that name, in the singular or the plural; raises UnknownName with the nearest spelling."""
    known = {plural(family): family for family in families()}
    singular = {family.name: family for family in families()}
    if name not in known and name not in singular:
        raise unknown_name("family", name, known)
    return known.get(name) or singular[name]


def describe(family: Family) -> dict[str, dict[str, str]]:
    """Names with their summary and source."""
    return {name: {"summary": entry.summary, "source": source_of(entry)} for name, entry in family.items()}


def show(listed: Sequence[Family]) -> None:
    """One plain block per family; nothing heavier than print, so that the answer is there at once."""
    width = max(len(name) for family in listed for name in family)
    for space in spaces():
        shown = [family for family in space.families if family in listed]
        if shown:
            print(f"{space.name}: {space.summary}\n")
        for family in shown:
            print(f"{plural(family)}{f'  ({family.option})' if family.option else ''}: {family.summary}")
            for name, entry in family.items():
                print(f"  {name:<{width}}  {entry.summary}\n  {'':<{width}}    {source_of(entry)}")
            print()
    print("`trimtab show NAME` has the settings of each.")
