"""One forward for several adapters on one model: the batch once per run, each copy through its own adapter.

The base's matrices are read once for all copies; what an adapter adds is computed on its own rows. peft offers the same
as `adapter_names` (mixed batches). It gathers and scatters rows in every layer for that; here the copies lie one after
the other, so that a slice and a batched product do, and adapters of one rank share a pair of products.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.logits.forward.linears import ForwardHooks, PatchedForward, changed, linear, patched, quick_linears
from trimtab.models.adapters import AdapterSwitch, switch_on
from trimtab.models.locks import model_lock
from trimtab.models.shared_storage import BUILDING, ChangeDetector, stack_parameters_


class AdapterRows:
    """The body of a group whose runs share one model.

    model       with all adapters on it
    adapters    per copy of the batch: the adapter's name; None: the bare model
    """

    def __init__(self, model: Any, adapters: Sequence[str | None]) -> None:
        self._model, self._adapters = model, tuple(adapters)
        self._build()

    def _build(self) -> None:
        with BUILDING:
            self._build_alone()

    def _build_alone(self) -> None:
        self._listeners, switch = ForwardHooks([self._model]), switch_on(self._model)
        layers = switch.layers if switch is not None else []
        adapted = {layer: AdaptedLinear(layer, self._adapters) for layer in layers}
        bases = {layer.base_layer for layer in layers}  # an adapted layer sees to its base itself
        quick = {module: forward for module, forward in quick_linears(self._model).items() if module not in bases}
        self._forwards: dict[nn.Module, PatchedForward] = {**quick, **adapted}
        self._watch = ChangeDetector([self._model])

    def __call__(self, **inputs: Any) -> Any:
        with model_lock(self._model):
            if not self._watch.is_current:
                self._rebuild()
            self._listeners.check()
            with patched(self._forwards):
                return self._model(**inputs)

    def _rebuild(self) -> None:
        """After weights were set anew or loaded again, adapters were added, or the model moved."""
        switch = switch_on(self._model)
        if switch is not None:
            switch.refresh()
        if reason := why_not(switch, self._adapters):
            raise changed(reason)
        self._build()


class Span:
    """Neighbouring copies with adapters of one rank in a layer: their factors, stacked.

    The adapters' parameters become views of the stack, so that memory holds them once.

    A    [copy, rank, in]
    B    [copy, out, rank]
    """

    def __init__(self, layer: Any, start: int, names: Sequence[str]) -> None:
        self.start, self.end = start, start + len(names)
        self._layer, self._names = layer, tuple(names)  # for the scaling, which may change
        self.A = stack_parameters_([layer.lora_A[name].weight for name in names])
        self.B = stack_parameters_([layer.lora_B[name].weight for name in names])

    @property
    def scaling(self) -> float | Tensor:
        """What the adapters are multiplied by: one number, or [copy, 1, 1]."""
        scales = [self._layer.scaling[name] for name in self._names]
        if all(scale == scales[0] for scale in scales):
            return float(scales[0])
        return torch.tensor(scales, dtype=self.A.dtype, device=self.A.device).view(-1, 1, 1)

    def add_(self, result: Float[Tensor, "copy row out"], x: Float[Tensor, "copy row in"]) -> None:
        """Adds to the result what the adapters make of x."""
        scaling = self.scaling
        narrow = torch.bmm(x.to(self.A.dtype), self.A.transpose(1, 2))  # [copy, row, rank]
        if isinstance(scaling, float) and result.dtype == self.B.dtype:
            result.baddbmm_(narrow, self.B.transpose(1, 2), alpha=scaling)
        else:
            result.add_(torch.bmm(narrow, self.B.transpose(1, 2)) * scaling)


class AdaptedLinear(PatchedForward):
    """The forward of one of peft's LoRA layers in which every copy of the batch has its own adapter, or none."""

    def __init__(self, layer: Any, adapters: Sequence[str | None]) -> None:
        self._layer, self._copies = layer, len(adapters)
        self._base = layer.base_layer
        self._is_linear = type(self._base) is nn.Linear
        # Adapters that sit elsewhere only leave this layer bare.
        factors = [layer.lora_A[name].weight if name in layer.lora_A else None for name in adapters]
        kinds: list[Any] = [None if factor is None else (factor.shape, factor.dtype) for factor in factors]
        for index, name in enumerate(adapters):
            if name in adapters[:index] and kinds[index] is not None:
                kinds[index] = index  # an adapter that is read twice cannot lie in a stack twice
        self.spans: list[Span] = []
        for kind, indices in groupby(range(len(adapters)), key=lambda index: kinds[index]):
            copies = list(indices)
            if kind is not None:
                self.spans.append(Span(layer, copies[0], [str(adapters[copy]) for copy in copies]))

    def __call__(self, x: Tensor) -> Tensor:
        if self._layer.merged:
            self._layer.unmerge()  # as peft does where the bare model is asked for
        result = linear(x, self._base.weight, self._base.bias) if self._is_linear else self._base(x)
        if self.spans:
            # [copy, row, width]: copies are outermost, also where a model has flattened rows and time to one axis.
            inputs, sums = x.reshape(self._copies, -1, x.shape[-1]), result.view(self._copies, -1, result.shape[-1])
            for span in self.spans:
                span.add_(sums[span.start : span.end], inputs[span.start : span.end])
        return result


def why_not(switch: AdapterSwitch | None, adapters: Sequence[str | None]) -> str:
    """What keeps these adapters of one model from being read in one forward; empty when nothing does."""
    from peft.tuners.lora.layer import Linear

    if switch is None:
        return ""
    if switch.wrappers:
        return "an adapter brings whole layers of its own (modules_to_save)"
    names = {name for name in adapters if name is not None}
    gone = names - {name for layer in switch.layers for name in getattr(layer, "lora_A", ())}
    if gone and all(type(layer) is Linear for layer in switch.layers):
        return f"adapter '{min(gone)}' is not on the model"
    for layer in switch.layers:
        if type(layer) is not Linear:
            return f"an adapter sits on a layer of type {type(layer).__name__} ({type(layer).__module__})"
        here = names & set(layer.lora_A)
        if here & set(getattr(layer, "lora_variant", {})):
            return "an adapter is of another kind than plain LoRA (DoRA, for example)"
        if any(layer.lora_B[name].bias is not None for name in here):
            return "an adapter has biases"
    return ""
