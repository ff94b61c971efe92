"""Nothing that is done to logits waits for the device, or depends on what the logits are.

The strategies run on tensors of the device "meta", which have shapes and no numbers; to the code they are on a device
that is not the CPU. Whoever asks such a tensor for a value fails. Copies between host and device, which wait as well,
and operations whose result has a size that depends on values are noted one by one. So what passes here does the same
work whatever the numbers: it may be captured in a CUDA graph, and never stops the queue of a device.

Fusion with settings per request sends small tables to the device, such as which rows go together: by copies that do not
wait, which are told apart from those that do.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.logits.registry import AMOUNTS, CHOOSERS, DEFAULT_CHOOSER
from trimtab.logits.solver.hermite import points
from trimtab.logits.speculation.draft import drafter_for
from trimtab.logits.strategy.fusion import make_strategy
from trimtab.serving.batch_fusion import draft_rows, fuse_rows
from trimtab.serving.requests import NOTHING_SET, RequestSettings
from trimtab.serving.steering import RowOwners, Steering

NAMES = ("math", "facts")
ROWS, VOCAB = 5, 40
# Their results have sizes that only the device knows, or they are values on the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func.overloadpacket.__name__
        flat = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        made = func(*args, **(kwargs or {}))
        if name in WAITING or any(part.dtype == torch.bool for part in self._indices(name, args)):
            self.found.append(name)
        is_queued = (kwargs or {}).get("non_blocking", False) and made.device.type != "cpu"
        if isinstance(made, torch.Tensor) and not is_queued and any(self._is_moved(part, made) for part in flat):
            self.found.append(f"{name} from {flat[0].device} to {made.device}")
        return made

    def _indices(self, name, args):
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return []
        return [index for index in args[1] if index is not None]

    def _is_moved(self, part, made):
        # A number of Python's own, wrapped, goes along with the kernel.
        return part.device != made.device and part.ndim > 0


class Tables(TorchFunctionMode):
    """Notes tables of the host's that are made on a device, or used as indices there: a copy that no kernel shows."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor and str((kwargs or {}).get("device", "cpu")) != "cpu":
            self.found.append("torch.tensor on a device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if args[0].device.type != "cpu" and any(isinstance(part, list) for part in index):
                self.found.append("a list as index")
        return func(*args, **(kwargs or {}))


def waits(work, *shapes):
    """What of `work` would wait, on tensors of these shapes that lie on no device."""
    points(torch.float64, torch.device("meta"))  # a table that is made once and kept: that may wait
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with Waits() as noted, Tables(noted.found):
        work(tensors)
    assert noted.seen > 1
    return noted.found


def all_strategies():
    """Every amount with the default chooser, every chooser with an amount that takes it, alphas by name."""
    settings = {"only": {"expert": "facts"}}
    pairs = [(amount, DEFAULT_CHOOSER, {}) for amount in AMOUNTS]
    pairs += [("static", chooser, settings.get(chooser, {})) for chooser in CHOOSERS]
    pairs += [(amount, "sum", {}) for amount in ("filter", "product", "mixture")]
    pairs += [("dynamic", "confident", {}), ("cautious", "confident", {}), ("filter", "confident", {})]
    by_name = {"alpha": {"math": 1.0, "facts": 0.5}}
    pairs += [("static", chooser, by_name) for chooser in (DEFAULT_CHOOSER, "confident", "sum")]
    return pairs


@pytest.mark.parametrize(("amount", "chooser", "settings"), all_strategies())
def test_no_strategy_waits_for_the_device(amount, chooser, settings):
    strategy = make_strategy(amount, chooser, NAMES, **settings)
    shapes = [(ROWS, VOCAB + 3)] * 4
    assert waits(lambda logits: fuse_rows(logits, (0, 1, 2, 3), strategy, VOCAB), *shapes) == []


@pytest.mark.parametrize("rule", ["math", "mixture", "fused"])
def test_no_drafter_waits_for_the_device(rule):
    drafter = drafter_for(rule, NAMES, make_strategy("dynamic", DEFAULT_CHOOSER, NAMES), torch.zeros(2))
    shapes = [(ROWS, VOCAB)] * len(drafter.members)
    body_of = tuple(range(len(shapes)))
    assert waits(lambda logits: draft_rows(logits, body_of, drafter, VOCAB), *shapes) == []


SETTINGS = [
    NOTHING_SET,
    RequestSettings(0.5),
    RequestSettings(experts=("facts",)),
    RequestSettings(0.0, ("math",)),
    RequestSettings(numbers=(("alpha_max", 0.2),)),
]


@dataclasses.dataclass
class Mixed:
    """Rows of unlike settings, the last of which are not counted; none is traced."""

    settings: list[RequestSettings]

    def of(self, hidden_states):
        return RowOwners(self.settings, [None] * ROWS, [0] * ROWS, [True] * (ROWS - 2) + [False] * 2)


@pytest.mark.parametrize("chooser", [DEFAULT_CHOOSER, "confident", "sum"])
def test_no_mixture_of_settings_waits_for_the_device(chooser):
    strategy = make_strategy("static" if chooser == "sum" else "dynamic", chooser, NAMES)
    plan = SimpleNamespace(strategy=strategy, vocab_size=VOCAB, body_of=(0, 1, 2, 3))
    # A fixed alpha is no number that a request may set.
    settings = [dataclasses.replace(asked, numbers=()) if chooser == "sum" else asked for asked in SETTINGS]
    steering = Steering(plan, Mixed(settings))

    def work(logits):
        assert steering.fuse(logits, logits[0]).shape == (ROWS, VOCAB)
        assert steering.histograms._sums

    assert waits(work, *[(ROWS, VOCAB)] * 4) == []


def plus(mistake):
    def work(logits):
        fuse_rows(logits, (0, 1, 2, 3), make_strategy("static", expert_names=NAMES), VOCAB)
        mistake(logits[0])

    return work


ASKING = {
    "for a value": lambda scores: scores.sum().item(),
    "which way to go": lambda scores: bool((scores > 0).any()),
    "which rows to keep": lambda scores: scores[scores[:, 0] > 0],
    "for places": lambda scores: (scores[:, 0] > 0).nonzero(),
    "for a copy on the host": lambda scores: scores.cpu(),
}


@pytest.mark.parametrize("mistake", ASKING)
def test_asking_the_device_fails(mistake):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        waits(plus(ASKING[mistake]), *[(ROWS, VOCAB)] * 4)


TABLES = {
    "a list as index": lambda scores: scores[[2, 0]],
    "torch.tensor on a device": lambda scores: scores + torch.tensor([1.0] * VOCAB, device=scores.device),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_host_are_noted(name):
    assert waits(plus(TABLES[name]), *[(ROWS, VOCAB)] * 4) == [name]


def test_copies_to_the_device_are_noted():
    found = waits(plus(lambda scores: scores + torch.tensor([1.0] * VOCAB).to("meta")), *[(ROWS, VOCAB)] * 4)
    assert found == ["_to_copy from cpu to meta"]
