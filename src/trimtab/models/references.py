"""Where a member lives: a directory, a `zoo:` name or a hub id, and a digest that tells whether it has changed."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.core.errors import MemberMismatch, OfflineError, TrimtabError, UnreadableModel, last_line
from trimtab.models.checkpoint import is_adapter, weight_files

ZOO = "zoo:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./-]+\.gguf)")  # a file of a repository, asked for by name
# What a hub snapshot brings along, each by its own name: `*` would match `original/` and copies of the weights in other
# formats and number types (consolidated.safetensors, model.fp16.safetensors), which are never read.
WEIGHT_FILES = [
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_model-?????-of-?????.safetensors", "adapter_model.safetensors.index.json"),
]
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "tekken.json", "vocab.txt"),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
]
HUB_FILES = ["config.json", "generation_config.json", "adapter_config.json", *WEIGHT_FILES, *TOKENIZER_FILES]
CACHE_FIXES = {  # what to do where the local cache cannot be written
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make that directory writable"),
}
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

    A .gguf file stands in place of a directory: FILE.gguf, or OWNER/NAME/FILE.gguf on the hub.

    beside    the directory that relative paths start from; None: the current one
    raises    UnreadableModel when there is no such directory or repository, OfflineError when the network is needed;
              see `fetch`
    """
    if reference.is_zoo:
        from trimtab import zoo

        return reference, Path(zoo.resolve(reference.where))
    path = Path(reference.where).expanduser()
    if beside is not None:
        path = beside / path
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return replace(reference, where=str(path.resolve()), revision=None), path.resolve()
    if path.exists():
        raise UnreadableModel(
            f"'{path}' is a file.",
            "A model is a directory with config.json and safetensors, or a .gguf file.",
            "pass its directory.",
        )
    if match := HUB_GGUF.fullmatch(reference.where):
        snapshot = fetch(replace(reference, where=match[1]), [match[2], *TOKENIZER_FILES])
        if not (snapshot / match[2]).is_file():
            raise UnreadableModel(
                f"'{match[1]}' holds no file '{match[2]}'.", "A GGUF file is named as it lies there.", "correct it."
            )
        return replace(reference, revision=snapshot.name), snapshot / match[2]
    if HUB_ID.fullmatch(reference.where) is None:
        raise UnreadableModel(
            f"there is no directory '{path}'.", "A model is a directory, a hub id or a zoo: name.", "correct the path."
        )
    snapshot = fetch(reference)
    return replace(reference, revision=snapshot.name), snapshot  # a snapshot's directory is named by its commit


def fetch(reference: Reference, files: Sequence[str] = HUB_FILES) -> Path:
    """The snapshot of a hub repository, from the local cache where it is already there.

    files     patterns of what is fetched; shards of other names are fetched where the index names them
    raises    UnreadableModel when there is no such repository or revision, or it may not be read; OfflineError when the
              hub cannot be reached; TrimtabError when the local cache cannot be written
    """
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = Path(snapshot_download(reference.where, revision=reference.revision, allow_patterns=list(files)))
        if unnamed := [file.name for file in weight_files(snapshot) if not file.exists()]:
            snapshot_download(reference.where, revision=snapshot.name, allow_patterns=unnamed)
        return snapshot
    except (errors.HFValidationError, OSError, http_error()) as error:
        raise hub_failure(reference, error) from error


def http_error() -> type[Exception]:
    """What the hub's HTTP library raises, which stands for connections that break in the middle of a download."""
    from huggingface_hub import errors

    kind: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    return kind


def hub_failure(reference: Reference, error: BaseException) -> TrimtabError:
    """What a failed download means and what to do, from the error of huggingface_hub and those that led to it."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    refusal = _refusal(reference, error)
    if refusal is not None:
        return refusal
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return OfflineError(
                f"the hub cannot give '{reference.where}' now: it answers {status}.",
                f"The hub says: {last_line(cause)}",
                "try again later.",
            )
        if isinstance(cause, OSError) and cause.errno in CACHE_FIXES:
            from huggingface_hub.constants import HF_HUB_CACHE

            return TrimtabError(
                f"'{reference.where}' cannot be stored in the local cache {HF_HUB_CACHE}: {cause.strerror}.",
                "A hub repository is kept there once it was fetched.",
                f"{CACHE_FIXES[cause.errno]}, or point HF_HOME elsewhere.",
            )
    is_switched_off = any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes)
    return OfflineError(
        f"'{reference.where}' is no directory here, and the hub cannot be asked"
        + (": HF_HUB_OFFLINE is set." if is_switched_off else f": {last_line(causes[-1])}"),
        "A hub id needs the network once; after that it is read from the local cache.",
        f"correct the path, or {'unset HF_HUB_OFFLINE and ' if is_switched_off else ''}try again with a network.",
    )


def _refusal(reference: Reference, error: BaseException) -> UnreadableModel | None:
    """The hub was reached and knows no such repository, or does not hand it out; None: something else failed."""
    from huggingface_hub import errors

    says = f"The hub says: {last_line(error)}"
    if isinstance(error, errors.GatedRepoError):
        return UnreadableModel(
            f"'{reference.where}' is a gated repository, and this machine's login has no access to it.",
            says,
            f"ask for access at https://huggingface.co/{reference.where}, then log in with `hf auth login`.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UnreadableModel(
            f"'{reference.where}' has no revision '{reference.revision or 'main'}'.",
            says,
            "correct what follows the @.",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UnreadableModel(
            f"'{reference.where}' is neither a directory here nor a repository on the hub.",
            says,
            "correct the path or the id; for a private repository log in with `hf auth login`.",
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return UnreadableModel(
            f"the hub does not let this machine read '{reference.where}' ({error.response.status_code}).",
            says,
            "log in with `hf auth login`, with a token that may read it.",
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__


def digest(directory: Path) -> str:
    """A fingerprint of configuration and weights: 'sha256:...'.

    Files up to 64 MiB are hashed whole; of larger ones the size, the first piece (a safetensors file opens with the
    names, shapes and offsets of its tensors) and evenly spaced pieces: training touches every weight, so it shows.
    """
    return _digest([*_config_files(directory), *weight_files(directory)])


def weights_digest(directory: Path) -> str:
    """As `digest`, of the weights alone."""
    return _digest(weight_files(directory))


def _earlier_digest(directory: Path) -> str:
    """As digests were made before copies of the weights in other formats were left out."""
    pattern = "adapter_model*.safetensors" if is_adapter(directory) else "*.safetensors"
    return _digest([*_config_files(directory), *sorted(directory.glob(pattern))])


def _config_files(directory: Path) -> list[Path]:
    if directory.is_file():  # a .gguf file has its configuration inside
        return []
    return [directory / ("adapter_config.json" if is_adapter(directory) else "config.json")]


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
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
    if reference.digest is None or reference.digest in (digest(directory), _earlier_digest(directory)):
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
