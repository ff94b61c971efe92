"""Attention heads of a size that the engine's kernels lack, filled up with zeros to one that they have.

vLLM's CPU kernels know few head sizes (32, 64, ...); small experts often have others. Zeros added to queries and keys
leave every score as it was (the scale is the model's own), and those added to values come out as zeros, which are cut:
the result is exact, at the price of a wider key-value cache.

Rotary positions meet such sizes too: vLLM 0.32's CPU kernel writes the halves of 16-bit heads by aligned stores of 8
numbers, and the process dies where a half is no multiple of that, as with heads of 24. There torch rotates.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.platforms import current_platform

from trimtab.core.errors import BadSetting
from trimtab.serving.vllm.plan import Body

STORED_AT_ONCE = 8  # numbers of 16 bits, by the CPU's rotary kernel


def fill_heads(model: nn.Module, body: Body) -> None:
    """Widens every attention layer of a body whose head size its backend lacks, and rotates without its kernel where
    that fails.

    raises    BadSetting when the backend has no larger size either
    """
    for layer in model.modules():
        if isinstance(layer, Attention) and not layer.attn_backend.supports_head_size(layer.head_size):
            _fill(layer, body)
        if isinstance(layer, RotaryEmbeddingBase) and _fails(layer):
            layer._forward_method = layer.forward_native


def _fails(layer: Any) -> bool:
    """Whether the kernel that rotates this layer's heads would store a half where it must not."""
    is_narrow = layer.dtype in (torch.bfloat16, torch.float16)
    return current_platform.is_cpu() and is_narrow and layer.rotary_dim // 2 % STORED_AT_ONCE != 0


def _fill(layer: Any, body: Body) -> None:
    size = layer.head_size
    known = layer.attn_backend.get_supported_head_sizes()
    larger = [known_size for known_size in known if known_size > size]
    if not larger or layer.head_size_v != size:
        raise BadSetting(
            f"member '{body.member}' has attention heads of size {size}.",
            f"This machine's attention kernels know {', '.join(map(str, known))}.",
            "use the transformers engine, or another device.",
        )
    wide = min(larger)

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value = args  # models hand on these three, by position
        return tuple(pad_heads(part, size, wide) for part in (query, key, value))

    def narrow(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return cut_heads(output, size, wide)

    layer.head_size = layer.head_size_v = layer.impl.head_size = wide
    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(narrow)


def pad_heads(states: Tensor, size: int, wide: int) -> Tensor:
    """[token, heads * size] with zeros behind each head: [token, heads * wide]."""
    heads = states.reshape(states.shape[0], -1, size)
    return torch.nn.functional.pad(heads, (0, wide - size)).flatten(1)


def cut_heads(states: Tensor, size: int, wide: int) -> Tensor:
    """[token, heads * wide] without what `pad_heads` added: [token, heads * size]."""
    return states.view(states.shape[0], -1, wide)[..., :size].flatten(1)
