"""Booleans as vLLM reads them."""

from typing import Any

OFF = frozenset({"0", "off", "f", "false", "n", "no"})  # what pydantic reads as false


def parse_bool(value: Any) -> bool:
    """Whether vLLM reads this value, a boolean or a word such as "off", as true."""
    return value.lower() not in OFF if isinstance(value, str) else bool(value)
