"""Options that studies share, read with plain argparse."""

from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import InputError, unknown_name


def add_draws(parser: Any, items: int, seeds: str, output: Path | None, kind: str) -> None:
    """Which pairs, how many items of how many draws, and where to write a page of this kind."""
    parser.add_argument("--pairs", metavar="NAMES", help="comma-separated: far, close; both by default")
    parser.add_argument("--items", type=positive, default=items, metavar="N", help="items per task and draw")
    parser.add_argument("--seeds", metavar="NUMBERS", default=seeds, help="comma-separated, one draw of items each")
    parser.add_argument("-o", "--output", metavar="PATH", type=Path, default=output, help=kind)
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is less than 1")
    return value


def names_of(text: str | None, known: Mapping[str, Any], kind: str) -> list[str]:
    """A comma-separated list of known names; all of them by default."""
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    if not names:
        raise InputError(f"no {kind} was named.", f"Known: {', '.join(known)}.", f"name at least one {kind}.")
    return list(dict.fromkeys(names))


def numbers_of(text: str, option: str) -> list[int]:
    """Whole numbers from a comma-separated list, each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(
            f"{option} {text} cannot be read.", "Expected: whole numbers.", "for example 0,1,2."
        ) from error
