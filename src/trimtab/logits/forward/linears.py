"""Matrix products on few rows, and forwards that stand in for modules while a group reads.

A step of a generation multiplies one row by each weight matrix, a verification or a joint forward a few. Reading the
weights is then all the work. On CPUs torch hands float32 products to MKL, which for one row uses one thread and half of
the memory's speed, and on some processors takes twice as long for two rows as for one. As a batch of parts of the
matrix MKL does one or two rows at full speed; oneDNN, which torch also holds, does a few more at the price of one.
`python -m bench onepass` measures them side by side.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.core.errors import BadSetting

# Below so many multiplications oneDNN's start costs more than it saves.
ONEDNN_PAYS = 2**20
# Up to so many rows, of matrices of at least so many numbers, a batch of so many parts is the quickest; not where the
# parts are much wider than high.
FEW_ROWS, PARTS_PAY, PARTS, WIDEST = 2, 2**18, 8, 8


class PatchedForward:
    """A forward that stands in for a module's own while a group reads."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out]: by torch's own product or a quicker one."""
    rows, size = x.numel() // x.shape[-1], weight.numel()
    if size >= PARTS_PAY and rows <= FEW_ROWS and _has_parts(weight) and _is_plain(x, weight):
        return _in_parts(x, weight, bias)
    if size * rows >= ONEDNN_PAYS and has_onednn() and _is_plain(x, weight):
        # The operation that torch.compile uses for inference: it knows no gradients.
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return nn.functional.linear(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    is_float = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return is_float and not torch.is_grad_enabled()


def _has_parts(weight: Tensor) -> bool:
    return weight.shape[0] % PARTS == 0 and weight.shape[1] <= WIDEST * weight.shape[0] and weight.is_contiguous()


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    parts, columns = weight.view(PARTS, out // PARTS, width), x.reshape(-1, width).T  # [in, row]
    result = torch.bmm(parts, columns.expand(PARTS, -1, -1)).view(out, -1).T.reshape(*x.shape[:-1], out)
    return result if bias is None else result.add_(bias)


@functools.cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN and its product of dense matrices."""
    is_there: Callable[[], bool] = torch.backends.mkldnn.is_available
    return is_there() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FewRows(PatchedForward):
    """The forward of an `nn.Linear`, by `linear`."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._module.weight, self._module.bias)


def quick_linears(model: nn.Module) -> dict[nn.Module, PatchedForward]:
    """Stand-ins for the linear layers of a model on the CPU that are large enough to gain."""
    return {
        module: FewRows(module)
        for module in model.modules()
        # Smaller ones gain from 64 rows on only, and standing in costs something, too.
        if type(module) is nn.Linear
        and is_free(module)
        and module.weight.device.type == "cpu"
        and module.weight.numel() * 64 >= ONEDNN_PAYS
    }


def is_free(module: nn.Module) -> bool:
    """True unless another library, such as accelerate, has replaced this module's forward."""
    return isinstance(vars(module).get("forward"), PatchedForward | None)  # another thread may be reading just now


class ForwardHooks:
    """Notices who listens to some models, or computes in their place: hooks, and forwards put into single modules."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._modules = [module for model in models for module in model.modules()]
        # The tables themselves, which are empty as long as there is no hook: to look into them costs little.
        self._hooks = [hooks for own in self._modules for hooks in (own._forward_hooks, own._forward_pre_hooks)]

    @property
    def finding(self) -> str:
        """What keeps the models from being read in one forward; empty when nothing does."""
        if any(self._hooks):
            return "forward hooks"
        if any("forward" in vars(module) and not is_free(module) for module in self._modules):
            return "forwards that another library replaced"
        return ""

    def check(self) -> None:
        """Raises BadSetting if there are any: they would meet the rows of several members at once, or none."""
        if found := self.finding:
            raise BadSetting(
                f"a small member has {found}, but several are read in one forward.",
                "They would meet the rows of all of them, or none.",
                "set one_pass=False on the fused model.",
            )


def changed(reason: str) -> BadSetting:
    """The error for members that were changed so that they cannot be read in one forward any more."""
    return BadSetting(
        f"small members that are read in one forward have been changed: {reason}.",
        "Weights may be replaced by others of the same kind; which members go together is decided before.",
        "set fused.one_pass again, for example to itself: it sorts the members anew.",
    )


@contextmanager
def patched(forwards: Mapping[nn.Module, PatchedForward]) -> Iterator[None]:
    """Modules compute with these forwards within the block, and are as they were after it; see `turns` for threads.

    A module whose forward another library replaced in the meantime keeps that one.
    """
    taken = {module: forward for module, forward in forwards.items() if is_free(module)}
    for module, forward in taken.items():
        # Past nn.Module.__setattr__, which takes longer; a forward of the instance goes before the class's.
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward in taken.items():
            if vars(module).get("forward") is forward:
                del vars(module)["forward"]
