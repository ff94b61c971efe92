"""Options that studies share, read with plain argparse."""

from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any

from trimtab.core.errors import InputError, unknown_name


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
