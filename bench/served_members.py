"""Inflated members of the zoo as directories, which a server can open.

A configuration has one MLP width, and inflated blocks are wider than the zoo's own. So the zoo's own blocks are widened
to the same size, by columns whose output is zero: every block costs the same, and the logits stay what they were.

Size from the MLP alone would make blocks of a shape that nobody's model has: 70 to 94 columns of the MLP to each
dimension of the hidden state. With many rows at a step, activations and narrow products would then decide. So the
hidden state is widened first, by dimensions that hold zeros; to each of them there are 4 to 6 columns then, where real
models have 3 to 5.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.inflation import ALIGNED, WEIGHT_BOUND, count_parameters, inflate_, least_parameters
from bench.members import SMALL_BLOCKS, STRONG_BLOCKS, load_tokenizer
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.models.opening import quiet_bars
from trimtab.zoo import resolve

EXPERT = "arithmetic"


@dataclass(frozen=True)
class Directories:
    """Members of one cost, on disk.

    fused        refers to the others
    fused_tiny   refers to the zoo's own small members, as they are
    parameters   member -> how many it has
    """

    strong: Path
    base: Path
    expert: Path
    fused: Path
    fused_tiny: Path
    parameters: dict[str, int]


def write_members(folder: Path, strong: int, small: int, dtype: str = "bfloat16", wider: int = 1) -> Directories:
    """A strong model, a base and one expert of about so many parameters, and the fused directory over them.

    wider   how many times as wide their hidden states are as the zoo's, see `widen_hidden_`
    """
    parameters = {
        "strong": _write(folder / "strong", "strong", strong, STRONG_BLOCKS, dtype, wider),
        "base": _write(folder / "base", "small", small, SMALL_BLOCKS, dtype, wider),
        "expert": _write(folder / "expert", f"small/{EXPERT}", small, SMALL_BLOCKS, dtype, wider),
    }
    with quiet_bars():
        fused = FusedCausalLM.from_members(folder / "strong", folder / "base", {EXPERT: folder / "expert"})
        tiny = FusedCausalLM.from_members("zoo:strong", "zoo:small", {EXPERT: f"zoo:small/{EXPERT}"})
    fused.save_pretrained(folder / "fused")
    tiny.save_pretrained(folder / "fused-tiny")
    return Directories(
        folder / "strong", folder / "base", folder / "expert", folder / "fused", folder / "fused-tiny", parameters
    )


def _write(target: Path, name: str, parameters: int, blocks: int, dtype: str, wider: int) -> int:
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=getattr(torch, dtype))
        widen_hidden_(model.eval().requires_grad_(False), wider)
        level(model, parameters, blocks).save_pretrained(target)
    load_tokenizer().save_pretrained(target)
    return count_parameters(model)


def widen_hidden_(model: Any, factor: int) -> Any:
    """Makes the hidden state of a Llama of the zoo so many times as wide, in place, by dimensions that hold zeros.

    factor    a power of 4: norms then see a mean square that is exactly so many times smaller, and their weights are
              divided by its root, a power of 2
    returns   the same model, which can be saved and opened again; its logits are unchanged but for rounding
    raises    BadSetting for another factor
    """
    root = math.isqrt(max(factor, 0))
    if root < 1 or root * root != factor or root & (root - 1):
        raise BadSetting(f"factor is {factor}.", "Expected: a power of 4.", "for example factor=4.")
    config, generator = model.config, torch.Generator().manual_seed(0)
    more = (factor - 1) * config.hidden_size
    config.hidden_size *= factor
    config.rms_norm_eps /= factor
    embedding = model.get_input_embeddings()
    embedding.embedding_dim = config.hidden_size
    embedding.weight = _parameter(_with_columns(embedding.weight, more))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reads.in_features = config.hidden_size
            reads.weight = _parameter(_with_columns(reads.weight, more, generator))
        for writes in (attention.o_proj, mlp.down_proj):
            writes.out_features = config.hidden_size
            writes.weight = _parameter(_with_columns(writes.weight.T, more).T.contiguous())
        mlp.hidden_size = attention.hidden_size = config.hidden_size
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    for norm in norms:
        norm.variance_epsilon /= factor
        norm.weight = _parameter(torch.cat([norm.weight / root, norm.weight.new_ones(more)]))
    model.get_output_embeddings().in_features = config.hidden_size
    model.tie_weights()
    return model


def _with_columns(weight: Tensor, more: int, generator: torch.Generator | None = None) -> Tensor:
    """A matrix with so many more columns: zeros, or random numbers of a generator."""
    columns = weight.new_zeros(len(weight), more)
    if generator is not None:
        columns.copy_(torch.empty(columns.shape).uniform_(-WEIGHT_BOUND, WEIGHT_BOUND, generator=generator))
    return torch.cat([weight, columns], dim=1)


def level(model: Any, parameters: int, blocks: int) -> Any:
    """Inflates a model of the zoo, in place, so that all its blocks have one size; see `inflate_`.

    parameters   of the whole model, about; counts what its own blocks are widened by
    blocks       how many are added
    returns      the same model, which can be saved and opened again; its logits are unchanged but for rounding
    raises       BadSetting where so few parameters would make blocks narrower than they are
    """
    own = len(model.model.layers)
    inflate_(model, _parameters_of_new(model, parameters, blocks), blocks)
    width = model.model.layers[-1].mlp.up_proj.out_features
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers[:own]:
        _widen(layer.mlp, width, generator)
    model.config.intermediate_size = width
    return model


def _parameters_of_new(model: Any, parameters: int, blocks: int) -> int:
    """What `inflate_` must aim at, so that with the model's own blocks as wide as the new ones there are so many."""
    own, present = len(model.model.layers), count_parameters(model)
    narrow, per_column = model.config.intermediate_size, 3 * model.config.hidden_size
    bare = (least_parameters(model, blocks) - present) // blocks - ALIGNED * per_column  # a new block without its MLP
    width = (parameters - present - blocks * bare + own * per_column * narrow) // ((own + blocks) * per_column)
    if width < narrow:
        raise BadSetting(
            f"{parameters:,} parameters make {own + blocks} blocks narrower than the model's own.",
            f"They are {narrow} columns wide; {width} would be left.",
            "ask for more parameters.",
        )
    return int(present + blocks * (bare + per_column * width))


def _widen(mlp: Any, width: int, generator: torch.Generator) -> None:
    """Random columns going in, zeros coming out: they are read and multiplied, and add nothing."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.out_features = width
        weight = projection.weight  # [mlp, width]
        projection.weight = _parameter(_with_columns(weight.T, width - len(weight), generator).T.contiguous())
    down = mlp.down_proj
    down.in_features = width
    down.weight = _parameter(_with_columns(down.weight, width - down.weight.shape[1]))  # [width, mlp]
    mlp.intermediate_size = width


def _parameter(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight, requires_grad=False)
