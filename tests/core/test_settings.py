"""Settings: every type from Python, from a flag and from YAML; bounds; and what is declared wrongly."""

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from trimtab.core.errors import BadSetting, InputError, UnknownName
from trimtab.core.settings import (
    REQUIRED,
    Configurable,
    make,
    parse,
    setting,
    settings_of,
    shown,
    texts_of_file,
    values_of,
)


@dataclass(frozen=True)
class Method(Configurable):
    """One setting of each type."""

    family: ClassVar[str] = "no setting"

    count: int = setting(3, "a count", "tokens", low=1, high=9)
    scale: float = setting(0.5, "a number", "factor", low=0.0, high=10.0)
    is_on: bool = setting(False, "a switch", "yes or no")
    name: str = setting("mean", "a name", "name")
    mode: Literal["on", "off", "auto"] = setting("auto", "one of some", "name")
    limit: float | None = setting(None, "a number or nothing", "nats", low=0.0)
    expert: str | None = setting(None, "a name or nothing", "name")
    layers: tuple[int, ...] = setting((), "any number of counts", "layers", low=0)
    span: tuple[float, float] = setting((0.0, 1.0), "two numbers", "share", low=0.0, high=1.0)
    names: list[str] = setting([], "names", "names")
    weights: dict[str, float] = setting({}, "numbers by name", "share", low=0.0, high=1.0)
    alpha: float | dict[str, float] = setting(1.0, "one number, or one per name", "factor", low=-10.0, high=10.0)


SOURCES = [
    # name, from Python, as a flag, as YAML, the value
    ("count", 4, "4", "4", 4),
    ("scale", 2, "2", "2", 2.0),
    ("scale", 0.001, "1e-3", "1e-3", 0.001),  # a text to YAML 1.1
    ("is_on", True, "true", "yes", True),
    ("is_on", False, "off", "False", False),
    ("name", "yes", "yes", "yes", "yes"),  # a boolean to YAML 1.1
    ("mode", "on", "on", "on", "on"),
    ("limit", 1.5, "1.5", "1.5", 1.5),
    ("limit", None, "none", "null", None),
    ("expert", "none", "none", "none", "none"),  # an expert may be called so
    ("layers", [1, 2], "1,2", "[1, 2]", (1, 2)),
    ("layers", (), "", "[]", ()),
    ("span", (0.25, 1), "0.25,1", "[0.25, 1]", (0.25, 1.0)),
    ("names", ["a", "b"], "a,b", "[a, b]", ["a", "b"]),
    ("weights", {"a": 1, "b": 0.5}, "a=1, b=0.5", "{a: 1, b: 0.5}", {"a": 1.0, "b": 0.5}),
    ("alpha", 2, "2", "2", 2.0),
    ("alpha", {"math": 0.5}, "math=0.5", "{math: 0.5}", {"math": 0.5}),
]


@pytest.mark.parametrize(("name", "python", "flag", "yaml", "value"), SOURCES)
def test_every_type_is_read_from_python_flags_and_yaml(tmp_path, name, python, flag, yaml, value) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {yaml}\n")
    made = [
        make(Method, {name: python}),
        make(Method, parse(Method, {name: flag})),
        make(Method, parse(Method, texts_of_file(file))),
    ]
    for method in made:
        assert getattr(method, name) == value
        assert type(getattr(method, name)) is type(value)
        assert make(Method, json.loads(json.dumps(values_of(method)))) == method
    assert parse(Method, {name: shown(value)}) == {name: value} or value == ()


BAD = [
    ("count", 2.0, "2.5"),
    ("count", True, "true"),
    ("count", 0, "0"),
    ("scale", "1", "much"),
    ("scale", float("nan"), "nan"),
    ("scale", float("inf"), "inf"),
    ("scale", 10**400, "11"),
    ("is_on", 1, "1"),
    ("name", None, None),
    ("mode", True, "sometimes"),
    ("limit", "none", "-1"),
    ("layers", [1, -1], "1,-1"),
    ("layers", [1.5], "1,x"),
    ("span", [0.5], "0.5"),
    ("span", [0.5, 2.0], "0.5,2"),
    ("names", "ab", None),
    ("weights", {"a": 2.0}, "a=2"),
    ("weights", {1: 0.5}, "0.5"),
    ("alpha", {"math": 99}, "math=99"),
]


@pytest.mark.parametrize(("name", "python", "text"), BAD)
def test_what_is_no_value_is_refused_with_type_and_range(name, python, text) -> None:
    item = next(item for item in settings_of(Method) if item.name == name)
    for read, value in ((item.read, python), (item.parse, text)):
        with pytest.raises(BadSetting) as caught:
            read(value)
        assert caught.value.found.startswith(f"{name} is ")
        assert item.type in caught.value.expected
        assert item.range in caught.value.expected
    repaired = caught.value.fix.removeprefix("for example ").rstrip(".")
    assert parse(Method, dict([repaired.split("=", 1)])) is not None  # what is proposed can be read


def test_settings_are_described_as_users_read_them() -> None:
    types = {item.name: (item.type, item.range) for item in settings_of(Method)}
    assert types["count"] == ("int", "1 to 9")
    assert types["mode"] == ("on or off or auto", "")
    assert types["limit"] == ("float or none", "at least 0")
    assert types["layers"] == ("list of int", "at least 0")
    assert types["span"] == ("(float, float)", "0 to 1")
    assert types["alpha"] == ("float or {name: float}", "-10 to 10")
    assert "family" not in types


def test_a_required_setting_must_be_given() -> None:
    @dataclass(frozen=True)
    class Needy(Configurable):
        rate: float = setting(REQUIRED, "how fast", "factor", low=0.0)

    with pytest.raises(BadSetting, match=r"Needy has no rate(?s:.*)how fast: float(?s:.*)rate=1"):
        make(Needy, {})
    assert make(Needy, {"rate": 2}).rate == 2.0
    with pytest.raises(UnknownName, match=r"Needy has no setting 'rat'(?s:.*)did you mean 'rate'"):
        make(Needy, {"rat": 2})


@dataclass(frozen=True)
class Base(Configurable):
    """Settings of a base class are a method's own."""

    share: float = setting(0.5, "how much", "share", low=0.0, high=1.0)


def test_inherited_settings_are_settings() -> None:
    @dataclass(frozen=True)
    class Derived(Base):
        count: int = setting(1, "how many", "tokens")

    assert [item.name for item in settings_of(Derived)] == ["share", "count"]


WRONG = [
    (complex, setting(1j, "a number", "factor"), "complex'> is no type of a setting"),
    (dict[str, str], setting({}, "names by name", "name"), r"dict\[str, str\] is no type of a setting"),
    (set[int], setting((), "numbers", "factor"), r"set\[int\] is no type"),
    (float, 0.5, "is no setting(?s:.*)setting\\(DEFAULT"),
    (float, setting(2.0, "a share", "share", low=0.0, high=1.0), "x is 2.0(?s:.*)0 to 1"),
    (int, setting("3", "a count", "tokens"), "x is '3'"),
]


@pytest.mark.parametrize(("hint", "default", "message"), WRONG)
def test_what_is_declared_wrongly_fails_where_the_class_is_made(hint, default, message: str) -> None:
    with pytest.raises(TypeError, match=f"Wrong.x(?s:.*){message}"):
        type("Wrong", (Configurable,), {"__annotations__": {"x": hint}, "x": default})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\na: 2\n", "'a' stands there twice"),
        ("- 1\n", "no table of settings"),
        ("a: [1\n", "cannot be read"),
        ("", "no table of settings"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        texts_of_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        texts_of_file(tmp_path / "away.yaml")


def test_a_file_makes_no_objects(tmp_path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f'name: !!python/object/apply:os.system ["touch {tmp_path}/made"]\n')
    with pytest.raises(BadSetting):
        parse(Method, texts_of_file(file))
    assert not (tmp_path / "made").exists()
