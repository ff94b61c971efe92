"""One forward for models of equal architecture: their weights stacked, each copy of the batch through its own.

The first model is the frame: its code runs once on all copies, and while it does, forwards stand in for its modules
that use the stack. The models' own parameters become views of the stack: memory holds the weights once, and each model
still works, trains and saves alone. The idea is that of model ensembling in `torch.func` (stack_module_state and vmap);
with stand-ins the frame keeps its caches, its masks and its attention kernels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.logits.forward.linears import ForwardHooks, PatchedForward, changed, linear, patched
from trimtab.models.locks import model_lock
from trimtab.models.shared_storage import BUILDING, ChangeDetector, stack_parameters_

# Found by measurement, see `python -m bench onepass`: which product of a stack of matrices is the quickest on a CPU.
SMALL_MATRIX = 2**18  # numbers; a batched product of smaller ones saves the start of each
FEW_ROWS = 2  # up to so many rows per copy, large matrices are quickest from the left
MANY_MULTIPLICATIONS = 2**20  # per copy: from here on products one by one are the quickest


class Stack:
    """The body of a group whose runs are different models of equal architecture.

    A weight lies in one stack at a time. Two fused models that share members, but stack them with others, take them
    from one another whenever they are read in turn: each time all weights of the stack are copied. Where two such
    models take turns often, one of them is better set to one_pass=False.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self._models = list(models)
        self._build()

    def _build(self) -> None:
        with BUILDING:
            self._build_alone()

    def _build_alone(self) -> None:
        self._listeners = ForwardHooks(self._models)
        frame, parameters = self._models[0], [dict(model.named_parameters()) for model in self._models]
        # A matrix that is tied to another is one parameter and is stacked once.
        self._stacks = {name: stack_parameters_([own[name] for own in parameters]) for name in parameters[0]}
        stack_of = {id(parameter): self._stacks[name] for name, parameter in parameters[0].items()}
        self._forwards: dict[nn.Module, PatchedForward] = {}
        for module in _holders(frame):
            own = {name: stack_of[id(part)] for name, part in module.named_parameters(recurse=False)}
            self._forwards[module] = _maker(module)(module, own)  # type: ignore[misc]
        self._watch = ChangeDetector(self._models)

    def __call__(self, **inputs: Any) -> Any:
        frame = self._models[0]
        with model_lock(frame):
            if not self._watch.is_current:
                self._rebuild()
            self._listeners.check()
            with patched(self._forwards):
                return frame(**inputs)

    def _rebuild(self) -> None:
        """After weights were set anew or loaded again, or all models went to another device or number type."""
        kinds = {repr(kind_of(model)) for model in self._models}
        reason = "they are no longer of one architecture, number type and device" if len(kinds) > 1 else ""
        if reason := reason or why_not(self._models[0]):
            raise changed(reason)
        self._build()


# ---- stand-ins, each made from (module, {parameter: stack [copy, ...]})


class StackedLinear(PatchedForward):
    """x [copy * batch, ..., in] times each copy's own weight."""

    def __init__(self, module: nn.Module, stacks: Mapping[str, Tensor]) -> None:
        weights, self._bias = stacks["weight"], stacks.get("bias")
        # GPT-2's layers hold [in, out].
        self._weights = weights.transpose(1, 2) if isinstance(module, Conv1D) else weights  # [copy, out, in]

    def __call__(self, x: Tensor) -> Tensor:
        copies, out, width = self._weights.shape
        bias = None if self._bias is None else self._bias.unsqueeze(1)  # [copy, 1, out]
        result = _products(x.reshape(copies, -1, width), self._weights, bias)
        return result.view(*x.shape[:-1], out)


def _products(
    x: Float[Tensor, "copy row in"], weights: Float[Tensor, "copy out in"], bias: Float[Tensor, "copy 1 out"] | None
) -> Float[Tensor, "copy row out"]:
    copies, rows, width = x.shape
    size = weights.shape[1] * width
    if size * rows >= MANY_MULTIPLICATIONS and rows > FEW_ROWS:
        biases = [None] * copies if bias is None else list(bias.flatten(1))
        return torch.stack([linear(x[copy], weights[copy], biases[copy]) for copy in range(copies)])
    if size >= SMALL_MATRIX and rows <= FEW_ROWS:
        result = torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2).contiguous()
        return result if bias is None else result.add_(bias)
    if bias is None:
        return torch.bmm(x, weights.transpose(1, 2))
    return torch.baddbmm(bias, x, weights.transpose(1, 2))


class StackedEmbedding(PatchedForward):
    """Each copy's rows from its own table: the tables are one, and ids are shifted to their part of it."""

    def __init__(self, module: nn.Module, stacks: Mapping[str, Tensor]) -> None:
        tables = stacks["weight"]
        self._copies, self._size = tables.shape[:2]
        self._twin = _twin(module, tables.flatten(0, 1))

    def __call__(self, ids: Tensor) -> Tensor:
        is_outside = (ids < 0) | (ids >= self._size)  # shifted, it would be a row of another copy
        if bool(is_outside.any()):
            raise IndexError(f"token id {int(ids[is_outside][0])} is not among the {self._size} rows of an embedding.")
        starts = torch.arange(0, self._copies * self._size, self._size, device=ids.device)
        shifted = ids.reshape(self._copies, -1) + starts.unsqueeze(1)
        return self._twin.forward(shifted.view(ids.shape))  # type: ignore[no-any-return]


class StackedLayerNorm(PatchedForward):
    """The norm without weights, then each copy's own scale and shift."""

    def __init__(self, module: nn.LayerNorm, stacks: Mapping[str, Tensor]) -> None:
        self._shape, self._eps, self._stacks = module.normalized_shape, module.eps, stacks

    def __call__(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, self._shape, None, None, self._eps)
        for name, stack in self._stacks.items():
            spread = _spread(stack, x)
            normed = normed * spread if name == "weight" else normed + spread
        return normed


class StackedNorm(PatchedForward):
    """A module that scales by its weight, whatever else it does: its own code, on a weight per row."""

    def __init__(self, module: nn.Module, stacks: Mapping[str, Tensor]) -> None:
        self._stack = stacks["weight"]
        self._twin = _twin(module, self._stack)

    def __call__(self, x: Tensor) -> Tensor:
        self._twin._parameters["weight"] = _spread(self._stack, x)
        return self._twin.forward(x)  # type: ignore[no-any-return]


def _twin(module: nn.Module, weight: Tensor) -> Any:
    """A module of the same kind and settings with another weight."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {"weight": weight}
    vars(twin).pop("forward", None)  # a stand-in of another thread, which is reading just now
    return twin


def _spread(stack: Float[Tensor, "copy width"], x: Tensor) -> Tensor:
    """Each copy's vector for each of its rows, [copy * batch, 1, ..., width], to be multiplied with x."""
    copies, width = stack.shape
    rows = stack.repeat_interleave(x.shape[0] // copies, dim=0) if x.shape[0] != copies else stack
    return rows.view(x.shape[0], *[1] * (x.ndim - 2), width)


Maker = Callable[[Any, Mapping[str, Tensor]], PatchedForward]


def _maker(module: nn.Module) -> Maker | None:
    """What makes the stand-in of a module; None for a kind that is not known."""
    kinds: dict[type, Maker] = {
        nn.Linear: StackedLinear,
        Conv1D: StackedLinear,
        nn.Embedding: StackedEmbedding,
        nn.LayerNorm: StackedLayerNorm,
    }
    # transformers names such modules alike in all architectures.
    name, own = type(module).__name__, [name for name, _ in module.named_parameters(recurse=False)]
    if name.endswith("RMSNorm") and own == ["weight"]:
        return StackedNorm
    if name.endswith("ScaledWordEmbedding") and isinstance(module, nn.Embedding):
        return StackedEmbedding
    return kinds.get(type(module))


# ---- which models can be stacked

# What two configurations may differ in: names, and token ids that a forward does not look at.
FREE_SETTINGS = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
    "torch_dtype",
}


def kind_of(model: Any) -> Any:
    """What models that can be stacked with one another have in common."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in FREE_SETTINGS}
    shapes = [(name, part.shape, part.dtype, part.device) for name, part in model.named_parameters()]
    return (
        type(model),
        repr(sorted(config.items(), key=lambda pair: pair[0])),
        model.config._attn_implementation,
        shapes,
    )


def why_not(model: Any) -> str:
    """What keeps a model from being stacked with its like; empty when nothing does."""
    for module in _holders(model):
        if _maker(module) is None:
            return f"there is no stacked form of {type(module).__name__}"
    return ""


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules that hold parameters themselves."""
    return [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
