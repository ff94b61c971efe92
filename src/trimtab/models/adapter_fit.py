"""Whether an adapter fits a model, from names and shapes: nothing is attached, and no weight of the model is read."""

import re
from pathlib import Path
from typing import Any

from trimtab.core.errors import MemberMismatch
from trimtab.models import checkpoint
from trimtab.models.adapters import base_name, read_config

# peft's names in files: base_model.model.<module>.lora_A.weight; embeddings have no ".weight".
LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?$")


def check_fit(name: str, directory: Path, model: Any) -> None:
    """Refuses a LoRA whose layers the model lacks or has in another shape; other adapters are checked at opening.

    model     may lie on the meta device
    raises    MemberMismatch; UnreadableModel where the adapter cannot be read
    """
    if getattr(read_config(name, directory), "layer_replication", None):
        return  # its layers are those of the model that it makes
    modules = dict(model.named_modules())
    for key, tensor in checkpoint.tensors(directory).items():
        match = LORA.match(key)
        if match is None:
            continue
        module = modules.get(match["module"])
        weight = getattr(module, "weight", None)
        if weight is None:
            raise _misfit(name, directory, f"there is no layer '{match['module']}'")
        # A has a column per input of the layer and B a row per output; of embeddings it is the other way round, and
        # peft's Conv1D (GPT-2) stores its weight transposed.
        size = tensor.shape[-1] if match["side"] == "A" else tensor.shape[0]
        if size not in weight.shape:
            shapes = f"'{match['module']}' has shape {tuple(weight.shape)}, and lora_{match['side']} {tensor.shape}"
            raise _misfit(name, directory, shapes)


def _misfit(name: str, directory: Path, what: str) -> MemberMismatch:
    return MemberMismatch(
        f"the adapter '{name}' ({directory}) does not fit its base: {what}.",
        "An adapter belongs to the very model that it was trained on.",
        f"its adapter_config.json names '{base_name(directory)}': pass that one as base.",
    )
