"""Files that are there whole, or as they were."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """A file, texts in UTF-8, written beside and then renamed: no reader sees half of it, and a failure loses nothing.

    A link stays one: what it points to is written.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
