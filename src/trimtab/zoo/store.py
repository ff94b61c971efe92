"""Where the zoo's files lie, what `zoo:NAME` means, and whether the files are what was built.

`TRIMTAB_ZOO=DIR` points to another world made by `trimtab zoo build -o DIR`; without it the shipped one is used.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from trimtab.core.errors import UnreadableModel, unknown_name

PREFIX = "zoo:"
MANIFEST = "manifest.json"


def root() -> Path:
    """The folder of the zoo in use."""
    chosen = os.environ.get("TRIMTAB_ZOO")
    return Path(chosen) if chosen else Path(str(files("trimtab.zoo"))) / "data"


def model_path(name: str, folder: Path | None = None) -> Path:
    """Where model `name` lies: `small` is the base of its size, `small/facts` a model made from it."""
    size, _, tuned = name.partition("/")
    return (folder or root()) / "models" / size / (tuned or "base")


def read_manifest(folder: Path | None = None) -> dict[str, Any]:
    """What was built: world, models, recipes, and a sha256 per file."""
    path = (folder or root()) / MANIFEST
    if not path.exists():
        raise UnreadableModel(
            f"there is no zoo in {path.parent}.",
            f"A zoo has a {MANIFEST}.",
            "`trimtab zoo build -o DIR` makes one; unset TRIMTAB_ZOO for the shipped one.",
        )
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def names() -> list[str]:
    """Every name that may stand behind `zoo:`."""
    return [*read_manifest()["models"], "tokenizer"]


def resolve(reference: str) -> Path:
    """The directory of `zoo:NAME` (the prefix may be left out): a model, a PEFT adapter, or the tokenizer."""
    name = reference.removeprefix(PREFIX)
    if name == "tokenizer":
        return root() / "tokenizer"
    path = model_path(name)
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise unknown_name("zoo member", name, names())
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class FileCheck:
    """One file of the zoo: size in bytes and whether its checksum is the manifest's."""

    path: str
    size_bytes: int
    is_intact: bool


def check_files(folder: Path | None = None) -> list[FileCheck]:
    """Every file of the manifest, compared with its checksum."""
    place = folder or root()
    checks = []
    for name, digest in read_manifest(place)["files"].items():
        path = place / name
        checks.append(
            FileCheck(name, path.stat().st_size if path.exists() else 0, path.exists() and sha256(path) == digest)
        )
    return checks
