"""Request files in, result files out: JSONL, gzip-compressed or not, and never a half-written output."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.batch.requests import URLS, read_request
from trimtab.batch.rows import Row, RowError
from trimtab.core.errors import BadSetting, InputError
from trimtab.core.files import whole_file

GZIP_MAGIC = b"\x1f\x8b"
OUTER = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """One line of the input that is not blank.

    number      counted from 1
    custom_id   None where the line does not tell
    row         what to do; None where the line cannot be used, for the reason in `error`
    """

    number: int
    custom_id: str | None
    row: Row | None = None
    error: RowError | None = None


def read_lines(path: Path, engine: str, without: Iterable[str]) -> list[Line]:
    """All lines of a request file. A line that cannot be used says why and fails alone.

    engine, without   which engine the requests are for, and what it cannot follow; see `read_request`
    raises            InputError for a file that cannot be read or is empty, or where two lines have one custom_id
    """
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(_raw_lines(path), start=1):
        if not raw.strip():
            continue
        line = _read_line(number, raw, engine, tuple(without))
        if line.custom_id is not None:
            if line.custom_id in seen:
                raise InputError(
                    f"{path}, lines {seen[line.custom_id]} and {number}: both have the custom_id "
                    f"{json.dumps(line.custom_id)}.",
                    "Rows are told apart by their custom_id.",
                    "give each row one of its own.",
                )
            seen[line.custom_id] = number
        lines.append(line)
    if not lines:
        raise InputError(f"{path} holds no rows.", "Expected: one request per line.", "add some.")
    return lines


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            is_zipped = file.read(2) == GZIP_MAGIC
            file.seek(0)
            yield from gzip.GzipFile(fileobj=file) if is_zipped else file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", "Expected: a file of one request per line.", "correct the path."
        ) from error


def _read_line(number: int, raw: bytes, engine: str, without: tuple[str, ...]) -> Line:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        content = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        return Line(number, None, error=_bad(number, f"this is no JSON: {error}"))
    if not isinstance(content, dict):
        return Line(number, None, error=_bad(number, f"a request is an object, this is a {type(content).__name__}"))
    given = content.get("custom_id")
    custom_id = given if isinstance(given, str) and given else None
    try:
        _check_outer(content, custom_id)
        asked = {"url": content["url"], "body": content["body"]}
        read_request(asked, without, engine)
    except BadSetting as error:
        return Line(number, custom_id, error=_bad(number, str(error), "BadSetting"))
    assert custom_id is not None
    return Line(number, custom_id, Row(custom_id, asked))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    """A number as the line writes it; 1e999 would be read as infinity, which no line of JSON can hold."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number can be")
    return value


def _bad(number: int, message: str, kind: str = "BadLine") -> RowError:
    return RowError(kind, f"line {number}: {message}", is_input=True)


def _check_outer(content: dict[str, Any], custom_id: str | None) -> None:
    unknown = [name for name in content if name not in OUTER]
    if unknown:
        raise BadSetting(f"a request has no field {unknown[0]!r}.", f"Known: {', '.join(OUTER)}.", "leave it out.")
    if custom_id is None:
        raise BadSetting(
            f"custom_id is {json.dumps(content.get('custom_id'))}.", "Expected: a text of its own.", "add one."
        )
    if content.get("method") != "POST":
        raise BadSetting(f"method is {json.dumps(content.get('method'))}.", "Expected: POST.", "correct it.")
    if content.get("url") not in URLS:
        raise BadSetting(f"url is {json.dumps(content.get('url'))}.", f"Known: {', '.join(URLS)}.", "correct it.")
    if not isinstance(content.get("body"), dict):
        raise BadSetting("body is no object.", "Expected: the fields of the request.", "correct it.")


def encode_line(record: Any) -> bytes:
    """One line of JSON, in UTF-8 where that can hold it."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which a request may bring along in its custom_id
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a result file, or of any JSONL file; raises InputError where it cannot be read."""
    for number, raw in enumerate(_raw_lines(path), start=1):
        try:
            record = json.loads(raw)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is no record.", fix="move the file away, or pass --force.")
        yield record


@contextmanager
def result_file(path: Path) -> Iterator[BinaryIO]:
    """A result file to write into, see `whole_file`; compressed where its name ends in .gz."""
    with whole_file(path) as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as zipped:
                yield zipped  # type: ignore[misc]
        else:
            yield file
