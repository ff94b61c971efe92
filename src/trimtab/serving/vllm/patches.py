"""What a fused model replaces inside vLLM, one row for each bug.

Rows are applied when a fused model is made, so only processes that run one are changed. For each row
`tests/serving/engine/test_patches.py` shows that vLLM still has the bug without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

STORED_AT_ONCE = 8  # 16-bit numbers, by the CPU's rotary kernel


@dataclass(frozen=True)
class Patch:
    """One change to vLLM.

    bug        what goes wrong without it
    upstream   where it is reported, or which code of vLLM has it
    series     of vLLM in which its test has seen the bug
    cpu_only   whether only vLLM's CPU platform has it
    apply      makes the change, given the fused model; applied twice, it is the same
    """

    name: str
    bug: str
    upstream: str
    series: tuple[str, ...]
    cpu_only: bool
    apply: Callable[[nn.Module], None]

    def is_needed(self, series: str, is_cpu: bool) -> bool:
        """Whether this series of vLLM, such as "0.32", has the bug on this platform."""
        return series in self.series and (is_cpu or not self.cpu_only)


def apply_patches(model: nn.Module, series: str, is_cpu: bool) -> list[str]:
    """Applies every row that is needed; returns their names.

    model     a fused model whose members have been made
    series    of the vLLM that runs it
    """
    needed = [patch for patch in PATCHES if patch.is_needed(series, is_cpu)]
    for patch in needed:
        patch.apply(model)
    return [patch.name for patch in needed]


def replace_method(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces a method by `make(method)`, once; the original stays reachable as `__wrapped__`."""
    original = getattr(owner, name)
    if not getattr(original, "is_trimtabs", False):
        replaced = wraps(original)(make(original))
        replaced.is_trimtabs = True  # type: ignore[attr-defined]
        setattr(owner, name, replaced)


def _expand_draft_settings(_: nn.Module) -> None:
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.sample import rejection_sampler

    kernel = rejection_sampler.expand_kernel
    if isinstance(kernel, KernelOverride):  # not where a CPU build of Triton runs the kernel itself
        kernel._impl = kernel.func = expand


def expand(
    output: Tensor,
    values: Tensor,
    ends: Int[Tensor, " request"],
    replace_from: int | float,
    replace_to: int | float,
    MAX_NUM_TOKENS: int | None = None,  # vLLM's name
) -> None:
    """Writes each request's value to `output`, once per drafted token of that request.

    output        [token]      filled in place
    values        [request]    `replace_from` is replaced by `replace_to`
    ends          [request]    number of drafted tokens of this request and all before it
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values)
    output.copy_(replaced.repeat_interleave(counts))


def _restore_generators(_: nn.Module) -> None:
    """A partial prompt draws a token that is dropped; the generator's state is restored here instead of by vLLM."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def sampling(sample: Any) -> Any:
        def sample_and_restore(self: Any, *args: Any, **kwargs: Any) -> Any:
            states = [(generator, generator.get_state()) for generator in _partial_generators(self).values()]
            found = sample(self, *args, **kwargs)
            for generator, state in states:
                generator.set_state(state)
            return found

        return sample_and_restore

    def bookkeeping(keep_books: Any) -> Any:
        def keep_books_without(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = _partial_generators(self)
            for index in hidden:
                del self.input_batch.generators[index]
            try:
                return keep_books(self, *args, **kwargs)
            finally:
                self.input_batch.generators.update(hidden)

        return keep_books_without

    replace_method(CPUModelRunner, "_sample", sampling)
    replace_method(CPUModelRunner, "_bookkeeping_sync", bookkeeping)


def _partial_generators(runner: Any) -> dict[int, torch.Generator]:
    """{index in the batch: generator} of seeded requests whose prompt this step does not finish."""
    is_partial = runner.discard_request_mask.np
    return {index: generator for index, generator in runner.input_batch.generators.items() if is_partial[index]}


def _rotate_in_torch(model: nn.Module) -> None:
    """Changes the fused model's own layers, and no class."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    for layer in model.modules():
        if isinstance(layer, RotaryEmbeddingBase) and is_misaligned(layer.rotary_dim, layer.dtype):
            layer._forward_method = layer.forward_native


def is_misaligned(rotary_dim: int, dtype: torch.dtype) -> bool:
    """Whether half a rotated head of this type is no multiple of what the CPU kernel stores at once."""
    return dtype in (torch.bfloat16, torch.float16) and rotary_dim // 2 % STORED_AT_ONCE != 0


def _trim_drafts(model: nn.Module) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from trimtab.serving.vllm.draft_trimming import trimming

    # The CPU's runner inherits this method.
    replace_method(GPUModelRunner, "take_draft_token_ids", lambda take: trimming(take, type(model)))


PATCHES = (
    Patch(
        "draft settings",
        "Sampled drafts are verified at temperature, top-k and top-p read from uninitialised memory: the kernel writes "
        "them into a copy in another type, which is dropped.",
        "https://github.com/vllm-project/vllm/issues/55005",
        ("0.32", "0.33"),
        True,
        _expand_draft_settings,
    ),
    Patch(
        "seeded prompts in parts",
        "A seeded request whose prompt is read in several steps ends the engine: vLLM rewinds its generator by an "
        "offset, which generators of CPUs do not have.",
        "https://github.com/vllm-project/vllm/pull/10097, GPUModelRunner._bookkeeping_sync",
        ("0.32", "0.33"),
        True,
        _restore_generators,
    ),
    Patch(
        "rotary halves",
        "The process dies on 16-bit heads of which a half is no multiple of 8 numbers, such as heads of 24: the kernel "
        "stores 8 numbers at a time at aligned addresses.",
        "csrc/cpu/pos_encoding.cpp, rotary_embedding",
        ("0.32", "0.33"),
        True,
        _rotate_in_torch,
    ),
    Patch(
        "whole drafts",
        "Drafts are verified at their full length, also beyond max_tokens and after a drafted end of text. Every "
        "member reads those rows, and vLLM drops all of them.",
        "https://github.com/vllm-project/vllm/issues/56101, GPUModelRunner.take_draft_token_ids",
        ("0.32", "0.33"),
        False,
        _trim_drafts,
    ),
)
