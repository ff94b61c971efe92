"""`trimtab batch` without Ray: files, resuming after kill -9 at random moments, refusals; and the Python call."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asking import chat, complete, read_rows, texts, write_rows
from trimtab.batch.job import Settings, Workers, run_batch
from trimtab.cli.main import main
from trimtab.core.errors import InputError, UnknownName

IN_PROCESS = ("--workers", "0", "--engine", "transformers")
HERE, TRANSFORMERS = Workers(workers=0), Settings("transformers")


def rows_of(count):
    make = [complete, chat]
    return [make[number % 2](f"row-{number}", f"{number}+{number}", max_tokens=6) for number in range(count)]


def batch(*words):
    return main(["batch", *map(str, words), *IN_PROCESS])


def test_the_output_is_complete_in_the_order_of_the_input_whatever_that_is(fused_dir, tmp_path, capsys):
    rows = [*rows_of(9), complete("bad", "x", max_tokens=500), "{no json"]
    random.Random(1).shuffle(rows)
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert batch(fused_dir, source, tmp_path / "out.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["rows"] == 11
    assert found["failed"] == 2
    assert found["computed"] == 10
    answers = read_rows(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in answers] == [None if isinstance(r, str) else r["custom_id"] for r in rows]
    by_id = {row["custom_id"]: row for row in answers}
    assert all(len(texts(by_id[f"row-{number}"])) == 1 for number in range(9))
    bad, broken = by_id["bad"], by_id[None]
    assert set(bad) == {"id", "custom_id", "response", "error"}
    assert set(bad["response"]) == {"status_code", "request_id", "body"}
    assert bad["response"]["status_code"] == broken["response"]["status_code"] == 400
    assert set(bad["error"]["error"]) == {"message", "type", "param", "code"}
    assert f"line {rows.index('{no json') + 1}: this is no JSON" in broken["error"]["error"]["message"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert len({row["id"] for row in answers}) == 11


def test_compressed_files_in_any_order_give_the_same_answers(fused_dir, tmp_path):
    rows = rows_of(6)
    for name, given in {"plain.jsonl": rows, "zipped.jsonl.gz": rows[::-1]}.items():
        source = write_rows(tmp_path / name, given)
        run_batch(fused_dir, source, tmp_path / f"out-{name}", TRANSFORMERS, HERE)
    plain, zipped = (read_rows(tmp_path / f"out-{name}") for name in ("plain.jsonl", "zipped.jsonl.gz"))
    assert (tmp_path / "out-zipped.jsonl.gz").read_bytes().startswith(b"\x1f\x8b")
    assert [texts(row) for row in zipped[::-1]] == [texts(row) for row in plain]
    assert [row["id"] for row in zipped[::-1]] == [row["id"] for row in plain]


def finished(journal: Path) -> dict[str, str]:
    """custom_id -> the id of its response, which every computation makes anew, of whole lines in a journal."""
    if not journal.exists():
        return {}
    lines = journal.read_bytes().split(b"\n")[1:-1]
    return {row["id"]: row["value"]["id"] for row in map(json.loads, lines)}


@pytest.mark.thorough
def test_kill_at_random_moments_and_resume_leaves_a_complete_output_and_computes_nothing_twice(fused_dir, tmp_path):
    rows = rows_of(60)
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.part"
    words = [sys.executable, "-m", "trimtab", "batch", *map(str, (fused_dir, source, target)), *IN_PROCESS]
    words += ["--batch-size", "1", "--resume"]
    moments, kept, kills = random.Random(7), {}, 0
    for round_number in range(3):
        process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # Most of a run is loading: wait until rows are finished, then a random moment among them.
        wanted = len(kept) + moments.randrange(1, 12)
        while process.poll() is None and len(finished(journal)) < wanted:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        assert round_number > 0 or process.returncode != 0
        kills += process.returncode == -signal.SIGKILL
        now = finished(journal)
        if process.returncode:
            assert kept.items() <= now.items()
            kept = now
    summary = run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    answers = read_rows(target)
    assert kills >= 2
    assert [row["custom_id"] for row in answers] == [row["custom_id"] for row in rows]
    assert summary.rows == 60
    assert {row["custom_id"]: row["response"]["body"]["id"] for row in answers}.items() >= kept.items()
    assert summary.kept >= len(kept) > 0
    assert not journal.exists()
    before = target.read_bytes()
    again = run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    assert (again.computed, again.kept, target.read_bytes()) == (0, 60, before)


def test_a_kill_between_the_output_and_the_end_of_the_journal_is_no_harm(fused_dir, tmp_path):
    source, target = write_rows(tmp_path / "in.jsonl", rows_of(4)), tmp_path / "out.jsonl"
    kept = []

    def keep(done, total):
        if done == total:
            kept.append((tmp_path / "out.jsonl.part").read_bytes())

    run_batch(fused_dir, source, target, TRANSFORMERS, HERE, advance=keep)
    before = target.read_bytes()
    (tmp_path / "out.jsonl.part").write_bytes(kept[-1])
    summary = run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    assert (summary.computed, target.read_bytes()) == (0, before)
    assert not (tmp_path / "out.jsonl.part").exists()


def stopped(fused_dir, tmp_path, rows):
    """A run that was stopped after some rows."""

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(KeyboardInterrupt):
        run_batch(fused_dir, source, tmp_path / "out.jsonl", TRANSFORMERS, Workers(0, 2), advance=stop)
    return source, tmp_path / "out.jsonl"


def test_an_earlier_run_and_an_earlier_output_are_left_alone_unless_something_is_asked(fused_dir, tmp_path, capsys):
    source, target = stopped(fused_dir, tmp_path, rows_of(4))
    assert batch(fused_dir, source, target) == 2
    assert "pass --resume to go on with it, or --force to start anew" in capsys.readouterr().err
    assert batch(fused_dir, source, target, "--force") == 0
    assert batch(fused_dir, source, target) == 2
    assert "Fix: pass --force, or another path." in capsys.readouterr().err
    assert batch(fused_dir, source, target, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["result"]["computed"] == 0
    assert batch(fused_dir, source, target, "--resume", "--force") == 2


def test_a_strategy_of_the_command_is_as_that_of_a_directory(fused_dir, tmp_path):
    """--strategy, --set and --NAME VALUE replace what the directory says, and nothing else."""
    source = write_rows(tmp_path / "in.jsonl", rows_of(4))
    other = fused_dir.parent / "static"  # beside it, since members are named relative to the directory
    shutil.copytree(fused_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["strategy"] = {"amount": "static", "chooser": "sum", "settings": {"alpha": 9.0}}
    (other / "config.json").write_text(json.dumps(config))
    words = {"set": ["--set", "alpha=9"], "flag": ["--alpha", "9"]}
    for name, setting in words.items():
        assert batch(fused_dir, source, tmp_path / name, "--strategy", "static", "--chooser", "sum", *setting) == 0
    run_batch(other, source, tmp_path / "theirs", TRANSFORMERS, HERE)
    run_batch(fused_dir, source, tmp_path / "plain", TRANSFORMERS, HERE)
    written = {name: [texts(row) for row in read_rows(tmp_path / name)] for name in (*words, "theirs", "plain")}
    assert written["set"] == written["flag"] == written["theirs"] != written["plain"]


def test_a_wrong_strategy_is_refused_before_anything_is_written(fused_dir, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", rows_of(2))
    assert batch(fused_dir, source, tmp_path / "out.jsonl", "--set", "alpha_mx=1") == 2
    assert "did you mean 'alpha_max'?" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("what", ["input", "dtype", "strategy", "model"])
@pytest.mark.parametrize("is_finished", [False, True])
def test_another_input_model_or_setting_is_not_gone_on_with(fused_dir, tmp_path, what, is_finished):
    source, target = stopped(fused_dir, tmp_path, rows_of(4))
    if is_finished:
        run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    settings, directory = TRANSFORMERS, fused_dir
    if what == "input":
        write_rows(source, [*rows_of(3), complete("row-3", "another prompt")])
    elif what == "dtype":
        settings = Settings("transformers", dtype="bfloat16")
    elif what == "strategy":
        settings = Settings("transformers", strategy={"amount": "static"})
    else:
        directory = fused_dir.parent / "other"
        subprocess.run(["cp", "-r", fused_dir, directory], check=True)
        config = json.loads((directory / "config.json").read_text())
        config["strategy"] = {"amount": "static", "chooser": "sum", "settings": {"alpha": 0.5}}
        (directory / "config.json").write_text(json.dumps(config))
    says = "not the output of this input, model and settings" if is_finished else f"another run: {what} was"
    with pytest.raises(InputError, match=says):
        run_batch(directory, source, target, settings, HERE, mode="resume")


def test_names_that_depend_on_the_working_directory_are_not_gone_on_with_in_another(fused_dir, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "facts").symlink_to(fused_dir)
    monkeypatch.chdir(tmp_path)
    rows = [*rows_of(3), complete("named", "1+1", model="runs/facts", max_tokens=4)]
    source, target = stopped("runs/facts", tmp_path, rows)
    monkeypatch.chdir("runs")
    with pytest.raises(InputError, match=r"unknown models was None, is \['runs/facts'\]"):
        run_batch("facts", source, target, TRANSFORMERS, HERE, mode="resume")
    monkeypatch.chdir(tmp_path)
    assert run_batch("runs/facts", source, target, TRANSFORMERS, HERE, mode="resume").failed == 0
    assert [row["response"]["body"]["model"] for row in read_rows(target)] == [*["fused"] * 3, "runs/facts"]


def test_rows_without_such_names_are_gone_on_with_from_anywhere_and_paths_may_be_texts(
    fused_dir, tmp_path, monkeypatch
):
    rows = [*rows_of(3), complete("named", "1+1", model="fused", max_tokens=4), complete("odd", "1", model=["fused"])]
    monkeypatch.chdir(fused_dir.parent)
    source, target = stopped("fused", tmp_path, rows)
    monkeypatch.chdir(tmp_path)
    summary = run_batch(str(fused_dir), source.name, target.name, TRANSFORMERS, HERE, mode="resume")
    assert (summary.kept, summary.failed) == (2, 1)
    answers = read_rows(target)
    assert {row["response"]["body"]["model"] for row in answers[:4]} == {"fused"}
    assert 'model is ["fused"]' in answers[4]["error"]["error"]["message"]


def test_the_same_rows_in_another_order_are_the_same_input(fused_dir, tmp_path):
    source, target = stopped(fused_dir, tmp_path, rows_of(4))
    write_rows(source, rows_of(4)[::-1])
    assert run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume").kept == 2
    assert [row["custom_id"] for row in read_rows(target)] == ["row-3", "row-2", "row-1", "row-0"]


def test_a_torn_journal_is_mended_and_told_of(fused_dir, tmp_path):
    source, target = stopped(fused_dir, tmp_path, rows_of(4))
    journal = tmp_path / "out.jsonl.part"
    journal.write_bytes(journal.read_bytes()[:-9])
    summary = run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    assert (summary.dropped, summary.kept, summary.computed) == (1, 1, 3)
    assert len(read_rows(target)) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--engine-option", "max_num_seqs=4"), "max_num_seqs: these are vLLM's options"),
        (("--engine-option", "max_num_seqs"), "Expected: NAME=VALUE"),
        (("--address", "auto"), "are for workers on Ray"),
        (("--device", "nowhere"), "nowhere"),
    ],
)
def test_settings_without_effect_are_refused(fused_dir, tmp_path, capsys, words, says):
    source = write_rows(tmp_path / "in.jsonl", rows_of(1))
    assert batch(fused_dir, source, tmp_path / "out.jsonl", *words) != 0
    assert says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_wrong_engines_directories_and_files_are_refused_before_anything_is_written(fused_dir, tmp_path):
    source, target = write_rows(tmp_path / "in.jsonl", rows_of(1)), tmp_path / "out.jsonl"
    with pytest.raises(UnknownName, match="no engine 'vlm'"):
        run_batch(fused_dir, source, target, Settings("vlm"), HERE)
    with pytest.raises(InputError, match="no fused directory"):
        run_batch(tmp_path, source, target, TRANSFORMERS, HERE)
    with pytest.raises(InputError, match="is the input"):
        run_batch(fused_dir, source, source, TRANSFORMERS, HERE)
    part = write_rows(tmp_path / "a.jsonl.part", rows_of(1))
    with pytest.raises(InputError, match=r"a\.jsonl\.part is the input"):
        run_batch(fused_dir, part, tmp_path / "a.jsonl", TRANSFORMERS, HERE, mode="force")
    assert len(read_rows(part)) == 1
    part.unlink()
    with pytest.raises(InputError, match="is a directory"):
        run_batch(fused_dir, source, tmp_path, TRANSFORMERS, HERE)
    with pytest.raises(InputError, match="both have the custom_id"):
        run_batch(fused_dir, write_rows(tmp_path / "two.jsonl", rows_of(1) * 2), target, TRANSFORMERS, HERE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "two.jsonl"]


def test_where_ray_or_vllm_is_missing_the_message_says_what_to_install(fused_dir, tmp_path):
    """In the plain environment neither is installed; with a path of this package alone, nowhere."""
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name in ('ray', 'vllm') else real(name, *more)\n"
        "from trimtab.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    source = write_rows(tmp_path / "in.jsonl", rows_of(1))
    words = [sys.executable, "-c", code, "batch", fused_dir, source, tmp_path / "out.jsonl"]
    for more, says in {(): "trimtab[batch]", ("--engine", "vllm"): "trimtab[vllm]"}.items():
        ran = subprocess.run([*map(str, words), *more], capture_output=True, text=True)
        assert ran.returncode == 2
        assert says in ran.stderr
        assert not (tmp_path / "out.jsonl.part").exists()


def test_an_empty_output_is_nothing_to_go_on_with(fused_dir, tmp_path, capsys):
    source, target = write_rows(tmp_path / "in.jsonl", rows_of(1)), tmp_path / "out.jsonl"
    target.touch()
    assert batch(fused_dir, source, target, "--resume") == 2
    assert "is not the output of this input, model and settings" in capsys.readouterr().err
    assert target.read_bytes() == b""


def test_an_output_in_no_directory_is_an_error_of_the_input(fused_dir, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", rows_of(1))
    assert batch(fused_dir, source, source / "out.jsonl") == 2
    assert f"the directory {source} cannot be made: File exists" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_loses_no_row(fused_dir, tmp_path, capsys, monkeypatch):
    source, target = write_rows(tmp_path / "in.jsonl", rows_of(2)), tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        assert batch(fused_dir, source, target) == 1
    said = capsys.readouterr().err
    assert f"{target} cannot be written: No space left on device" in said
    assert f"All rows are finished, and kept in {target}.part" in said
    assert not target.exists()
    summary = run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume")
    assert (summary.kept, summary.computed) == (2, 0)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError("the disk is gone"), "the disk is gone"),
        (json.JSONDecodeError("no value", "", 0), "a line is no finished row any more"),
        (KeyError("id"), "a line is no finished row any more"),
        (TypeError("no object"), "a line is no finished row any more"),
    ],
)
def test_rows_that_cannot_be_read_back_are_told_apart_from_the_output(
    fused_dir, tmp_path, capsys, monkeypatch, error, why
):
    def broken(*_):
        raise error

    source, target = write_rows(tmp_path / "in.jsonl", rows_of(2)), tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("trimtab.batch.rows.Outcome.from_line", broken)
        assert batch(fused_dir, source, target) == 1
    assert f"{target}.part cannot be read back: {why}." in capsys.readouterr().err
    assert not target.exists()
    assert run_batch(fused_dir, source, target, TRANSFORMERS, HERE, mode="resume").kept == 2


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
