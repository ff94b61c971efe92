"""Dispatch, errors and exit codes; list and show."""

import os
import subprocess
import sys

import pytest

from trimtab.cli import commands, docs
from trimtab.cli.list import plural
from trimtab.cli.main import main
from trimtab.core.errors import TrimtabError
from trimtab.core.registry import families, methods
from trimtab.logits.registry import AMOUNTS, CHOOSERS


def test_help_names_every_command(run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(name in ran.out and line.summary in ran.out for name, line in commands.COMMANDS.items())
    assert {line.group for line in commands.COMMANDS.values()} == set(commands.GROUPS)
    assert [ran.out.index(f"{group}:") for group in commands.GROUPS] == sorted(
        ran.out.index(f"{group}:") for group in commands.GROUPS
    )


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help_that_opens_with_its_promise_and_an_example(run, name: str) -> None:
    ran = run(name, "--help")
    command = commands.load_command(name)
    assert ran.code == 0
    assert (command.__doc__ or "").strip().splitlines()[0] in ran.out
    assert command.EXAMPLE in ran.out


def test_no_command_is_wrong_usage(run) -> None:
    ran = run()
    assert ran.code == 2
    assert ran.out == ""
    assert "usage: trimtab COMMAND" in ran.err


@pytest.mark.parametrize(
    ("words", "proposal"),
    [
        (["demoo"], "did you mean 'demo'?"),
        (["shw"], "did you mean 'show'?"),
        (["list", "--jsn"], "did you mean --json?"),
        (["show", "dynamc"], "did you mean 'dynamic'?"),
        (["show", "confidant"], "did you mean 'confident'?"),
        (["demo", "--item", "5"], "did you mean --items?"),
        (["demo", "--pair", "fra"], "invalid choice: 'fra'"),
        (["demo", "--items", "0"], "0 is less than 1"),
        (["demo", "--items", "x"], "invalid"),
        (["fuse", "--strategy", "dynamc", "--strong", "s", "--base", "b", "--expert", "e", "-o", "o"], "'dynamic'"),
        (["fuse", "--alpha-mx", "1"], "--alpha-max"),
        (["fuse", "--alpha-max"], "--alpha-max has no value"),
        (["fuse", "--chooser-x", "1"], "did you mean --chooser?"),
        (["list", "amonts"], "did you mean 'amounts'?"),
        (["show", "amount:dynamc"], "did you mean 'amount:dynamic'?"),
        (["--quiet"], "see `trimtab --help`"),
        (["list", "amounts", "extra"], "no argument extra"),
    ],
)
def test_wrong_usage_is_answered_with_the_nearest_spelling(run, words: list[str], proposal: str) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert proposal in ran.err
    assert "Traceback" not in ran.err


def raise_in_list(monkeypatch, error: BaseException) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("trimtab.cli.list.run", fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            TrimtabError("it broke.", "It should not.", "mend it."),
            1,
            "TrimtabError: it broke.\n  It should not.\n  Fix: mend it.",
        ),
        (KeyboardInterrupt(), 130, "interrupted."),
        (ZeroDivisionError("oops"), 1, "run again with --debug"),
    ],
)
def test_what_goes_wrong_has_an_exit_code_and_one_message(run, monkeypatch, error, code: int, message: str) -> None:
    raise_in_list(monkeypatch, error)
    ran = run("list")
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_debug_shows_the_traceback(run, monkeypatch) -> None:
    raise_in_list(monkeypatch, TrimtabError("it broke."))
    ran = run("list", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_a_reader_that_leaves_is_no_error_message() -> None:
    code = "import sys; from trimtab.cli.main import main; sys.exit(main(['list']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert ran.returncode == 1
    assert ran.stderr == b""


def test_warnings_are_one_line_on_stderr(run, monkeypatch) -> None:
    import warnings

    from trimtab.core.errors import TrimtabWarning

    monkeypatch.setattr("trimtab.cli.list.run", lambda args: warnings.warn("mind this", TrimtabWarning, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ran = run("list")
    assert ran.code == 0
    assert ran.err == "warning: mind this\n"


def test_list_has_every_family(run) -> None:
    ran = run("list", "--json")
    document = ran.json()
    assert {plural(family): set(family) for family in families()} == {
        name: set(entries) for name, entries in document["result"].items()
    }
    assert document["versions"]["trimtab"]
    assert all(entry["source"] for entries in document["result"].values() for entry in entries.values())
    shown = run("list").out
    assert all(name in shown for name in (*AMOUNTS, *CHOOSERS))


@pytest.mark.parametrize("word", ["choosers", "chooser"])
def test_list_takes_one_family(run, word: str) -> None:
    assert list(run("list", word, "--json").json()["result"]) == ["choosers"]
    shown = run("list", word).out
    assert "joint_objective" in shown
    assert "dynamic" not in shown


@pytest.mark.parametrize(("family", "name"), list(methods()), ids=lambda part: str(getattr(part, "name", part)))
def test_show_describes_every_method(run, family, name: str) -> None:
    result = run("show", name, "--json").json()["result"]
    assert result["summary"]
    assert result["source"]
    assert all(setting["doc"] and setting["flag"].startswith("--set ") for setting in result["settings"])
    shown = run("show", f"{family.name}:{name}").out
    assert result["summary"] in " ".join(shown.split())
    assert result["example"] in shown
    assert all(setting["name"] in shown for setting in result["settings"])


def test_show_knows_former_names(run) -> None:
    assert run("show", "paper", "--json").json()["result"]["name"] == "joint_objective"


def test_the_generated_pages_are_not_stale(request) -> None:
    for name, text in docs.pages().items():
        written = (request.config.rootpath / "docs" / name).read_text(encoding="utf-8")
        assert written == text, "run: make docs"


def test_the_module_runs_as_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-m", "trimtab", "--version"], capture_output=True, text=True, env=environment
    )
    assert (ran.returncode, ran.stdout.count(".")) == (0, 2)


def test_main_reads_the_words_of_the_process(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.strip()
