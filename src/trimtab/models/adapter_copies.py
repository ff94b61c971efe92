"""Adapters that cannot sit on the base itself: each gets a copy of the base's modules, which shares the parameters.

Some adapters change their base when they are attached: PiSSA, OLoRA and KaSA take out of its weights what their factors
start with, LoftQ rounds them, layer replication repeats layers. Others, such as IA3 or VeRA, have layers that the base
would have to be read through. On a copy none of that reaches the base, and memory holds twice only what was changed.

Source: Meng et al. 2024, PiSSA, arXiv 2404.02948 (W = W_res + A B: the residual replaces W); Büyükakyüz 2024, OLoRA,
arXiv 2406.01775; Li et al. 2023, LoftQ, arXiv 2310.08659.
"""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import MemberMismatch, TrimtabWarning
from trimtab.models import adapters
from trimtab.models.probe import difference, same_shapes_tolerance

# Ways to start LoRA's factors that leave the base's weights alone.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Parts of LoRA that reach beyond its layers.
UNUSUAL = ("layer_replication", "trainable_token_indices", "target_parameters")


def sits_on_base(config: Any) -> bool:
    """Whether an adapter is LoRA that leaves its base as it was, so that it can share it with others."""
    from peft.utils import PeftType

    if config.peft_type != PeftType.LORA or config.init_lora_weights not in HARMLESS_STARTS or config.bias != "none":
        return False
    variants = {field.name for field in fields(config) if field.metadata.get("is_lora_variant")} - {"use_dora"}
    return not any(getattr(config, name) for name in variants | {*UNUSUAL})


def changes_base(config: Any) -> bool:
    """Whether attaching an adapter replaces weights of its base."""
    starts = getattr(config, "init_lora_weights", True)
    others = ("kasa_config", "layer_replication")
    return starts not in HARMLESS_STARTS or any(getattr(config, name, None) for name in others)


def attach_apart(name: str, directory: Path, base: nn.Module) -> tuple[nn.Module, str]:
    """A model that shares the base's parameters and carries one adapter, and the name by which to select it.

    raises    MemberMismatch, UnreadableModel as `AdapterSwitch.attach`; MemberMismatch for a start that is drawn anew
              at each loading, when that moves the logits
    warns     TrimtabWarning with the bytes of weights that the adapter has changed, and so are held twice
    """
    config = adapters.read_config(name, directory)
    model, adapter = _attached(name, directory, base)
    if "_niter_" in str(getattr(config, "init_lora_weights", "")):
        _check_repeatable(name, directory, base, model, adapter)
    own = _own_bytes(model, base)
    if changes_base(config) and own:
        warnings.warn(
            f"the adapter '{name}' changes its base when it is attached ({_start(config)}), so it has a copy of the "
            f"weights it changes: {own / 2**20:.1f} MiB. Fix: convert it to plain LoRA with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which shares the whole base.",
            TrimtabWarning,
            stacklevel=2,
        )
    return model, adapter


def _start(config: Any) -> str:
    return "layer_replication" if config.layer_replication else f"init_lora_weights={config.init_lora_weights!r}"


def _attached(name: str, directory: Path, base: nn.Module) -> tuple[nn.Module, str]:
    model = bare_copy(base)
    originals = _parted_(model)
    adapter = adapters.switch_for(model).attach(name, directory)
    _shared_again_(model, originals)
    return model, adapter


def bare_copy(model: nn.Module) -> nn.Module:
    """A model with the same parameter and buffer objects in modules of its own, without adapters."""
    tensors = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for part in [part for parts in adapters.layers_and_wrappers(made) for part in parts]:
        inner = getattr(part, "base_layer", None) or part.original_module
        for parent in made.modules():
            for key, child in list(parent._modules.items()):
                if child is part:
                    parent._modules[key] = inner
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(made).pop(attribute, None)
    return made


def _parted_(model: nn.Module) -> dict[int, nn.Parameter]:
    """Gives a model clones of its parameters; {id of a clone: the parameter that it was made from}."""
    clones: dict[int, nn.Parameter] = {}
    originals: dict[int, nn.Parameter] = {}
    for table, key, parameter in _parameters(model):
        if id(parameter) not in clones:
            clone = copy.deepcopy(parameter)
            clones[id(parameter)], originals[id(clone)] = clone, parameter
        table[key] = clones[id(parameter)]
    return originals


def _shared_again_(model: nn.Module, originals: dict[int, nn.Parameter]) -> None:
    """Puts the original parameters back into a model, but for those whose clones have been changed."""
    clones = {id(clone): clone for _, _, clone in _parameters(model) if id(clone) in originals}
    same = {key: torch.equal(clone, originals[key]) for key, clone in clones.items()}
    for table, key, clone in _parameters(model):
        if same.get(id(clone)):
            table[key] = originals[id(clone)]


def _parameters(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module._parameters, key, parameter


def _own_bytes(model: nn.Module, base: nn.Module) -> int:
    """Bytes of the weights of a base that its copy holds once more."""
    shared = {id(parameter) for parameter in base.parameters()}
    named = ((name, p) for name, p in model.named_parameters() if "base_layer" in name or "lora_" not in name)
    return sum(p.numel() * p.element_size() for _, p in named if id(p) not in shared)


def _check_repeatable(name: str, directory: Path, base: nn.Module, model: nn.Module, adapter: str) -> None:
    """Raises when a second attachment, whose random start differs, gives other logits than the first."""
    again, twin = _attached(name, directory, base)
    first, second = (
        adapters.switch_for(part).own_logits(name, named) for part, named in ((model, adapter), (again, twin))
    )
    found = difference(second, first, same_shapes_tolerance(model))
    if found is not None:
        raise MemberMismatch(
            f"the adapter '{name}' ({directory}) is another one at each loading: its logits move by {found:.2g}.",
            "Its factors start with a randomised singular value decomposition, which peft draws anew.",
            "save it with path_initial_model_for_weight_conversion where it was trained, which makes it plain LoRA.",
        )
