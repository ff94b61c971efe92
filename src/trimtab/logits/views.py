"""Parameters of several models or adapters in one tensor: memory holds them once, and one product reads them all."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def stack_(weights: Sequence[nn.Parameter]) -> Float[Tensor, "copy ..."]:
    """The weights in one tensor, of which they are views from then on; values and shapes stay as they are.

    Weights that lie one after the other already, in this order, stay there: two fused models may share members.
    """
    found = _as_they_lie(weights)
    if found is not None:
        return found
    stack = torch.stack([weight.data for weight in weights])
    for place, weight in enumerate(weights):
        weight.data = stack[place]
    return stack


def are_views(stack: Float[Tensor, "copy ..."], weights: Sequence[Tensor]) -> bool:
    """Whether these are the stack's parts still: moving a model gives its parameters memory of their own."""
    return all(part.data_ptr() == weight.data_ptr() for part, weight in zip(stack, weights, strict=True))


def _as_they_lie(weights: Sequence[nn.Parameter]) -> Tensor | None:
    first = weights[0].data
    step, storage = first.numel(), first.untyped_storage().data_ptr()
    for place, weight in enumerate(weights):
        is_next = weight.data.storage_offset() == first.storage_offset() + place * step
        if not is_next or not weight.is_contiguous() or weight.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()), first.storage_offset())
