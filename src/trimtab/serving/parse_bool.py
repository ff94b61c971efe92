"""How vLLM reads what is written for a setting that is true or false."""

from typing import Any

OFF = frozenset({"0", "off", "f", "false", "n", "no"})  # what pydantic reads as false


def is_on(value: Any) -> bool:
    """Whether vLLM takes this for true: it reads words, too."""
    return value.lower() not in OFF if isinstance(value, str) else bool(value)
