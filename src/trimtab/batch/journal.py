"""Finished rows on disk: an append-only file beside the output, one line per row, that survives kill -9.

The first line says what the run is; a run can be resumed only if it is the same. A last line that a crash tore
is dropped: its row is done again. The file is locked while a run writes it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from trimtab.batch.rows import Outcome, as_json
from trimtab.core.errors import InputError, TrimtabError

FORMAT = 1
START = b'{"trimtab_batch":'  # of every journal
SYNC_SECONDS = 1.0  # what a power cut may take; a killed process loses nothing that was written

Mode = Literal["new", "resume", "force"]


@dataclass
class Journal:
    """The finished rows of one run; make one with `open_journal`.

    dropped   lines that were no finished row: torn by a crash
    """

    path: Path
    dropped: int = 0
    _file: FileIO = field(repr=False, kw_only=True)
    _offsets: dict[str, int] = field(default_factory=dict, repr=False)  # id -> where its line starts
    _end: int = 0
    _synced: float = 0.0

    @property
    def done(self) -> Mapping[str, int]:
        """The ids of finished rows, in the order in which they were finished."""
        return self._offsets

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Writes finished rows; they are safe from kill -9 when this returns, from a power cut a second later.

        raises    TrimtabError when the disk takes no more
        """
        offsets, end, lines = {}, self._end, []
        for outcome in outcomes:
            assert outcome.id not in self._offsets, f"row {outcome.id!r} was finished twice"
            lines.append(outcome.to_line().encode() + b"\n")
            offsets[outcome.id] = end
            end += len(lines[-1])
        self._write(b"".join(lines))
        self._end = end
        self._offsets |= offsets
        if monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def outcomes(self, ids: Sequence[str]) -> Iterator[Outcome]:
        """The outcomes of these finished rows, in this order.

        raises    TrimtabError when the file has not kept them
        """
        offsets = [self._offsets[row_id] for row_id in ids]
        try:
            with self.path.open("rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    yield Outcome.from_line(file.readline())
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = (error.strerror or error) if isinstance(error, OSError) else "a line is no finished row any more"
            raise TrimtabError(
                f"{self.path} cannot be read back: {why}.",
                "All rows were finished, and written there.",
                "mend the disk where it failed, then run again with --resume: what can be read is kept.",
            ) from error

    def sync(self) -> None:
        """Waits until the disk has everything."""
        os.fsync(self._file.fileno())
        self._synced = monotonic()

    def close(self) -> None:
        """Syncs, and lets go of the lock."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def remove(self) -> None:
        """Deletes the file: what it held has been written elsewhere."""
        self.path.unlink()
        self._file.close()

    def _write(self, content: bytes) -> None:
        self._file.seek(self._end)
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise TrimtabError(
                f"{self.path} cannot be written: {error.strerror or error}.",
                "Finished rows are kept there.",
                "make room, then run again with --resume: what was finished is kept.",
            ) from error

    def _start(self, header: Mapping[str, Any]) -> None:
        line = as_json(header).encode() + b"\n"
        self._file.truncate(0)
        self._write(line)
        self._end = len(line)
        self.sync()

    def _go_on(self, header: Mapping[str, Any]) -> None:
        """Reads what is there; raises InputError where it is another run's."""
        with self.path.open("rb") as lines:
            first = lines.readline()
            begun = START[: len(first)]
            if not first.endswith(b"\n") and first.startswith(begun):  # killed before the first line was whole
                self.dropped = int(bool(first))
                self._start(header)
                return
            _check_same(self.path, _read_header(self.path, first), header)
            self._end = len(first)
            for line in lines:
                if not line.endswith(b"\n"):
                    self.dropped += 1
                    break
                self._index(line, self._end)
                self._end += len(line)
        self._file.truncate(self._end)

    def _index(self, line: bytes, offset: int) -> None:
        try:
            row_id = Outcome.from_line(line).id
        except (ValueError, KeyError, TypeError):
            self.dropped += 1
        else:
            self._offsets.setdefault(row_id, offset)


def open_journal(path: Path, about: Mapping[str, Any], mode: Mode = "new") -> Journal:
    """The journal of a run, locked.

    about     what the run is: a run is resumed only if all of it is the same
    mode      "new": there must be none yet; "resume": goes on with what is there, or starts one; "force": starts anew
    raises    InputError where there is one already, it is another run's, or another process writes it
    """
    header = json.loads(as_json({"trimtab_batch": FORMAT, **about}))  # as it will be read: lists for tuples
    file = _open_locked(path, mode)
    journal = Journal(path, _file=file)
    try:
        if mode == "resume":
            journal._go_on(header)
        else:
            journal._start(header)
    except BaseException:
        file.close()
        raise
    return journal


def _open_locked(path: Path, mode: Mode) -> FileIO:
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if mode == "new" else 0)
    try:
        file = FileIO(os.open(path, flags, 0o644), "r+")
    except FileExistsError as error:
        raise InputError(
            f"{path} exists: an earlier run was stopped before its end.",
            "Finished rows are not thrown away unasked.",
            "pass --resume to go on with it, or --force to start anew.",
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Finished rows are kept there.",
            "choose another output.",
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except BlockingIOError:
        is_there = False
    if not is_there:
        file.close()
        raise InputError(
            f"{path} is written by another run.", "One run at a time writes an output.", "wait, or choose another one."
        )
    return file


def _read_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("trimtab_batch") != FORMAT:
        raise InputError(
            f"{path} is no journal of this version of trimtab.",
            f"Expected: a first line with trimtab_batch {FORMAT}.",
            "move the file away, or pass --force to start anew in its place.",
        )
    return header


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(f"{name} was {_shown(found, name)}, is {_shown(wanted, name)}" for name in names)
        raise InputError(
            f"{path} belongs to another run: {differing}.",
            "A run is resumed only with the same input, model and settings.",
            "run with what it was started with, or pass --force to start anew.",
        )


def _shown(header: Mapping[str, Any], name: str) -> str:
    text = str(header.get(name))
    return text if len(text) <= 40 else f"{text[:19]}..."
