"""Whether an adapter changes the vocabulary of its base: embeddings, output layer or single tokens of its own.

Trainers write their tokenizer beside every adapter, often with a token that was added for padding only. So that
tokenizer counts only where the adapter's weights hold embeddings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UnreadableModel
from trimtab.models.checkpoint import read_json, weight_files

# What peft puts between a module's name and that of its weight; under the last two it is the base's own weight.
WRAPPED = r"(\.token_adapter|\.modules_to_save|\.base_layer|\.original_module)*"
OF_BASE = (".base_layer.", ".original_module.")


@dataclass(frozen=True)
class AdapterVocabulary:
    """What an adapter's files say about tokens.

    rows          of the embeddings with the adapter
    is_changed    whether it brings embeddings, an output layer or tokens of its own
    is_separate   whether it cannot sit on the shared base: it has another number of rows, or overwrites the base's own
    """

    rows: int
    is_changed: bool
    is_separate: bool


def adapter_vocabulary(name: str, directory: Path, model: Any) -> AdapterVocabulary:
    """What an adapter changes in the vocabulary of the model that it sits on.

    raises    UnreadableModel when it has more tokens than it has output rows for
    """
    modules = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {end: _name_of(model, module) for end, module in modules.items()}
    config = read_json(directory / "adapter_config.json")
    kept = {str(part).rsplit(".", 1)[-1] for part in config.get("modules_to_save") or ()}
    tokens = _trained_tokens(config.get("trainable_token_indices"))
    base_rows = len(_bare(modules["input"]).weight)
    rows, is_changed, overwrites, has_output = base_rows, bool(tokens), False, False
    for key, part in _tensors(directory):
        end = next((end for end, module in names.items() if module and _is_weight(key, module)), None)
        if end is None:
            continue
        rows, is_changed, has_output = part.get_shape()[0], True, has_output or end == "output"
        # Without weights (a base on the meta device) nothing can be overwritten.
        if rows == base_rows and not _bare(modules[end]).weight.is_meta and _is_of_base(key, names[end], kept):
            overwrites = overwrites or not _agrees(part[:], _bare(modules[end]).weight)
    rows = max(rows, *(index + 1 for index in tokens), base_rows) if tokens else rows
    is_resized = rows != base_rows
    is_tied = bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    if is_resized and not is_tied and not has_output:
        raise UnreadableModel(
            f"the adapter '{name}' ({directory}) was trained with {rows} tokens, its base has {base_rows}, and the "
            "output rows of the others are not in its files.",
            "An adapter that adds tokens brings embeddings and output layer along.",
            "save it again with save_embedding_layers=True, or merge it into a model of its own.",
        )
    return AdapterVocabulary(rows, is_changed, is_resized or overwrites)


def _name_of(model: Any, wanted: Any) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """(name, slice that reads it) of an adapter's tensors."""
    from safetensors import safe_open

    for file in weight_files(directory):
        with safe_open(str(file), framework="pt") as tensors:
            yield from ((key, tensors.get_slice(key)) for key in sorted(tensors.keys()))


def _is_weight(key: str, module: str) -> bool:
    return re.fullmatch(rf"(.*\.)?{re.escape(module)}{WRAPPED}\.weight", key) is not None


def _is_of_base(key: str, module: str, kept: set[str]) -> bool:
    """Whether peft loads a tensor into the base's own weight, not into one of the adapter's."""
    is_bare = key.endswith(f"{module}.weight") and module.rsplit(".", 1)[-1] not in kept
    return is_bare or any(part in key for part in OF_BASE)


def _bare(module: Any) -> Any:
    """A module without what adapters have put around it."""
    while True:
        inner = next(
            (getattr(module, name) for name in ("base_layer", "original_module") if hasattr(module, name)), None
        )
        if inner is None:
            return module
        module = inner


def _agrees(saved: Tensor, own: Tensor) -> bool:
    if own.is_meta:  # an outline has no numbers to compare with; a copy of it costs nothing
        return False
    return saved.shape == own.shape and torch.equal(saved.to(own.dtype), own.detach().cpu())


def _trained_tokens(indices: Any) -> list[int]:
    """Token ids that peft trains one by one, in both forms that its configuration has."""
    parts = indices.values() if isinstance(indices, dict) else [indices or ()]
    return [int(index) for part in parts for index in part]
