"""Settings of methods: declared once, as dataclass fields; flags, YAML, Python, help and documents read them there.

@dataclass(frozen=True)
class Halved(Configurable):
    share: float = setting(0.5, "how much is kept", "share", low=0.0, high=1.0)

make(Halved, {"share": 0.2})                  Python: values of the declared types
make(Halved, parse(Halved, {"share": "0.2"})) flags and YAML: texts, read by the declared types
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from trimtab.core.errors import BadSetting, InputError, UnknownName, unknown_name

REQUIRED: Any = MISSING  # the default of a setting that has none: the caller must set it
Made = TypeVar("Made", bound="Configurable")


def setting(default: Any, doc: str, unit: str, low: int | float | None = None, high: int | float | None = None) -> Any:
    """A dataclass field that says what it means, in which unit, and between which bounds (both included).

    default   REQUIRED where there is none
    unit      "share" of a whole, "factor" of what it multiplies, "name", "nats", "tokens", ...; never empty
    low, high bounds of every number in the value: of a list's items and of a table's numbers, too
    """
    metadata = {"doc": doc, "unit": unit, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# --- types ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One type that settings may have.

    label       as users read it: "float", "float or {name: float}"
    read        a Python value in its canonical form; raises ValueError for another type
    parse       the value of a text, or of a list or table of texts as YAML has them; raises ValueError
    is_number   whether one plain number is a value of it
    """

    label: str
    read: Callable[[Any], Any]
    parse: Callable[[Any], Any]
    is_number: bool = False


def kind_of(hint: Any) -> Kind:
    """The kind of an annotation.

    raises    TypeError for a type that settings cannot have: bool, int, float, str, Literal, X | Y, None, list[X],
              tuple[X, ...], tuple[X, Y] and dict[str, int or float] are known
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        return _choice(parts)
    if origin in (Union, types.UnionType):
        return _either([kind_of(part) for part in parts])
    if origin is dict and parts[0] is str and parts[1] in (int, float):
        return _table(kind_of(parts[1]))
    if origin is list:
        return _sequence(list, kind_of(parts[0]), None)
    if origin is tuple and parts:
        is_open = len(parts) == 2 and parts[1] is Ellipsis
        kinds = [kind_of(part) for part in (parts[:1] if is_open else parts)]
        return _sequence(tuple, kinds[0], None) if is_open else _fixed(kinds)
    raise TypeError(
        f"{hint!r} is no type of a setting.\n"
        "  Expected: bool, int, float, str, Literal, X | Y, None, list[X], tuple[X, ...] or dict[str, float].\n"
        "  Fix: use one of these, or several settings."
    )


def _plain(wanted: type, convert: Callable[[str], Any], also: tuple[type, ...] = ()) -> Kind:
    def read(value: Any) -> Any:
        if (isinstance(value, bool) and wanted is not bool) or not isinstance(value, (wanted, *also)):
            raise ValueError
        return wanted(value)

    return Kind(wanted.__name__, read, lambda text: convert(_text(text)), is_number=wanted in (int, float))


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw.strip()


BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError
    return BOOLEANS[text.lower()]


def _nothing(value: Any) -> None:
    if not (value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "~", ""))):
        raise ValueError


def _no_value(value: Any) -> None:
    if value is not None:
        raise ValueError


_PLAIN: dict[Any, Kind] = {
    bool: _plain(bool, _boolean),
    int: _plain(int, int),
    float: _plain(float, float, also=(int,)),
    str: _plain(str, str),
    None: Kind("none", _no_value, _nothing),
    type(None): Kind("none", _no_value, _nothing),
}


def _choice(choices: tuple[Any, ...]) -> Kind:
    def read(value: Any) -> Any:
        return next(iter(_or_fail(choice for choice in choices if choice == value and type(choice) is type(value))))

    def parse(text: Any) -> Any:
        return next(iter(_or_fail(choice for choice in choices if str(choice).lower() == _text(text).lower())))

    return Kind(" or ".join(map(str, choices)), read, parse)


def _or_fail(found: Iterable[Any]) -> list[Any]:
    listed = list(found)
    if not listed:
        raise ValueError
    return listed


def _either(kinds: list[Kind]) -> Kind:
    """The first kind that takes a value has it: of `str | None` the text "none" is a text."""

    def first(calls: Iterable[Callable[[Any], Any]], value: Any) -> Any:
        for call in calls:
            try:
                return call(value)
            except ValueError:
                continue
        raise ValueError

    return Kind(
        " or ".join(kind.label for kind in kinds),
        lambda value: first((kind.read for kind in kinds), value),
        lambda raw: first((kind.parse for kind in kinds), raw),
        is_number=any(kind.is_number for kind in kinds),
    )


def _table(number: Kind) -> Kind:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError
        return {name: number.read(item) for name, item in value.items()}

    def parse(raw: Any) -> dict[str, Any]:
        items = raw if isinstance(raw, Mapping) else dict(_pairs(_text(raw)) if _text(raw) else ())
        return {str(name): number.parse(item) for name, item in items.items()}

    return Kind(f"{{name: {number.label}}}", read, parse)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """NAME=NUMBER,NAME=NUMBER."""
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if not equals or not name.strip():
            raise ValueError
        yield name.strip(), number


def _sequence(made: type, item: Kind, length: int | None) -> Kind:
    def read(value: Any) -> Any:
        return made(item.read(part) for part in _items(value, length))

    def parse(raw: Any) -> Any:
        return made(item.parse(part) for part in _parts(raw, length))

    return Kind(f"list of {item.label}", read, parse)


def _fixed(kinds: list[Kind]) -> Kind:
    def read(value: Any) -> tuple[Any, ...]:
        return tuple(kind.read(part) for kind, part in zip(kinds, _items(value, len(kinds)), strict=True))

    def parse(raw: Any) -> tuple[Any, ...]:
        return tuple(kind.parse(part) for kind, part in zip(kinds, _parts(raw, len(kinds)), strict=True))

    return Kind(f"({', '.join(kind.label for kind in kinds)})", read, parse)


def _items(value: Any, length: int | None) -> list[Any]:
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise ValueError
    return list(value)


def _parts(raw: Any, length: int | None) -> list[Any]:
    """The items of a list of YAML, or of a text A,B,C."""
    return _items(raw if isinstance(raw, list) else _text(raw).split(",") if _text(raw) else [], length)


def shown(value: Any) -> str:
    """A value as a flag takes it: what `Setting.parse` reads back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{name}={shown(number)}" for name, number in value.items())
    return ",".join(map(shown, value)) if isinstance(value, (list, tuple)) else str(value)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a value."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


# --- one setting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One setting as described to users.

    type      as users read it: "float", "float or {name: float}"
    default   None also where there is none, which `is_required` tells
    """

    name: str
    type: str
    default: Any
    unit: str
    low: int | float | None
    high: int | float | None
    doc: str
    is_required: bool
    kind: Kind = field(repr=False, compare=False)

    @property
    def range(self) -> str:
        """The allowed values in words: "0 to 1", "at least 0", or nothing."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else ""

    @property
    def is_number(self) -> bool:
        """Whether one plain number is a value of it."""
        return self.kind.is_number

    @property
    def example(self) -> str:
        """NAME=VALUE, as a flag takes it."""
        plain = "1" if self.is_number else "NAME"
        return f"{self.name}={plain if self.default is None else shown(self.default)}"

    def read(self, value: Any) -> Any:
        """A Python value, checked, in its canonical form: 1 as 1.0 for a float, a list as the tuple that it stands for.

        raises    BadSetting for another type, for a number out of bounds, for NaN and infinities
        """
        try:
            found = self.kind.read(value)
        except (ValueError, OverflowError):
            raise self._bad(value) from None
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if not all(low <= number <= high and abs(number) != math.inf for number in _numbers(found)):
            raise self._bad(value)
        return found

    def parse(self, raw: Any) -> Any:
        """The checked value of a text as a flag has it, or of a list or table of texts as YAML has them.

        A list is A,B,C, a table NAME=NUMBER,NAME=NUMBER.
        raises    BadSetting as `read`
        """
        try:
            value = self.kind.parse(raw)
        except ValueError:
            raise self._bad(raw) from None
        return self.read(value)

    def _bad(self, value: Any) -> BadSetting:
        limits = f", {self.range}" if self.range else ""
        return BadSetting(
            f"{self.name} is {value!r}.", f"Expected: {self.type}{limits}.", f"for example {self.example}."
        )


def settings_of(method: Any) -> tuple[Setting, ...]:
    """All settings of a method (class or instance), in order."""
    cls = method if isinstance(method, type) else type(method)
    hints = {name: hint for base in reversed(cls.__mro__) for name, hint in _annotations(base).items()}
    return tuple(_described(item, hints[item.name]) for item in dataclasses.fields(method))


def _described(item: "dataclasses.Field[Any]", hint: Any) -> Setting:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    is_required = default is MISSING
    kind = kind_of(hint)
    return Setting(
        item.name, kind.label, None if is_required else default, **item.metadata, is_required=is_required, kind=kind
    )


def _annotations(cls: type) -> dict[str, Any]:
    return inspect.get_annotations(cls, eval_str=True)


class Configurable:
    """A method whose dataclass fields are its settings; what is declared wrongly fails where the class is made."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, hint in _annotations(cls).items():
            if hint is ClassVar or get_origin(hint) is ClassVar:
                continue
            declared, where = cls.__dict__.get(name), f"{cls.__qualname__}.{name}"
            if not isinstance(declared, dataclasses.Field) or "doc" not in declared.metadata:
                raise TypeError(
                    f"{where} is no setting.\n  Expected: a field with help text and unit.\n"
                    f'  Fix: {name}: TYPE = setting(DEFAULT, "what it means", "unit").'
                )
            try:
                declared.name = name
                found = _described(declared, hint)
                if not found.is_required:
                    found.read(found.default)
            except (TypeError, BadSetting) as error:
                raise TypeError(f"{where}: {error}") from None


# --- a method from its settings --------------------------------------------------------------------------------------


def make(kind: type[Made], values: Mapping[str, Any], of: str = "") -> Made:
    """The method with these settings; those left out keep their defaults.

    values    Python values by name
    of        what it is called in an error
    raises    UnknownName with the nearest spelling; BadSetting for a value of another type or out of bounds, and for
              a setting that is required and left out
    """
    of = of or kind.__name__
    known = {item.name: item for item in settings_of(kind)}
    reject_unknown(values, known, of)
    missing = next((item for item in known.values() if item.is_required and item.name not in values), None)
    if missing is not None:
        raise BadSetting(
            f"{of} has no {missing.name}.", f"{missing.doc}: {missing.type}.", f"for example {missing.example}."
        )
    return kind(**{name: known[name].read(value) for name, value in values.items()})


def values_of(method: Any) -> dict[str, Any]:
    """The settings of a method by name, as JSON can hold them; `make` is the way back."""
    return dataclasses.asdict(method)


def parse(kind: type[Configurable], texts: Mapping[str, Any]) -> dict[str, Any]:
    """The values of texts as flags and YAML give them; a text whose name is no setting stays as it is for `make`."""
    known = {item.name: item for item in settings_of(kind)}
    return {name: known[name].parse(text) if name in known else text for name, text in texts.items()}


def texts_of_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file (JSON is YAML): name -> text, list of texts or table of texts, for `parse`.

    Every scalar stays as it is written, so that `on` may be a name and 1e-3 is a number: the setting's type decides.

    raises    InputError for a file that cannot be read, is no table, or has a name twice
    """
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """Scalars stay texts; YAML takes the last of two equal names without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"'{twice}' stands there twice")
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read: {reason}.", "Expected: YAML or JSON.", "write one NAME: VALUE a line."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no table of settings.", "Expected: YAML or JSON.", "write one NAME: VALUE a line.")
    return found


def reject_unknown(given: Mapping[str, Any], known: Mapping[str, Any], of: str, noun: str = "setting") -> None:
    """Raise UnknownName, with the nearest spelling, for the first given name that is not known."""
    for name in given:
        if name not in known:
            error = unknown_name(noun, name, known)
            raise UnknownName(f"{of} has no {noun} '{name}'.", error.expected, error.fix)
