"""Which runs are read in one forward: small models that share their weights, or have equal architecture.

The strong model always has a group of its own: it is not small, and speculation reads it at other times.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from trimtab.core.errors import BadSetting
from trimtab.logits.forward import mixed_adapters, stacking
from trimtab.logits.forward.groups import ForwardGroup, ForwardInputs, OneModel
from trimtab.logits.forward.linears import ForwardHooks
from trimtab.logits.forward.memories import Memory
from trimtab.logits.forward.mixed_adapters import AdapterRows
from trimtab.logits.forward.stacking import Stack
from trimtab.models.adapters import switch_on
from trimtab.models.ancestry import is_plain
from trimtab.models.loading import Member

OnePass = bool | str  # True, False, "auto"
# Stacking saves the start of each operation and no byte that is read: measured by `python -m bench onepass`. Of few
# members it saves little more than drafts lose by it, where all are read at every drafted token and one would do.
STACKING_PAYS_BYTES, STACKING_MANY_PAYS_BYTES = 2**24, 2**27  # parameters of one member
MANY = 4  # members
# The joint logits of a probe may differ from the separate ones by so much of the largest, at these number types.
MOST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Runs whose own logits differ by less than this share of their norm count as the same: some times the rounding of a
# joint forward, which for two blocks of width 32 was 4e-7, 1.3e-3 and 1.2e-2 in float32, float16 and bfloat16.
SAME = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(one_pass: Any) -> OnePass:
    """The setting, if it is one; raises BadSetting."""
    if not isinstance(one_pass, bool) and one_pass != "auto":
        raise BadSetting(f"one_pass is {one_pass!r}.", 'Known: "auto", True, False.', "leave it out, for auto.")
    return one_pass  # type: ignore[no-any-return]


class ForwardGrouping:
    """Sorts runs into groups.

    one_pass    True: join whatever can be joined; "auto": what it pays to join; False: every run by itself
    """

    def __init__(self, runs: Sequence[Member], one_pass: OnePass) -> None:
        self._runs, self._one_pass = runs, check(one_pass)
        self._reasons: dict[int, str] = {}

    def groups(self) -> list[ForwardGroup]:
        """The groups, the strong model's first, then in the order of their first runs.

        raises    BadSetting where one_pass=True and a small run cannot be read together with any other
        """
        small = range(1, len(self._runs))
        joint: list[ForwardGroup] = []
        if self._one_pass is not False and len(small) > 1:
            joint += self._joined(small, lambda run: id(run.model), self._adapter_group)
            bodies = Counter(id(self._runs[index].model) for index in small)
            single = [index for index in small if bodies[id(self._runs[index].model)] == 1]
            bare = [index for index in single if self._runs[index].adapter is None]
            joint += self._joined(bare, _architecture, self._stacked_group)
        taken = {index for group in joint for index in group.runs}
        groups = joint + [self._alone(index) for index in range(len(self._runs)) if index not in taken]
        if self._one_pass is True:
            _demand_joint([group for group in groups if group.runs[0] > 0 and group.reason])
        return sorted(groups, key=lambda group: group.runs[0])

    def _alone(self, index: int) -> ForwardGroup:
        run = self._runs[index]
        reason = self._reasons.get(index, "")
        if not reason and index > 0 and len(self._runs) > 2:
            reason = "one_pass is off" if self._one_pass is False else "no other small run has its architecture"
        return ForwardGroup([index], [run], OneModel(run), reason=reason)

    def _joined(
        self,
        positions: Iterable[int],
        key: Callable[[Member], Hashable],
        make: Callable[[list[int]], ForwardGroup | str],
    ) -> list[ForwardGroup]:
        """Groups of the runs that agree in a key, where `make` gives one and no reason against it."""
        alike: dict[Hashable, list[int]] = {}
        for index in positions:
            alike.setdefault(key(self._runs[index]), []).append(index)
        found = []
        for indices in alike.values():
            if len(indices) == 1:
                continue
            group = _why_not_any([self._runs[index].model for index in indices]) or make(indices)
            if isinstance(group, ForwardGroup):
                group = self._difference(group) or group
            if isinstance(group, ForwardGroup):
                found.append(group)
            else:
                self._reasons |= dict.fromkeys(indices, group)
        return found

    def _adapter_group(self, positions: list[int]) -> ForwardGroup | str:
        members = [self._runs[index] for index in positions]
        model = members[0].model
        adapters = [member.adapter for member in members if not isinstance(member.adapter, tuple)]
        if len(adapters) < len(members):
            return "a member has several adapters on at once"
        reason = mixed_adapters.why_not(switch_on(model), adapters)
        return reason or ForwardGroup(positions, members, AdapterRows(model, adapters), "adapters")

    def _stacked_group(self, positions: list[int]) -> ForwardGroup | str:
        members = [self._runs[index] for index in positions]
        models = [member.model for member in members]
        reason = stacking.why_not(models[0])
        if not reason and self._one_pass == "auto":
            reason = _why_no_gain(models)
        return reason or ForwardGroup(positions, members, Stack(models), "stacked")

    def _difference(self, group: ForwardGroup) -> str:
        """How a joint forward differs from the runs' own on a few tokens, with a cache and without; empty: not at all.

        A model may use its weights in a way that no list of modules tells of.
        """
        try:
            joint = _probe(group)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"a joint forward fails: {error}"
        alone = [_probe(self._alone(index))[0] for index in group.runs]
        dtype = group.members[0].model.dtype
        most, same = (table.get(dtype, table[torch.bfloat16]) for table in (MOST_DIFFERENCE, SAME))
        if not all(_largest(found - own) <= most * _largest(own) for found, own in zip(joint, alone, strict=True)):
            return "a joint forward gives other logits"
        return "a joint forward mixes its runs up" if _are_mixed_up(joint, alone, same) else ""


def _architecture(run: Member) -> Hashable:
    # A model that carries adapter layers has other parameter names, and so another key.
    return repr(stacking.kind_of(run.model))


def _why_not_any(models: Sequence[Any]) -> str:
    """What keeps models from being read in one forward, whichever way; empty when nothing does."""
    model = models[0]
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if not all(is_plain(model) for model in models):
        return "its weights are packed by quantization"
    if found := ForwardHooks(models).finding:
        return f"it has {found}"
    memory = Memory(model)
    is_usual = memory.keyword == "past_key_values"
    if not is_usual or not all(isinstance(layer, DynamicLayer) for layer in memory.new_cache().layers):
        return "the model remembers in another way than by attention"
    return ""


def _why_no_gain(models: Sequence[Any]) -> str:
    model, most = models[0], STACKING_MANY_PAYS_BYTES if len(models) >= MANY else STACKING_PAYS_BYTES
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if model.device.type != "cpu":
        return f"on {model.device.type} nothing was measured yet: one_pass=True joins"
    if size > most:
        return f"{size / 2**20:.0f} MiB of weights take longer to read than operations to start: one_pass=True joins"
    return ""


def _probe(group: ForwardGroup) -> list[Tensor]:
    """Logits of every run on two rows of three tokens, the last of them read with a cache, in float32 at least."""
    ids = torch.arange(6).view(2, 3) * 7 % group.members[0].rows
    view, mask = group.new_group_cache(), torch.ones_like(ids)
    positions = torch.arange(3).expand(2, 3)
    first = ForwardInputs(ids[:, :2], mask[:, :2], positions[:, :2], 2)
    last = ForwardInputs(ids[:, 2:], mask, positions[:, 2:], 3)
    parts = [group.read([feed] * len(group.runs), view) for feed in (first, last)]
    joined = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
    return [logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in joined]


def _largest(logits: Tensor) -> float:
    return float(logits.abs().max())


def _are_mixed_up(joint: Sequence[Tensor], alone: Sequence[Tensor], same: float) -> bool:
    """Whether any run's joint logits are as near to another run's own as to its own, where those two differ.

    same    they do not where they differ by less than this share of their norm: rounding then decides which is nearer
    """
    for found, own in zip(joint, alone, strict=True):
        others = [other for other in alone if float((other - own).norm()) > same * float(own.norm())]
        away = float((found - own).norm())
        if any(float((found - other).norm()) <= away for other in others):
            return True
    return False


def _demand_joint(alone: Sequence[ForwardGroup]) -> None:
    if alone:
        found = "; ".join(f"'{group.members[0].name}': {group.reason}" for group in alone)
        raise BadSetting(
            f"one_pass is True, but not all small members can be read in one forward. {found}.",
            "Adapters on one base and full models of equal architecture can.",
            'pass one_pass="auto".',
        )
