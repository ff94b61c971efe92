"""Rows on Ray Data: `map_batches` over actors, each of which holds a worker. Ray starts an actor that died again and
gives it its rows once more.

Rows whose actor died each time are tried one by one at the end, so that a row that kills its worker fails alone.
On one machine Ray is started for the run, reachable from this machine only, and stopped after it.
"""

import contextlib
import io
import json
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any

from trimtab.batch.rows import BrokenWorker, Finished, MakeWorker, Outcome, Row, RowError, answered, as_json, batches
from trimtab.core.errors import InputError, TrimtabError, last_line
from trimtab.core.stderr import captured_stderr

TRIES = 2  # of a batch, and again of each of its rows alone
RESTARTS = 100  # of one worker: one that dies while it is made would otherwise be made for ever
MOST_DEADLY = RESTARTS // TRIES // 2  # rows: if more kill their workers, something else does
CONNECTED_WITHIN = 10.0  # seconds
MADE = "made"  # what a worker says to a table without rows
# Read by Ray when it is imported. The second one lets its servers listen on this machine alone, on Linux too.
LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


@dataclass(frozen=True)
class OnRay:
    """Runs rows on Ray.

    workers      processes, each with a worker of its own
    batch_size   rows that a worker is given at once
    address      of a running cluster; None: Ray is started on this machine, or the caller's is used
    cpus         per worker; None: an equal share of this machine, on a cluster 1
    gpus         per worker
    """

    workers: int = 1
    batch_size: int = 16
    address: str | None = None
    cpus: float | None = None
    gpus: float = 0.0

    def __call__(self, rows: Sequence[Row], make_worker: MakeWorker) -> Finished:
        """Outcomes by batch, as they are finished.

        raises    TrimtabError where no worker can be made, and where more than MOST_DEADLY rows are left over
        """
        left = {row.id: row for row in rows}
        is_made = False
        with _ray(self):
            for batch_size in (self.batch_size, 1):
                for outcomes in self._outcomes(list(left.values()), batch_size, make_worker):
                    is_made = True
                    for outcome in outcomes:
                        del left[outcome.id]
                    if outcomes:
                        yield outcomes
                if not left:
                    return
        if not is_made or len(left) > MOST_DEADLY:
            raise TrimtabError(
                f"{len(left)} rows are left, and the workers die "
                + ("whatever row they are given." if is_made else "while they are made."),
                "Memory that is full does this.",
                "take fewer workers or smaller batches, and run again with --resume: what was finished is kept.",
            )
        died = RowError("WorkerDied", "the worker died each time it was given this row, also alone.")
        yield [Outcome(row_id, error=died) for row_id in left]

    def _outcomes(self, rows: list[Row], batch_size: int, make_worker: MakeWorker) -> Finished:
        import pyarrow
        import ray.data

        # The first one has no rows: who answers it shows that workers can be made.
        tables = [pyarrow.table({"row": [""]})] + [
            pyarrow.table({"row": [as_json([row.id, row.content]) for row in batch]})
            for batch in batches(rows, batch_size)
        ]
        pool = ray.data.ActorPoolStrategy(
            size=min(self.workers, max(1, len(tables) - 1)),
            # A row alone shall not lose its tries to a neighbour that waits behind it and kills the worker.
            max_tasks_in_flight_per_actor=1 if batch_size == 1 else 2,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray before 2.64 takes restarts and retries in this form only
            dataset = ray.data.from_arrow(tables).map_batches(
                _Actor,
                fn_constructor_args=(make_worker,),
                batch_size=None,
                batch_format="pyarrow",
                compute=pool,
                num_cpus=self._cpus,
                num_gpus=self.gpus,
                max_restarts=RESTARTS,
                max_task_retries=TRIES - 1,
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            lines = batch.column("outcome").to_pylist()
            if lines:
                yield [_outcome(line) for line in lines if line != MADE]

    @property
    def _cpus(self) -> float:
        if self.cpus is not None:
            return self.cpus
        return 1.0 if self.address else float(max(1, cpu_count() // self.workers))


class _Actor:
    """A worker in a process of its own. One that cannot be made says so with its first rows."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._refusal: str | None = None
        try:
            self._worker = make_worker()
        except TrimtabError as error:
            self._refusal = str(error)
        except Exception as error:
            self._refusal = f"{type(error).__name__}: {error}"

    def __call__(self, table: Any) -> Any:
        import pyarrow

        if self._refusal is not None:
            return pyarrow.table({"outcome": [as_json({"refusal": self._refusal})]})
        texts = table.column("row").to_pylist()
        if texts == [""]:
            return pyarrow.table({"outcome": [MADE]})
        rows = [Row(*json.loads(text)) for text in texts]
        try:
            outcomes = answered(self._worker, rows)
        except BrokenWorker as error:
            sys.stderr.write(f"{error}\n")  # into Ray's log of this worker
            sys.stderr.flush()
            os._exit(1)  # Ray makes another process
        except Exception as error:  # would be taken for the death of this process: nobody reads Ray's log of it
            said = str(error) if isinstance(error, TrimtabError) else f"{type(error).__name__}: {error}"
            return pyarrow.table({"outcome": [as_json({"failure": said})]})
        return pyarrow.table({"outcome": [outcome.to_line() for outcome in outcomes]})


def _outcome(line: str) -> Outcome:
    if line.startswith('{"refusal":'):
        raise TrimtabError(
            f"no worker can be made: {json.loads(line)['refusal']}",
            fix="mend that, then run again with --resume; --workers 0 shows it without Ray.",
        )
    if line.startswith('{"failure":'):
        raise TrimtabError(json.loads(line)["failure"])
    return Outcome.from_line(line)


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_installed() -> None:
    """Raises InputError where Ray Data is not installed."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise InputError(
            "Ray is not installed.",
            "Batches run on Ray Data.",
            "pip install 'trimtab[batch]', or pass --workers 0 to run in this process.",
        )


@contextlib.contextmanager
def _ray(asked: OnRay) -> Iterator[None]:
    """Ray, started or connected to; what it says goes to stderr, shortened."""
    check_installed()
    if not asked.address:
        os.environ.update({name: value for name, value in LOCAL.items() if name not in os.environ})
    with contextlib.redirect_stdout(_RayWords(sys.stderr)):
        import ray
        import ray.data

        is_ours = not ray.is_initialized()
        if is_ours:
            _start(ray, asked)
        context = ray.data.DataContext.get_current()
        before = context.enable_progress_bars, context.max_errored_blocks
        # Blocks whose actor died are seen by the rows that lack: they are tried again one by one.
        context.enable_progress_bars, context.max_errored_blocks = False, -1
        logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
        try:
            yield
        except ray.exceptions.RayError as error:
            raise TrimtabError(
                f"Ray gave up: {last_line(error)}",
                "What was finished is kept.",
                "run again with --resume; Ray's logs lie in /tmp/ray/session_latest/logs.",
            ) from error
        finally:
            context.enable_progress_bars, context.max_errored_blocks = before
            if is_ours:
                ray.shutdown()


def _check_address(address: str) -> None:
    """Raises TrimtabError if no server listens at HOST:PORT: Ray itself would try for many minutes, in silence."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", say: Ray looks for the address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTED_WITHIN).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last for names that are none
        raise TrimtabError(
            f"the cluster at {address} cannot be reached: {error}.",
            "It is HOST:PORT as `ray start --head` prints it.",
            "check --address.",
        ) from error


def _start(ray: Any, asked: OnRay) -> None:
    if asked.address:
        _check_address(asked.address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with captured_stderr():  # Ray's native code says there that its log level was set
            if asked.address:
                ray.init(address=asked.address, **quiet)
            else:
                # One processor more than the workers take, for what Ray Data does beside them.
                num_cpus = ceil(asked.workers * asked._cpus) + 1
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at {asked.address} cannot be reached" if asked.address else "Ray cannot be started"
        raise TrimtabError(
            f"{where}: {last_line(error)}",
            fix="check --address, and set RAY_AUTH_MODE=token where the cluster asks for its token."
            if asked.address
            else "run with --workers 0, or see /tmp/ray/session_latest/logs.",
        ) from error


class _RayWords(io.TextIOBase):
    """Ray tells of dead workers on stdout, which belongs to results, at length. Here one sentence goes to stderr."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        said = re.search(r"A worker died or was killed[^.]*", text)
        if said:
            self._target.write(f"warning: {said.group()}; it is started again, and its rows are done again.\n")
        return len(text)
