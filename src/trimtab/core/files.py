"""Files and directories that are there whole, or as they were."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, beside `path`; it takes that name when the block ends well and the disk has all of it.

    No reader sees half of it, and a failure loses nothing. A link stays one: what it points to is written.
    """
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole, texts in UTF-8; directories above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_directory(target: Path, replaced: Collection[str]) -> Iterator[Path]:
    """An empty directory beside `target` to write into; it takes the place of `target` when the block ends well.

    What else lies in an existing `target` stays there (as hard links, so nothing is copied), except the names in
    `replaced`: those belong to what is written anew. When the block or the swap fails, nothing has changed and nothing
    is left, parent directories included.

    target    a directory that may exist; a symbolic link to one is followed
    raises    OSError of the file system
    """
    target = target.resolve()
    made = _make_parents(target.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield beside
        if target.exists():
            _keep(target, beside, replaced)
            shutil.copymode(target, beside)
        else:
            beside.chmod(0o755)
        _put(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(beside, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    """Makes a directory and those above it; returns the ones that were not there, innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _keep(target: Path, beside: Path, replaced: Collection[str]) -> None:
    """Puts into `beside` what `target` holds beside the names that are replaced or written already."""
    for path in target.iterdir():
        new = beside / path.name
        if path.name in replaced or new.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new, symlinks=True, copy_function=_link)
        else:
            _link(path, new)


def _link(source: str | Path, new: str | Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(source, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, new, follow_symlinks=False)


def _put(beside: Path, target: Path) -> None:
    """Gives `beside` the name `target`; what was there before is called `beside` afterwards."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(beside, target)  # over nothing or an empty directory: one step
    elif not _exchange(beside, target):
        # Two steps, for want of one: a crash between them leaves the old directory under its hidden name.
        aside = beside.with_name(f"{beside.name}.old")
        os.replace(target, aside)
        try:
            os.replace(beside, target)
        except OSError:
            os.replace(aside, target)
            raise
        os.replace(aside, beside)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two directories change names in one step; False where the system cannot (it is Linux's renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return rename is not None and (
        rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0
    )
