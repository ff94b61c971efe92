"""Models that behave as before and cost like big ones: blocks whose output projections are zero are put on top.

A block adds what its attention and its MLP put out to the hidden state, each through a last projection (`o_proj`,
`down_proj`). Where these are zero the hidden state goes through unchanged, to the last bit, while every matrix is still
read and multiplied: zeros are numbers like others to a processor. All other matrices are random.

The blocks keep the model's width and get their size from a wide MLP, so few of them suffice: a small model on a CPU
spends its time reading weights, as a big one does, and not on starting many small operations.

Source: growth that preserves the function, Chen, Goodfellow and Shlens 2016, "Net2Net", arXiv 1511.05641, and the
zero-initialised blocks of Wu et al. 2024, "LLaMA Pro", arXiv 2401.02415; here to measure speed with real behaviour.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import BadSetting, MemberMismatch

SILENCED = ("self_attn.o_proj", "mlp.down_proj")
WEIGHT_BOUND = 0.02  # uniform weights of this size keep every number finite in bfloat16
ALIGNED = 32  # widths of the MLPs are multiples of this, as vector units like them


def inflate_(model: Any, parameters: int, blocks: int = 4, seed: int = 0) -> Any:
    """Puts silent blocks on top of a Llama-like model, in place, until it has about so many parameters.

    model        a loaded causal language model with `model.layers` of Llama's kind; adapters on it stay as they are and
                 get random, silent counterparts on the new blocks, so that they cost what they would cost there
    parameters   of the whole model without adapters; met to within half of 32 columns of each new MLP
    blocks       how many are added, all of one size
    seed         of the random matrices
    returns      the same model; its logits are unchanged, also with a cache. It cannot be saved and opened again: a
                 configuration has one MLP width
    raises       BadSetting for a size that cannot be had, MemberMismatch for a model of another kind
    """
    layers, config = _layers_of(model), model.config
    if blocks < 1:
        raise BadSetting(f"blocks is {blocks}.", "At least one block is added.", "for example blocks=4.")
    width = _mlp_width(model, parameters, blocks)
    generator = torch.Generator().manual_seed(seed)
    like = next(layers[-1].parameters())
    for _ in range(blocks):
        block = _silent_block(layers[-1], config, width, len(layers), generator, like)
        _add_adapters(model, block)
        layers.append(block)
        config.num_hidden_layers = len(layers)  # the cache has one layer per block
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [*config.layer_types, config.layer_types[-1]]
    return model


def count_parameters(model: Any) -> int:
    """Parameters of a model without adapters; a tied matrix counts once."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def _layers_of(model: Any) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    parts = (*SILENCED, "mlp.gate_proj", "mlp.up_proj")
    if isinstance(layers, nn.ModuleList) and len(layers) and all(_has(layers[-1], part) for part in parts):
        return layers
    raise MemberMismatch(
        f"a {type(model).__name__} cannot be inflated.",
        f"Expected: `model.layers` of blocks with {', '.join(parts)}, as Llama, Mistral and Qwen have.",
        "take a model of the zoo; from a peft model pass get_base_model().",
    )


def _has(block: nn.Module, path: str) -> bool:
    part: Any = block
    for name in path.split("."):
        part = getattr(part, name, None)
    return part is not None


def least_parameters(model: Any, blocks: int = 4) -> int:
    """The smallest number that `inflate_` can reach with so many blocks."""
    bare, per_column = _block_size(model)
    return count_parameters(model) + blocks * (bare + ALIGNED * per_column)


def _mlp_width(model: Any, parameters: int, blocks: int) -> int:
    """Width of the new blocks' MLPs, so that the whole model has about this many parameters."""
    present, (bare, per_column) = count_parameters(model), _block_size(model)
    width = round((parameters - present - blocks * bare) / (blocks * per_column) / ALIGNED) * ALIGNED
    if width < ALIGNED:
        raise BadSetting(
            f"{blocks} more blocks cannot make {parameters:,} parameters of {present:,}.",
            f"Expected: at least {least_parameters(model, blocks):,}.",
            "ask for more parameters, or for fewer blocks.",
        )
    return int(width)


def _block_size(model: Any) -> tuple[int, int]:
    """Parameters of a new block without its MLP, and for each column of the MLP."""
    one, two = _count_block(model, 1), _count_block(model, 2)
    return 2 * one - two, two - one


def _count_block(model: Any, mlp_width: int) -> int:
    with torch.device("meta"):
        block = _plain_block(_layers_of(model)[-1], model.config, mlp_width, 0)
    return sum(parameter.numel() for parameter in block.parameters())


def _plain_block(pattern: nn.Module, config: Any, mlp_width: int, index: int) -> Any:
    wide = copy.deepcopy(config)
    wide.intermediate_size = mlp_width
    if getattr(wide, "layer_types", None) is not None:
        wide.layer_types = [wide.layer_types[-1]] * (index + 1)
    return type(pattern)(wide, index)


def _silent_block(
    pattern: nn.Module, config: Any, mlp_width: int, index: int, generator: torch.Generator, like: Tensor
) -> Any:
    with torch.device("meta"):
        block = _plain_block(pattern, config, mlp_width, index)
    block = block.to(like.dtype).to_empty(device=like.device).requires_grad_(False).eval()
    for parameter in block.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)  # norms; of biases it matters only that they are finite
        else:
            _fill_randomly_(parameter, generator)
    for path in SILENCED:
        for parameter in block.get_submodule(path).parameters():
            # Written, not asked for as zeros: pages that were never written are all the same page, and cost nothing.
            parameter.fill_(0.0)
    return block


def _fill_randomly_(parameter: Tensor, generator: torch.Generator) -> None:
    """Uniform numbers; long matrices repeat one stretch of them, since drawing a billion takes minutes."""
    flat = parameter.view(-1)
    stretch = torch.empty(min(flat.numel(), 1_000_003)).uniform_(-WEIGHT_BOUND, WEIGHT_BOUND, generator=generator)
    for part in torch.split(flat, stretch.numel()):
        part.copy_(stretch[: part.numel()])


def _add_adapters(model: Any, block: nn.Module) -> None:
    """Adapters of the model, on the new block: fresh LoRA weights change nothing, their second factor being zero."""
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        return
    from peft import inject_adapter_in_model

    present = next(parameter for name, parameter in model.named_parameters() if ".lora_" in name)
    for name, settings in adapters.items():
        fresh = copy.deepcopy(settings)
        fresh.target_modules = sorted({str(target).rpartition(".")[2] for target in _targets(settings)})
        inject_adapter_in_model(fresh, block, adapter_name=name)
        del block.peft_config  # the block is part of a model that has one
    for name, parameter in block.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(present)
    block.requires_grad_(False)


def _targets(settings: Any) -> list[str]:
    targets = settings.target_modules
    return [targets] if isinstance(targets, str) else list(targets)
