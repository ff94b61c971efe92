"""Attention heads of a size that the engine's kernels lack, padded with zeros to one that they have.

vLLM's CPU kernels know few head sizes (32, 64, ...); small experts often have others. Zeros added to queries and keys
leave every score as it was (the scale is the model's own), and those added to values come out as zeros, which are cut:
the result is exact, at the price of a wider key-value cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from trimtab.core.errors import BadSetting
from trimtab.serving.vllm.plan import Body


def pad_attention(model: nn.Module, body: Body) -> None:
    """Widens every attention layer of a body whose head size its backend lacks.

    raises    BadSetting when the backend has no larger size either
    """
    for layer in model.modules():
        if isinstance(layer, Attention) and not layer.attn_backend.supports_head_size(layer.head_size):
            _widen(layer, body)


def _widen(layer: Any, body: Body) -> None:
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
    """[token, heads * size] with zeros after each head: [token, heads * wide]."""
    heads = states.reshape(states.shape[0], -1, size)
    return torch.nn.functional.pad(heads, (0, wide - size)).flatten(1)


def cut_heads(states: Tensor, size: int, wide: int) -> Tensor:
    """[token, heads * wide] without what `pad_heads` added: [token, heads * size]."""
    return states.view(states.shape[0], -1, wide)[..., :size].flatten(1)
