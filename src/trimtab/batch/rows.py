"""Rows in, one outcome per row out: what workers and executors of `run` are made of. Nothing here knows models or Ray.

A worker is called with the contents of some rows and returns one JSON value per row, in their order; an exception in
place of a value fails that row alone. An exception that it raises is tried again row by row.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from trimtab.core.errors import InputError, TrimtabError


@dataclass(frozen=True)
class Row:
    """One piece of work.

    id        unique in a run
    content   what the worker is given: anything that JSON can hold
    """

    id: str
    content: Any

    @property
    def digest(self) -> str:
        """A fingerprint of the content; the order of keys does not matter."""
        return hashlib.sha256(as_json(self.content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class RowError:
    """Why a row has no value.

    kind       name of the exception's class
    is_input   whether the row itself is at fault
    """

    kind: str
    message: str
    is_input: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a row: a JSON value, or an error."""

    id: str
    value: Any = None
    error: RowError | None = None

    def to_line(self) -> str:
        """One line of JSON in ASCII; raises ValueError, TypeError or RecursionError for what JSON cannot hold."""
        content: dict[str, Any] = {"id": self.id, "value": self.value}
        if self.error is not None:
            content["error"] = vars(self.error)
        return as_json(content)

    @classmethod
    def from_line(cls, line: str | bytes) -> "Outcome":
        """The outcome that `to_line` wrote; raises ValueError, KeyError or TypeError for any other text."""
        content = json.loads(line)
        error = RowError(**content["error"]) if "error" in content else None
        if not isinstance(content["id"], str):
            raise TypeError("an id is a text")
        return cls(content["id"], content["value"], error)


@runtime_checkable
class Worker(Protocol):
    """Answers rows; made once per process, by a function without arguments."""

    def __call__(self, contents: Sequence[Any]) -> Sequence[Any]:
        """One JSON value, or an exception, per content."""
        ...


class BrokenWorker(TrimtabError):
    """A worker that cannot go on, raised by itself: another one must be made in a fresh process."""


MakeWorker = Callable[[], Worker]
Finished = Generator[list[Outcome], None, None]
# Runs all rows and yields outcomes, a batch at a time and in any order, as they are finished.
Execute = Callable[[Sequence[Row], MakeWorker], Finished]


def as_json(content: Any, sort_keys: bool = False) -> str:
    """Compact JSON in ASCII: lone surrogates survive, and NaN is refused."""
    return json.dumps(content, sort_keys=sort_keys, allow_nan=False, separators=(",", ":"))


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Consecutive rows, at most `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def answered(worker: Worker, rows: Sequence[Row]) -> list[Outcome]:
    """One outcome per row; a row whose answer raises fails alone.

    raises    BrokenWorker, as the worker raised it; TrimtabError where values and rows cannot be matched
    """
    try:
        values = list(worker([row.content for row in rows]))
    except BrokenWorker:
        raise
    except Exception as error:
        if len(rows) == 1:
            return [failed(rows[0].id, error)]
        return [outcome for row in rows for outcome in answered(worker, [row])]
    if len(values) != len(rows):
        raise TrimtabError(
            f"the worker gave {len(values)} values for {len(rows)} rows.",
            "Expected: one value, or an exception, per row, in their order.",
            "mend the worker.",
        )
    return [_outcome(row.id, value) for row, value in zip(rows, values, strict=True)]


def _outcome(row_id: str, value: Any) -> Outcome:
    if isinstance(value, Exception):
        return failed(row_id, value)
    outcome = Outcome(row_id, value)
    try:
        outcome.to_line()
    except (TypeError, ValueError, RecursionError) as error:
        return failed(row_id, error)
    return outcome


def failed(row_id: str, error: Exception) -> Outcome:
    """The outcome of a row whose answer raised this."""
    if isinstance(error, TrimtabError):
        return Outcome(row_id, error=RowError(type(error).__name__, str(error), isinstance(error, InputError)))
    where = traceback.extract_tb(error.__traceback__)[-1:]
    position = f" ({where[0].filename.rsplit('/', 1)[-1]}, line {where[0].lineno})" if where else ""
    return Outcome(row_id, error=RowError(type(error).__name__, f"{error}{position}"))


def check_unique(ids: Iterable[str]) -> None:
    """Raises InputError where two rows have one id."""
    seen: set[str] = set()
    for row_id in ids:
        if row_id in seen:
            raise InputError(f"two rows have the id {row_id!r}.", "Rows are told apart by their ids.", "rename one.")
        seen.add(row_id)
