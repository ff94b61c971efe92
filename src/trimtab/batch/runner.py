"""The runner: every row is answered once, and what is finished stays finished.

journal = open_journal(Path("labels.part"), about(rows, {"labeller": "v2"}), mode="resume")
run(rows, make_labeller, journal, execute=OnRay(workers=4))
for outcome in journal.outcomes([row.id for row in rows]): ...
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from trimtab.batch.journal import Journal
from trimtab.batch.rows import Execute, Finished, MakeWorker, Row, answered, batches, check_unique
from trimtab.core.errors import InputError


@dataclass(frozen=True)
class Counts:
    """How many rows there are, how many were finished before, and how many of those of now failed."""

    rows: int
    kept: int
    computed: int
    failed: int


@dataclass(frozen=True)
class InProcess:
    """Rows one batch after the other, in this process: the slow obvious executor."""

    batch_size: int = 16

    def __call__(self, rows: Sequence[Row], make_worker: MakeWorker) -> Finished:
        worker = make_worker()
        for batch in batches(rows, self.batch_size):
            yield answered(worker, batch)


def about(rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, for its journal: the rows (by ids and contents, in any order) and the settings."""
    lines = sorted(f"{row.digest} {row.id}" for row in rows)
    total = hashlib.sha256("\n".join(lines).encode(errors="surrogatepass"))
    return {"input": f"{len(rows)} rows, sha256 {total.hexdigest()}", **settings}


def run(
    rows: Sequence[Row],
    make_worker: MakeWorker,
    journal: Journal,
    execute: Execute | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Answers the rows that the journal does not hold yet.

    make_worker   makes the worker of one process; it must be picklable where rows run in other processes
    execute       where the rows run; None: in this process
    advance       called with how many rows are finished, and how many there are
    raises        InputError for ids that are not unique or a journal that holds other rows; what `execute` raises
    """
    ids = {row.id for row in rows}
    check_unique(row.id for row in rows)
    strange = next((row_id for row_id in journal.done if row_id not in ids), None)
    if strange is not None:
        raise InputError(
            f"{journal.path} holds row {strange!r}, which is not among the rows.",
            "A journal belongs to one set of rows.",
            "pass the rows that it was started with, or another journal.",
        )
    left = [row for row in rows if row.id not in journal.done]
    kept, num_failed = len(journal.done), 0
    advance(kept, len(rows))
    if left:
        with closing((execute or InProcess())(left, make_worker)) as finished:
            for outcomes in finished:
                journal.append(outcomes)
                num_failed += sum(outcome.error is not None for outcome in outcomes)
                advance(len(journal.done), len(rows))
    journal.sync()
    assert len(journal.done) == len(rows), "an executor left rows out"
    return Counts(len(rows), kept, len(left), num_failed)
