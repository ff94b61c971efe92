"""What a checkpoint's files say before any weight is read: which files hold tensors, and whether they are whole.

A safetensors file is 8 bytes (the header's length), a JSON header with dtype, shape and offsets of every tensor, and
the tensors: https://huggingface.co/docs/safetensors. Headers are small for any size of model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import UnreadableModel

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LFS_POINTER, LFS_BYTES = b"version https://git-lfs", 1024  # a pointer file is a few lines of text
GGUF = b"GGUF"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
DTYPES = {  # safetensors' names; one that torch has no type for (F4, F6) is stored in a quantized checkpoint
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
COPY_AGAIN = "copy or fetch the file again"
# Mistral's and Meta's own formats, which lie beside transformers' in some repositories.
NATIVE_FORMATS = ("consolidated*.safetensors", "consolidated*.pth", "params.json")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, unread: the file that holds it, its shape and number type."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def is_quantized(directory: Path) -> bool:
    """Whether the weights are stored packed, by a quantization method or as a GGUF file."""
    return directory.is_file() or bool(read_json(directory / "config.json").get("quantization_config"))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors that are read from a directory, in the order of their names.

    Those of a model are model.safetensors or the shards that the index names: transformers reads no others, so
    consolidated.safetensors and other copies do not count. A .gguf file is its own weight file.
    """
    if directory.is_file():
        return [directory]
    if is_adapter(directory):
        return sorted(directory.glob("adapter_model*.safetensors"))
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        return sorted(directory / name for name in set(_weight_map(directory / INDEX).values()))
    return []


def tensors(directory: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of all weight files, from their headers.

    raises    UnreadableModel for a file that is missing, cut short or no safetensors, and for a wrong index
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        for name, entry in read_header(file).items():
            if name != "__metadata__":
                dtype = DTYPES.get(entry["dtype"], torch.uint8)
                found[name] = StoredTensor(file, tuple(entry["shape"]), dtype)
    return found


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's size.

    raises    UnreadableModel with what is wrong: a Git LFS pointer, a file cut short, or other content
    """
    check_no_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"is empty ({size} bytes)" if size < 9 else "holds no safetensors header"
        raise UnreadableModel(
            f"'{file}' {what}: the file is damaged or cut short.",
            "A safetensors file begins with the length of its header, then the header.",
            f"{COPY_AGAIN}, or write it again with save_pretrained.",
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UnreadableModel(
            f"'{file}' has {size:,} bytes, and its header speaks of {expected:,}: "
            f"the file is {'cut short' if size < expected else 'damaged'}.",
            "A download or a copy that was interrupted leaves such a file.",
            f"{COPY_AGAIN}.",
        )
    return header  # type: ignore[no-any-return]


def check_no_pointer(file: Path) -> None:
    """Refuses a Git LFS pointer, which stands for a file that was not downloaded."""
    if file.stat().st_size < LFS_BYTES and file.read_bytes().startswith(LFS_POINTER):
        raise UnreadableModel(
            f"'{file}' is a Git LFS pointer: a line of text in place of the file.",
            "git clones the pointers alone where Git LFS is not installed.",
            f"run `git lfs install && git lfs pull` in '{file.parent}', or fetch it by its hub id.",
        )


def check_directory(directory: Path) -> None:
    """Refuses what holds no complete checkpoint, each with its own reason; pickled weights are never opened.

    directory    of a model or an adapter, or a .gguf file
    raises       UnreadableModel
    """
    if directory.is_file():
        return _check_gguf(directory)
    config = directory / (ADAPTER_CONFIG if is_adapter(directory) else "config.json")
    if not config.is_file():
        raise _no_model(directory)
    check_no_pointer(config)
    files = weight_files(directory)
    if not files:
        raise _no_weights(directory)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UnreadableModel(
            f"'{directory}' lacks {len(missing)} of its {len(files)} weight files: {_listed(missing)}.",
            f"{INDEX} names them.",
            "copy the missing files there, or fetch the checkpoint again.",
        )
    _check_index(directory, tensors(directory))
    return None


def _check_index(directory: Path, stored: dict[str, StoredTensor]) -> None:
    """Refuses an index that names tensors which its files do not hold."""
    if is_adapter(directory) or (directory / WEIGHTS).is_file():
        return
    named = _weight_map(directory / INDEX)
    wrong = [name for name, file in named.items() if name not in stored or stored[name].file.name != file]
    if wrong:
        raise UnreadableModel(
            f"'{directory / INDEX}' does not belong to the files beside it: {named[wrong[0]]} does not hold "
            f"{wrong[0]}, and {len(wrong)} of {len(named)} tensors are wrong in this way.",
            "The index says which file holds which tensor.",
            "copy index and files from one checkpoint, or fetch it again.",
        )


def _weight_map(index: Path) -> dict[str, str]:
    check_no_pointer(index)
    content = read_json(index)
    named = content.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UnreadableModel(
            f"'{index}' has no weight_map.",
            "It says which file holds which tensor: {tensor: file}.",
            "copy the index that belongs to the files beside it, or fetch the checkpoint again.",
        )
    if "metadata" not in content:
        raise UnreadableModel(
            f"'{index}' has no metadata.",
            "transformers reads it, though it may be empty.",
            'add the entry "metadata": {} to that file.',
        )
    return {str(name): file for name, file in named.items()}


def _check_gguf(file: Path) -> None:
    check_no_pointer(file)
    with file.open("rb") as stream:
        start = stream.read(4)
    if start != GGUF:
        raise UnreadableModel(
            f"'{file}' is a file, and no GGUF file: it begins with {start!r}.",
            "A model is a directory with config.json and safetensors, or a .gguf file.",
            f"pass a directory, or {COPY_AGAIN}.",
        )


def _no_model(directory: Path) -> UnreadableModel:
    """The error for a directory without a configuration, with what lies there instead."""
    found = f"'{directory}' holds no config.json and no adapter_config.json."
    if not any(directory.iterdir()):
        return UnreadableModel(f"{found} It is empty.", _MODEL_DIRECTORY, "copy or fetch the model there.")
    ggufs = sorted(file.name for file in directory.glob("*.gguf"))
    if ggufs:
        return UnreadableModel(
            f"{found} It holds GGUF files: {_listed(ggufs)}.",
            "Of GGUF files one is asked for by name, since a directory may hold several sizes.",
            f"pass the file: '{directory / ggufs[0]}'.",
        )
    below = sorted({path.parent for name in ("config.json", ADAPTER_CONFIG) for path in directory.glob(f"*/{name}")})
    if below:
        return UnreadableModel(
            f"{found} Of its subdirectories these do: {_listed([path.name for path in below])}.",
            _MODEL_DIRECTORY,
            f"pass one of them: '{below[-1]}'.",
        )
    if native := _native(directory):
        return UnreadableModel(f"{found} {native}", _MODEL_DIRECTORY, _FETCH_CONVERTED)
    return UnreadableModel(found, _MODEL_DIRECTORY, "pass the directory that holds those files.")


def _no_weights(directory: Path) -> UnreadableModel:
    """The error for a directory with a configuration and no weights that are read."""
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if native := _native(directory):
        return UnreadableModel(f"'{directory}' holds no {WEIGHTS}. {native}", _WEIGHTS, _FETCH_CONVERTED)
    if others:
        return UnreadableModel(
            f"'{directory}' holds no {WEIGHTS} and no index: {_listed(others)} would not be read.",
            _WEIGHTS,
            f"fetch {INDEX}, or rename the file if it is the only one.",
        )
    if pickles:
        loader = "peft.AutoPeftModelForCausalLM" if is_adapter(directory) else "AutoModelForCausalLM"
        return UnreadableModel(
            f"'{directory}' holds pickled weights only ({_listed(pickles)}).",
            "Opening a pickle can run any code, so only safetensors are read.",
            "load them where you trust them and save with save_pretrained, which writes safetensors: "
            f"{loader}.from_pretrained({str(directory)!r}).save_pretrained(NEW_DIRECTORY).",
        )
    return UnreadableModel(f"'{directory}' holds no safetensors.", _WEIGHTS, "copy them there.")


_MODEL_DIRECTORY = "A model directory is what save_pretrained writes."
_WEIGHTS = f"Weights are {WEIGHTS}, or shards of it with {INDEX}."
_FETCH_CONVERTED = "fetch the checkpoint in transformers' format, usually the same repository or one ending in -hf."


def _native(directory: Path) -> str:
    found = sorted(file.name for pattern in NATIVE_FORMATS for file in directory.glob(pattern))
    if (directory / "original").is_dir():
        found.append("original/")
    return f"It holds a publisher's own format ({_listed(found)}), which transformers does not read." if found else ""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that users may have touched."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnreadableModel(f"'{file}' cannot be read: {error}.", fix="write the directory again.") from error
    if not isinstance(content, dict):
        raise UnreadableModel(f"'{file}' holds no JSON object.", fix="write the directory again.")
    return content


def slices(wanted: Mapping[str, tuple[StoredTensor, int]], pieces: int, piece_numbers: int) -> dict[str, torch.Tensor]:
    """Evenly spaced pieces of some tensors, each [numbers] float64; only these pieces are read from disk.

    wanted          {name in its file: (tensor, how many of its rows count)}
    pieces          rows that are looked at per tensor
    piece_numbers   numbers of each row
    """
    from safetensors import safe_open

    found = {}
    for file in sorted({tensor.file for tensor, _ in wanted.values()}):
        with safe_open(str(file), framework="pt") as opened:
            for name, (tensor, count) in wanted.items():
                if tensor.file != file:
                    continue
                part, first = opened.get_slice(name), tuple(slice(0, 1) for _ in tensor.shape[1:-1])
                rows = sorted({index * (count - 1) // max(1, pieces - 1) for index in range(pieces)})
                taken = [part[(slice(row, row + 1), *first, slice(0, piece_numbers))] for row in rows]
                found[name] = torch.cat([piece.reshape(-1) for piece in taken]).double()
    return found


def _listed(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
