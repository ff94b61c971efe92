"""Rows on real Ray: every row once, failures alone, killed workers made again, killed runs gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import labelling
import psutil
import pytest

from trimtab.batch.journal import open_journal
from trimtab.batch.on_ray import OnRay
from trimtab.batch.rows import Row
from trimtab.batch.runner import InProcess, about, run
from trimtab.core.errors import TrimtabError

SCRIPT = Path(labelling.__file__)


@pytest.fixture(scope="module")
def ray():
    """Ray as a caller may have it running already: batches use it, and leave it running."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def labelled(tmp_path, rows, execute, seconds=0.0):
    """Outcomes in the order of the rows, counts, and how often each number was computed."""
    log = tmp_path / f"log-{random.random()}"
    log.touch()
    with closing(open_journal(tmp_path / f"part-{random.random()}", about(rows, {}))) as journal:
        counts = run(rows, partial(labelling.Labelling, str(log), seconds), journal, execute)
        outcomes = list(journal.outcomes([row.id for row in rows]))
    return outcomes, counts, Counter(int(line.split()[0]) for line in log.read_text().splitlines())


def test_several_workers_give_what_one_process_gives_each_row_once(ray, tmp_path):
    rows = labelling.rows_of(41)
    plain, _, _ = labelled(tmp_path, rows, InProcess(4))
    outcomes, counts, computed = labelled(tmp_path, rows[::-1], OnRay(workers=2, batch_size=4, cpus=1.0))
    assert outcomes[::-1] == plain
    assert (counts.rows, counts.computed, counts.failed) == (41, 41, 0)
    assert computed == dict.fromkeys(range(41), 1)


def test_bad_rows_fail_alone_also_those_that_kill_their_worker(ray, tmp_path, capsys):
    rows = labelling.rows_of(20)
    rows[3] = Row("r3", {"number": 3, "do": "raises"})
    rows[8] = Row("r8", {"number": 8, "do": "dies"})
    rows[15] = Row("r15", {"number": 15, "do": "dies once", "mark": str(tmp_path / "mark")})
    outcomes, counts, computed = labelled(tmp_path, rows, OnRay(workers=2, batch_size=3, cpus=1.0))
    assert counts.failed == 2
    errors = {outcome.id: outcome.error for outcome in outcomes if outcome.error}
    assert {row_id: error.kind for row_id, error in errors.items()} == {"r3": "ZeroDivisionError", "r8": "WorkerDied"}
    values = {outcome.id: outcome.value for outcome in outcomes if not outcome.error}
    assert values == {f"r{number}": 2 * number for number in range(20) if number not in (3, 8)}
    said = capsys.readouterr()
    assert said.out == ""
    assert "warning: A worker died or was killed" in said.err
    assert all(count == 1 for count in computed.values())


def test_a_worker_that_errs_has_not_died_and_its_own_words_are_told(ray, tmp_path, capsys):
    rows = [*labelling.rows_of(2), Row("r2", {"number": 2, "do": "missing"})]
    with pytest.raises(TrimtabError, match=r"^the worker gave 2 values for 3 rows"):
        labelled(tmp_path, rows, OnRay(workers=1, batch_size=3, cpus=1.0))
    assert "died" not in capsys.readouterr().err


def test_a_worker_that_is_killed_is_made_again_and_its_rows_are_done_again(ray, tmp_path):
    rows, log = labelling.rows_of(40), tmp_path / "log"
    log.touch()
    killed = []

    def kill_one(done, total):
        if done >= 6 and not killed:
            killed.append(int(log.read_text().splitlines()[-1].split()[1]))
            os.kill(killed[0], signal.SIGKILL)

    with closing(open_journal(tmp_path / "part", about(rows, {}))) as journal:
        counts = run(
            rows,
            partial(labelling.Labelling, str(log), 0.05),
            journal,
            OnRay(workers=2, batch_size=2, cpus=1.0),
            advance=kill_one,
        )
        assert [outcome.value for outcome in journal.outcomes([row.id for row in rows])] == list(range(0, 80, 2))
    assert counts.failed == 0
    pids = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert killed[0] in pids
    assert len(set(pids)) == 3


def test_a_worker_that_cannot_be_made_ends_the_run_with_its_own_words(ray, tmp_path):
    rows = labelling.rows_of(3)
    with (
        closing(open_journal(tmp_path / "part", about(rows, {}))) as journal,
        pytest.raises(TrimtabError, match=r"no worker can be made: the labeller is gone(.|\n)*bring it back"),
    ):
        run(rows, labelling.refuse, journal, OnRay(workers=2, cpus=1.0))


def started(folder, *words):
    """The script in a process group of its own."""
    words = [sys.executable, str(SCRIPT), str(folder), *map(str, words)]
    with open(folder / "said", "ab") as said:
        return subprocess.Popen(words, start_new_session=True, stdout=said, stderr=subprocess.STDOUT)


def finished(folder):
    """The rows of whole lines in the journal."""
    if not (folder / "part").exists():
        return set()
    return {json.loads(line)["id"] for line in (folder / "part").read_bytes().split(b"\n")[1:-1]}


def computed(folder):
    return (
        [int(line.split()[0]) for line in (folder / "log").read_text().splitlines()]
        if (folder / "log").exists()
        else []
    )


def children_of(process):
    with psutil.Process(process.pid).oneshot():
        return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.thorough
def test_killed_at_random_moments_it_goes_on_and_no_finished_row_is_done_again(tmp_path):
    moments, before = random.Random(11), set()
    for _ in range(3):
        already = len(computed(tmp_path))
        process = started(tmp_path, 120, 2)
        wanted = len(before) + moments.randrange(1, 25)
        deadline = time.monotonic() + 90
        while process.poll() is None and len(finished(tmp_path)) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.random() * 0.1)
        assert process.poll() is None, (tmp_path / "said").read_text()
        family = children_of(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, f"{alive} outlived the run"
        now = finished(tmp_path)
        assert before < now
        assert not before & {f"r{number}" for number in computed(tmp_path)[already:]}
        before = now
    already = len(computed(tmp_path))
    assert started(tmp_path, 120, 2).wait() == 0
    assert not before & {f"r{number}" for number in computed(tmp_path)[already:]}
    outcomes = json.loads((tmp_path / "done").read_text())
    assert [outcome["value"] for outcome in outcomes] == list(range(0, 240, 2))
    lines = (tmp_path / "part").read_bytes().split(b"\n")[1:-1]
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == 120
    # A row may be computed again only where a kill came before it was written down: at most what was under way.
    twice = [number for number, count in Counter(computed(tmp_path)).items() if count > 1]
    assert len(twice) <= 3 * 2 * 3 * 2, "kills times workers times batches under way times rows"
    counts = json.loads((tmp_path / "said").read_text().strip().splitlines()[-1])
    assert counts["kept"] == len(before)


def test_ray_that_a_run_starts_listens_on_this_machine_alone_and_is_gone_afterwards(tmp_path):
    process = started(tmp_path, 60, 2, 0.1)
    while len(finished(tmp_path)) < 4:
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    family = [psutil.Process(process.pid), *children_of(process)]
    heard = [c.laddr for child in family for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(heard) > 3
    assert {address.ip.removeprefix("::ffff:") for address in heard} <= {"127.0.0.1", "::1"}
    assert 8265 not in {address.port for address in heard}, "the dashboard"
    assert any("raylet" in child.name() for child in family)
    assert process.wait() == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert (tmp_path / "said").read_text().strip().splitlines()[-1].startswith("{")


def test_the_example_of_the_page_runs(ray, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")
    example = next(block for block in page.split("```python\n")[1:] if "OnRay" in block).split("```")[0]
    exec(compile(example, "docs/batch.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "[3, 5]\n"
    assert list(tmp_path.iterdir()) == []
