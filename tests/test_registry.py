"""What every method of every space promises: these tests walk the families, so that a new line is tested from birth."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import plugged
from trimtab.core import registry
from trimtab.core.errors import TrimtabError, UnknownName
from trimtab.core.registry import Entry, Family, canonical, families, find, methods, name_in, source_of, words_of
from trimtab.core.settings import make, parse, settings_of, shown
from trimtab.logits.registry import AMOUNTS, CHOOSERS

METHODS = list(methods())
each_method = pytest.mark.parametrize(
    ("family", "name"), METHODS, ids=[f"{family.name}-{name}" for family, name in METHODS]
)


@each_method
def test_a_line_leads_to_a_frozen_dataclass_of_its_family(family: Family, name: str) -> None:
    kind = find(family, name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert not getattr(kind, "__abstractmethods__", None)
    assert kind.__doc__
    assert family[name].summary.endswith(".")
    assert len(family[name].summary) <= 100


@each_method
def test_a_module_says_what_it_does_and_who_described_it_first(family: Family, name: str) -> None:
    entry = family[name]
    source = source_of(entry)
    assert source
    assert source.endswith(".")
    assert words_of(entry) == sys.modules[find(family, name).__module__].__doc__.strip()  # read without an import


@each_method
def test_settings_are_described_and_read_back(family: Family, name: str) -> None:
    kind = find(family, name)
    settings = settings_of(kind)
    for item in settings:
        assert item.doc
        assert not item.doc.endswith(".")
        assert item.unit
        if not item.is_required and item.default is not None:
            assert item.parse(shown(item.default)) == item.default
    if not any(item.is_required for item in settings):
        made = make(kind, {})
        assert name_in(family, made) == name
        texts = {item.name: shown(item.default) for item in settings if item.default is not None}
        assert make(kind, parse(kind, texts)) == made


@each_method
def test_an_example_runs_its_method(family: Family, name: str) -> None:
    from trimtab.cli.parser import command_parser

    words = family.example_of(name).split()
    if not words:
        return
    args = command_parser(words[1]).parse_all(words[2:])
    assert name in vars(args).values()


def test_no_name_means_two_things_within_a_space() -> None:
    for space in registry.spaces():
        names = [name for family in space.families for name in (*family, *family.aliases)]
        assert len(names) == len(set(names)), space.name


@pytest.mark.parametrize(("given", "near"), [("dinamic", "dynamic"), ("statik", "static"), ("Grid", "grid")])
def test_a_wrong_name_is_answered_with_the_nearest_one(given: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"no amount '{given}'(?s:.*)did you mean '{near}'"):
        find(AMOUNTS, given)


def test_a_former_name_stands_for_todays() -> None:
    assert canonical(CHOOSERS, "paper") == "joint_objective"
    assert find(CHOOSERS, "paper") is find(CHOOSERS, "joint_objective")
    assert "paper" not in list(CHOOSERS)


def test_what_is_not_of_the_family_is_refused() -> None:
    wrong = Family("amount", AMOUNTS.base, "", {"sum": CHOOSERS["sum"]})
    with pytest.raises(TrimtabError, match=r"which is no Amount(?s:.*)class ...\(Amount\)"):
        find(wrong, "sum")


# ---- another package


@pytest.fixture(scope="module")
def toy_path(tmp_path_factory) -> str:
    """Path for a process that has the package `toy` installed."""
    return os.pathsep.join([str(plugged.install(tmp_path_factory.mktemp("site"))), *sys.path])


@pytest.fixture
def toy(toy_path, monkeypatch):
    """The package `toy`, installed for this process."""
    monkeypatch.syspath_prepend(toy_path.split(os.pathsep)[0])
    caches = (registry.spaces, registry.registries, registry._additions)
    for cache in caches:
        cache.cache_clear()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_another_packages_methods_are_listed_and_shown(toy, capsys) -> None:
    from trimtab.cli.main import main

    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["result"]
    assert listed["turns"] == {"flip": {"summary": "The number with the other sign.", "source": "ours; a toy."}}
    assert "halved" in listed["amounts"]
    assert main(["list", "turns"]) == 0
    assert "Toy: a number is changed." in capsys.readouterr().out
    assert main(["show", "flip"]) == 0
    assert "flip_factor" in capsys.readouterr().out
    assert main(["show", "amount:halved", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["kind"] == "amount"
    assert main(["show", "flp"]) == 2
    assert "did you mean 'flip'?" in capsys.readouterr().err


def test_another_packages_methods_are_in_the_pages(toy) -> None:
    from trimtab.cli import docs

    pages = docs.pages()
    assert "### `flip`" in pages["toy.md"]
    assert "what it is multiplied with" in pages["toy.md"]
    assert "### `halved`" in pages["strategies.md"]


def test_another_packages_amount_fuses(toy) -> None:
    from laws import draw_members
    from trimtab import make_strategy

    laws = draw_members(3, 9, 2, seed=1)
    ours, theirs = make_strategy("static", alpha=0.25), make_strategy("halved", kept_share=0.25)
    assert theirs(*laws).log_probs.equal(ours(*laws).log_probs)
    assert theirs.to_dict() == {
        "amount": "halved",
        "chooser": "joint_objective",
        "settings": {"kept_share": 0.25},
    }


def helps() -> dict[str, str]:
    from trimtab.cli.commands import COMMANDS
    from trimtab.cli.parser import command_parser, top_help

    return {name: command_parser(name).format_help() for name in COMMANDS} | {"": top_help()}


def test_help_does_not_grow_with_the_registry(request) -> None:
    before, names = helps(), set(AMOUNTS)
    request.getfixturevalue("toy")
    assert set(AMOUNTS) - names == {"halved"}
    assert helps() == before


def test_these_tests_walk_another_packages_methods(toy_path) -> None:
    """The contract tests of this file, run where `toy` is installed; nothing else was edited."""
    environment = {**os.environ, "PYTHONPATH": toy_path}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", __file__]
    ran = subprocess.run([*words, "-k", "turn-flip"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout
    assert "4 passed" in ran.stdout


BROKEN = [
    ("raise RuntimeError('no')", "cannot be imported: no.(?s:.*)pip uninstall toy"),
    ("METHODS = {'amuont': {}}", "did you mean 'amount'"),
    ("METHODS = {'amount': {'grid': None}}", "adds a method 'grid'(?s:.*)which has one"),
    ("from trimtab.logits.registry import FAMILIES", "two spaces have a family 'amount'"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_broken_package_is_named(toy, tmp_path, monkeypatch, content: str, message: str) -> None:
    plugged.write(plugged.install(tmp_path) / "toy" / "registry.py", f'"""Toy."""\n{content}\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrimtabError, match=message):
        _ = [list(family) for family in families()]


def test_an_entry_without_a_module_is_named() -> None:
    with pytest.raises(TrimtabError, match=r"there is no module trimtab.nowhere:Thing"):
        words_of(Entry("trimtab.nowhere:Thing", ""))
