"""Settings of strategies: declared once, as dataclass fields; flags, help, documents and checks read them there."""

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from trimtab.core.errors import BadSetting, UnknownName, unknown_name

Value = float | int | str | dict[str, float] | None


def setting(default: Any, doc: str, unit: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that says what it means, in which unit, and between which bounds (both included).

    unit    "share" of a whole, "factor" of what it multiplies, "name"; never empty
    """
    return field(default=default, metadata={"doc": doc, "unit": unit, "low": low, "high": high})


@dataclass(frozen=True)
class Setting:
    """One setting as described to users."""

    name: str
    type: str  # "float", "str", "float or {expert: float}"
    default: Value
    unit: str
    low: float | None
    high: float | None
    doc: str

    @property
    def range(self) -> str:
        """The allowed values in words: "0 to 1", "at least 0", or nothing."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else ""

    def parse(self, text: str) -> Value:
        """The value that a command-line text stands for: a number, a name, or NAME=NUMBER,NAME=NUMBER."""
        if self.type == "str":
            return text
        try:
            if "=" in text and "{" in self.type:
                pairs = (part.split("=", 1) for part in text.split(","))
                return {name.strip(): float(number) for name, number in pairs}
            return float(text)
        except ValueError:
            raise BadSetting(
                f"{self.name} is '{text}'.", f"Expected: {self.type}.", f"for example {self.default}."
            ) from None


_TYPE_NAMES: dict[Any, str] = {
    float: "float",
    str | None: "str",
    float | dict[str, float]: "float or {expert: float}",
}


def settings_of(ingredient: Any) -> tuple[Setting, ...]:
    """All settings of an amount or a chooser (class or instance), in order."""
    return tuple(
        Setting(
            name=item.name,
            type=_TYPE_NAMES[item.type],
            default=None if item.default is MISSING else item.default,
            **item.metadata,
        )
        for item in dataclasses.fields(ingredient)
    )


def check_settings(ingredient: Any, values: Mapping[str, Any]) -> None:
    """Raise BadSetting unless every given value has the type of its setting and lies in its range."""
    for item in settings_of(ingredient):
        if item.name not in values:
            continue
        value = values[item.name]
        if item.type == "str":
            if value is not None and not isinstance(value, str):
                raise BadSetting(f"{item.name} is {value!r}.", "Expected: a name.", f"pass {item.name}=NAME.")
        elif isinstance(value, Mapping) and "{" in item.type:
            for number in value.values():
                _check_number(item, number)
        else:
            _check_number(item, value)


def _check_number(item: Setting, number: Any) -> None:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    low = -float("inf") if item.low is None else item.low
    high = float("inf") if item.high is None else item.high
    if not is_number or not low <= number <= high or abs(number) == float("inf"):
        raise BadSetting(
            f"{item.name} is {number!r}.",
            f"Expected: {item.type}{', ' + item.range if item.range else ''}.",
            f"for example {item.name}={item.default}.",
        )


def reject_unknown(given: Mapping[str, Any], known: Mapping[str, Any], of: str, noun: str = "setting") -> None:
    """Raise UnknownName, with the nearest spelling, for the first given name that is not known."""
    for name in given:
        if name not in known:
            error = unknown_name(noun, name, known)
            raise UnknownName(f"{of} has no {noun} '{name}'.", error.expected, error.fix)
