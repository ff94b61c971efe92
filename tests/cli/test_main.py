"""Dispatch, errors and exit codes; list and show."""

import os
import subprocess
import sys

import pytest

from trimtab.cli import commands, docs
from trimtab.cli.main import main
from trimtab.core.errors import TrimtabError
from trimtab.logits.registry import AMOUNTS, CHOOSERS


def test_help_names_every_command(run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(name in ran.out and line.summary in ran.out for name, line in commands.COMMANDS.items())


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
        (["--quiet"], "see `trimtab --help`"),
        (["list", "extra"], "no argument extra"),
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


def test_list_has_both_registries(run) -> None:
    ran = run("list", "--json")
    document = ran.json()
    assert set(document["result"]["amounts"]) == set(AMOUNTS)
    assert set(document["result"]["choosers"]) == set(CHOOSERS)
    assert document["versions"]["trimtab"]
    shown = run("list").out
    assert all(name in shown for name in (*AMOUNTS, *CHOOSERS))


@pytest.mark.parametrize("name", [*AMOUNTS, *CHOOSERS])
def test_show_describes_every_strategy_with_an_example_that_parses(run, name: str) -> None:
    from trimtab.cli.parser import command_parser

    result = run("show", name, "--json").json()["result"]
    assert result["summary"]
    assert result["source"]
    assert all(setting["doc"] and setting["flag"].startswith("--") for setting in result["settings"])
    words = result["example"].split()
    args = command_parser(words[1]).parse_all(words[2:])
    assert name in (args.strategy, args.chooser)
    shown = run("show", name).out
    assert result["summary"] in " ".join(shown.split())
    assert result["example"] in shown


def test_the_command_reference_is_not_stale(request) -> None:
    written = (request.config.rootpath / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == docs.render(), "run: python -m trimtab.cli.docs > docs/cli.md"


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
