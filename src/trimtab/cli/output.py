"""What commands print: the result and only it on stdout, everything else on stderr."""

import contextlib
import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import InputError
from trimtab.measure.pages import finite
from trimtab.measure.stamps import versions


def document(
    result: Any, settings: Mapping[str, Any] | None = None, seed: int | None = None, *more_packages: str
) -> dict[str, Any]:
    """The one JSON document of a command."""
    return {"result": result, "settings": dict(settings or {}), "seed": seed, "versions": versions(*more_packages)}


def add_common(parser: ArgumentParser) -> None:
    """What every command has."""
    taken = parser._option_string_actions
    if "--json" not in taken:
        parser.add_argument("--json", action="store_true", help="print one JSON document: result, settings, versions")
    if "--debug" not in taken:
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def emit(as_json: bool, content: Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print the document, or show it to a human."""
    if as_json:
        print(json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show()


def console() -> Any:
    """A rich console for stdout; on a pipe it keeps tables whole instead of folding them at 80 columns."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def show(parts: Sequence[Any]) -> None:
    """Tables and lines of text, in order."""
    from trimtab.measure.tables import Grid, terminal

    for part in parts:
        if isinstance(part, Grid):
            console().print(terminal(part))
        else:
            print(part)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, only on a terminal: call with what is being done, how much is done, and how much there is."""
    if not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda text, done, total: bars.update(bar, description=text, completed=done, total=total)


def claim(path: Path, force: bool) -> Path:
    """A file that may be written, where the path ends as pages and their data do; else a folder."""
    return (claim_file if path.suffix in (".md", ".html", ".json") else claim_folder)(path, force)


def claim_file(path: Path, force: bool) -> Path:
    """A file that may be written: its folder exists, and nothing is overwritten without --force."""
    if path.is_dir():
        raise InputError(f"{path} is a directory.", "Expected: a file to write.", "name a file in it.")
    if path.exists() and not force:
        raise InputError(f"{path} exists.", "Nothing is overwritten unasked.", "pass --force, or another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_folder(path: Path, force: bool) -> Path:
    """A folder that may be written: new or empty, or --force. It is not made, so that a failure leaves nothing."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file.", "Expected: a folder to write.", "pass another path.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise InputError(f"{path} is not empty.", "Nothing is overwritten unasked.", "pass --force, or another path.")
    return path


def claim_folder(path: Path, force: bool) -> Path:
    """A folder that may be written, as `check_folder`, and made."""
    check_folder(path, force)
    path.mkdir(parents=True, exist_ok=True)
    return path
