"""Parameters of several models or adapters in one tensor: memory holds them once, and one product reads them all.

A weight that is changed in place changes in the tensor, too. One that is replaced does not, so `ChangeDetector` looks.
"""

import threading
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Two fused models may share members: while one makes views of their weights, another must not.
BUILDING = threading.RLock()


def stack_parameters_(weights: Sequence[nn.Parameter]) -> Float[Tensor, "copy ..."]:
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


class ModuleChangeDetector:
    """Notices when a module of some models was added, replaced or taken away."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        # The tables themselves: to look into them takes a fraction of a walk through the modules.
        modules = [module for model in models for module in model.modules()]
        self._tables = [module._modules for module in modules if module._modules]
        self._found = self._children()

    def _children(self) -> list[nn.Module | None]:
        return [child for table in self._tables for child in table.values()]

    @property
    def is_current(self) -> bool:
        """Whether every module is the one that it was."""
        return self._children() == self._found  # modules are equal where they are the same


class ChangeDetector:
    """Notices when a weight of some models, or a module, was replaced: set anew, moved, loaded again."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = [module for model in models for module in model.modules()]
        self._tree = ModuleChangeDetector(models)
        self._tables = [module._parameters for module in modules if module._parameters]
        self._found = self._places()

    def _places(self) -> list[int]:
        return [weight.data_ptr() for table in self._tables for weight in table.values() if weight is not None]

    @property
    def is_current(self) -> bool:
        """Whether every weight lies where it lay; what was changed in place counts as unchanged."""
        return self._tree.is_current and self._places() == self._found


def _as_they_lie(weights: Sequence[nn.Parameter]) -> Tensor | None:
    first = weights[0].data
    step, storage = first.numel(), first.untyped_storage().data_ptr()
    for place, weight in enumerate(weights):
        is_next = weight.data.storage_offset() == first.storage_offset() + place * step
        if not is_next or not weight.is_contiguous() or weight.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()), first.storage_offset())
