"""Where a member lives: a directory, a `zoo:` name or a hub id, and a digest that tells whether it has changed."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.core.errors import MemberMismatch, OfflineError, UnreadableModel

ZOO = "zoo:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What a hub snapshot brings along: configurations, safetensors and tokenizer files. Pickles are never fetched.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WHOLE_BYTES = 64 * 2**20  # files up to this size are hashed whole
SAMPLES, SAMPLE_BYTES = 256, 4096  # larger ones: their size, and this many evenly spaced pieces


@dataclass(frozen=True)
class Reference:
    """A member as it is written down: `where` as given (path, hub id or zoo: name), a hub revision, a digest."""

    where: str
    revision: str | None = None
    digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`; unknown parts are left out."""
        parts = {"where": self.where, "revision": self.revision, "digest": self.digest}
        return {name: value for name, value in parts.items() if value is not None}

    @property
    def is_zoo(self) -> bool:
        """Whether it names an embedded model."""
        return self.where.startswith(ZOO)


def parse_reference(text: str | os.PathLike[str]) -> Reference:
    """A reference from what a user writes: a path, `zoo:NAME`, a hub id, or `id@revision`."""
    where = os.fspath(text)
    if where.startswith(ZOO) or Path(where).exists() or "@" not in where:
        return Reference(where)
    where, revision = where.rsplit("@", 1)
    return Reference(where, revision=revision)


def locate(reference: Reference, beside: Path | None = None) -> tuple[Reference, Path]:
    """The local directory of a reference, and the reference made definite: an absolute path, or a hub id with commit.

    beside    the directory that relative paths start from; None: the current one
    raises    UnreadableModel when there is no such directory or repository, OfflineError when the network is needed
    """
    if reference.is_zoo:
        from trimtab import zoo

        return reference, Path(zoo.resolve(reference.where))
    path = Path(reference.where).expanduser()
    if beside is not None:
        path = beside / path
    if path.is_dir():
        return replace(reference, where=str(path.resolve()), revision=None), path.resolve()
    if path.exists():
        raise UnreadableModel(
            f"'{path}' is a file.", "A model is a directory with config.json and safetensors.", "pass its directory."
        )
    if HUB_ID.fullmatch(reference.where) is None:
        raise UnreadableModel(
            f"there is no directory '{path}'.", "A model is a directory, a hub id or a zoo: name.", "correct the path."
        )
    snapshot = fetch(reference)
    return replace(reference, revision=snapshot.name), snapshot  # a snapshot's directory is named by its commit


def fetch(reference: Reference) -> Path:
    """The snapshot of a hub repository, from the local cache where it is already there."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(reference.where, revision=reference.revision, allow_patterns=HUB_FILES))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UnreadableModel(
            f"'{reference.where}' is neither a directory here nor a repository on the hub.",
            f"The hub says: {str(error).strip().splitlines()[-1]}",
            "correct the path, the id or the revision.",
        ) from error
    except OSError as error:  # the hub's own errors of missing network, cache and server are all among them
        raise OfflineError(
            f"'{reference.where}' is no directory here, and the hub cannot be asked.",
            "A hub id needs the network once; after that it is read from the local cache.",
            "correct the path, or unset HF_HUB_OFFLINE and try again with a network.",
        ) from error


def check_directory(directory: Path) -> None:
    """Refuses a directory that holds no configuration or no safetensors: pickled weights are never opened."""
    if not (directory / "config.json").is_file() and not is_adapter(directory):
        raise UnreadableModel(
            f"'{directory}' holds no config.json and no adapter_config.json.",
            "A model directory is what save_pretrained writes.",
            "pass the directory that holds those files.",
        )
    if weight_files(directory):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise UnreadableModel(
            f"'{directory}' holds pickled weights only ({', '.join(pickles[:3])}).",
            "Opening a pickle can run any code, so only safetensors are read.",
            "load them where you trust them and save with save_pretrained, which writes safetensors.",
        )
    raise UnreadableModel(
        f"'{directory}' holds no safetensors.", "Weights are model.safetensors or shards of it.", "copy them there."
    )


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds a PEFT adapter."""
    return (directory / "adapter_config.json").is_file()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory, or of an adapter directory, in the order of their names."""
    pattern = "adapter_model*.safetensors" if is_adapter(directory) else "*.safetensors"
    return sorted(directory.glob(pattern))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that users may have touched."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnreadableModel(f"'{file}' cannot be read: {error}.", fix="write the directory again.") from error
    if not isinstance(content, dict):
        raise UnreadableModel(f"'{file}' holds no JSON object.", fix="write the directory again.")
    return content


def digest(directory: Path) -> str:
    """A fingerprint of configuration and weights: 'sha256:...'.

    Files up to 64 MiB are hashed whole; of larger ones the size, the first piece (a safetensors file opens with the
    names, shapes and offsets of its tensors) and evenly spaced pieces: training touches every weight, so it shows.
    """
    total = hashlib.sha256()
    config = directory / ("adapter_config.json" if is_adapter(directory) else "config.json")
    for file in [config, *weight_files(directory)]:
        total.update(f"{file.name}:{file.stat().st_size};".encode())
        with file.open("rb") as stream:
            if file.stat().st_size <= WHOLE_BYTES:
                total.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for piece in range(SAMPLES):
                stream.seek(piece * (file.stat().st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                total.update(stream.read(SAMPLE_BYTES))
    return f"sha256:{total.hexdigest()}"


def check_digest(name: str, reference: Reference, directory: Path) -> None:
    """Refuses a member whose files are not those that were there when the fused model was made."""
    if reference.digest is None or digest(directory) == reference.digest:
        return
    raise MemberMismatch(
        f"member '{name}' has changed: '{directory}' is not the model that this fused model was made of.",
        f"Recorded {reference.digest[:19]}..., found {digest(directory)[:19]}...",
        "bring the old files back, or fuse again with the new ones.",
    )


def as_written(reference: Reference, directory: Path, target: Path) -> Reference:
    """A definite reference as `target` shall record it: relative when the member lies beside or below `target`."""
    recorded = replace(reference, digest=digest(directory))
    if not Path(reference.where).is_absolute() or not directory.is_relative_to(target.resolve().parent):
        return recorded
    relative = os.path.relpath(directory, target.resolve())
    # A leading dot says that it is a path: `experts/math` could as well be a hub id.
    return replace(recorded, where=relative if relative.startswith(".") else f"./{relative}")
