"""A strategy: how much of an expert's delta is added (amount), and which experts speak (chooser).

    strategy = make_strategy("dynamic", chooser="joint_objective", alpha_max=2.0)
    fusion = strategy(strong, base, experts)

A strategy is a pure function of one position's log-probabilities: it remembers nothing between steps, so that beams,
speculation, chunked prefill and scoring all see the same distribution.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.core.divergence import kl_nats
from trimtab.core.errors import BadSetting, MemberMismatch, unknown_name
from trimtab.core.registry import canonical, find, name_in
from trimtab.core.settings import Setting, make, reject_unknown, settings_of, values_of
from trimtab.logits.registry import AMOUNTS, CHOOSERS, DEFAULT_CHOOSER, FAMILIES
from trimtab.logits.solver.deltas import DeltaTargets, summed_objective
from trimtab.logits.solver.tilted import take_expert
from trimtab.logits.strategy.base import Amount, Chooser
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Fusion:
    """What a strategy made of one position.

    log_probs        [batch, vocab]   fused distribution, normalised
    alpha            [expert, batch]  0 for experts that do not speak; None for amounts that have no alpha
    is_chosen        [expert, batch]  who spoke
    kl_nats          [batch]          KL(fused || strong): how far the strong model was moved
    reverse_kl_nats  [batch]          KL(strong || fused); inf where the fused one rules out what the strong one allows
    """

    log_probs: Float[Tensor, "batch vocab"]
    alpha: Float[Tensor, "expert batch"] | None
    is_chosen: Bool[Tensor, "expert batch"]
    kl_nats: Float[Tensor, " batch"]
    reverse_kl_nats: Float[Tensor, " batch"]

    @classmethod
    def measured(
        cls,
        strong: Float[Tensor, "batch vocab"],
        log_probs: Float[Tensor, "batch vocab"],
        alpha: Float[Tensor, "expert batch"] | None,
        is_chosen: Bool[Tensor, "expert batch"],
    ) -> "Fusion":
        """A fused distribution with the divergences that it cost, in the strong model's type."""
        log_probs, strong = log_probs.to(strong.dtype), strong.log_softmax(dim=-1)
        alpha = None if alpha is None else alpha.to(strong.dtype)
        return cls(log_probs, alpha, is_chosen, kl_nats(log_probs, strong), kl_nats(strong, log_probs))


def fuse(step: Step, amount: Amount, chooser: Chooser) -> Fusion:
    """One step: the chooser says who speaks, the amount what becomes of the strong model's distribution."""
    everyone = torch.ones_like(step.who, dtype=torch.bool)
    if not amount.uses_experts:
        return Fusion.measured(step.strong, amount.joint_log_probs(step), None, ~everyone)
    if chooser.uses_objective:
        return _compared(step, amount, chooser)
    expert = chooser.choose(step, None)
    if expert is None:
        alpha = amount.alphas(step, step.deltas) if amount.has_alpha else None
        return Fusion.measured(step.strong, amount.joint_log_probs(step), alpha, everyone)
    narrowed, first = step.narrow(expert), torch.zeros_like(expert)
    is_chosen = _is_chosen(step, expert)
    if amount.has_alpha:
        return _tilted(step, narrowed.deltas, amount.alphas(narrowed, narrowed.deltas), first, is_chosen)
    return Fusion.measured(step.strong, amount.log_probs(narrowed)[0], None, is_chosen)


def _compared(step: Step, amount: Amount, chooser: Chooser) -> Fusion:
    """Every expert is fused alone, asked to meet the targets of all; the chooser compares their objectives."""
    is_alone = step.experts.shape[0] == 1  # nothing to compare
    if amount.has_alpha:
        deltas = step.deltas.with_all_targets()
        alpha = amount.alphas(step, deltas)
        expert = _choice(step, chooser, None if is_alone else deltas.objective(alpha))
        return _tilted(step, deltas, alpha, expert, _is_chosen(step, expert))
    log_probs = amount.log_probs(step)
    expert = _choice(step, chooser, None if is_alone else _objective(step, log_probs))
    return Fusion.measured(step.strong, take_expert(log_probs, expert), None, _is_chosen(step, expert))


def _choice(step: Step, chooser: Chooser, objective: Tensor | None) -> Tensor:
    expert = torch.zeros_like(step.who[0]) if objective is None else chooser.choose(step, objective)
    assert expert is not None, f"{type(chooser).__name__} compares experts, and chose none"
    return expert


def _objective(step: Step, log_probs: Tensor) -> Tensor:
    """The summed objective of distributions that no alpha describes, [expert, batch]."""
    deltas = step.deltas.with_all_targets()
    strong = deltas.family.strong.expand_as(log_probs)
    log_probs = log_probs.to(strong.dtype)
    return summed_objective(kl_nats(log_probs, strong), kl_nats(strong, log_probs), deltas.forward, deltas.reverse)


def _is_chosen(step: Step, expert: Tensor) -> Tensor:
    return torch.arange(step.experts.shape[0], device=expert.device).unsqueeze(-1) == expert  # [expert, batch]


def _tilted(step: Step, deltas: DeltaTargets, alpha: Tensor, index: Tensor, is_chosen: Tensor) -> Fusion:
    """The distribution at alpha along the delta of one expert per row, the one at `index` [batch] of `deltas`.

    The tilted family knows its divergences: no further pass over the vocabulary measures them.
    """
    tilt, dtype = deltas.family.tilt(alpha, index), step.strong.dtype
    alphas = torch.where(is_chosen, take_expert(alpha, index), 0.0)
    measured = tilt.kl_nats.to(dtype), tilt.reverse_kl_nats.to(dtype)
    return Fusion(tilt.log_probs.to(dtype), alphas.to(dtype), is_chosen, *measured)


@dataclass(frozen=True)
class Strategy:
    """An amount and a chooser. Build it with `make_strategy`, which checks names and settings.

    expert_names may be empty where no setting names an expert; otherwise it lists all experts in their order.
    """

    amount: Amount
    chooser: Chooser
    expert_names: tuple[str, ...] = ()

    def __call__(
        self,
        strong: Float[Tensor, "batch vocab"],
        base: Float[Tensor, "batch vocab"],
        experts: Float[Tensor, "expert batch vocab"],
    ) -> Fusion:
        """Fuse one position of every row.

        strong, base  [batch, vocab]          log-probabilities (log-softmax of the logits), float32 or wider
        experts       [expert, batch, vocab]  same token ids, same base for all
        returns       Fusion, in the type of `strong`, but at least float32
        raises        MemberMismatch when there is no expert, or not as many as `expert_names`
        """
        self._check_count(experts.shape[0])
        if torch.finfo(strong.dtype).bits < 32:  # fusion multiplies rounding errors
            strong, base, experts = strong.float(), base.float(), experts.float()
        indices = torch.arange(experts.shape[0], device=experts.device)
        step = Step(strong, base, experts, indices.unsqueeze(-1).expand(experts.shape[:2]), self.expert_names)
        return fuse(step, self.amount, self.chooser)

    def _check_count(self, count: int) -> None:
        if count == 0 and self.amount.uses_experts:
            raise MemberMismatch("there is no expert.", "Expected: at least one.", "pass an expert.")
        if self.expert_names and count != len(self.expert_names):
            raise MemberMismatch(
                f"there are {count} experts, but {len(self.expert_names)} names: {', '.join(self.expert_names)}.",
                "Expected: one name per expert.",
                "make the strategy with the names of these experts.",
            )

    def for_experts(self, expert_names: Sequence[str]) -> "Strategy":
        """The same strategy for these experts; raises when a setting names an expert that is not among them."""
        names = tuple(expert_names)
        for ingredient in (self.amount, self.chooser):
            ingredient.check_names(names)
        return dataclasses.replace(self, expert_names=names)

    def narrowed(self, expert_names: Sequence[str]) -> "Strategy":
        """The same strategy where only these of its experts may speak; raises as `for_experts`."""
        names = tuple(expert_names)
        amount, chooser = cast(Amount, self.amount.narrowed(names)), cast(Chooser, self.chooser.narrowed(names))
        return Strategy(amount, chooser).for_experts(names)

    def changed(self, **settings: Any) -> "Strategy":
        """The same strategy with other values of some settings; raises as `make_strategy`."""
        content = self.to_dict()
        return make_strategy(
            content["amount"], content["chooser"], self.expert_names, **{**content["settings"], **settings}
        )

    def to_dict(self) -> dict[str, Any]:
        """Names and all settings, as JSON can hold them; `strategy_from_dict` is the way back."""
        settings = values_of(self.amount) | values_of(self.chooser)
        return {
            "amount": name_in(AMOUNTS, self.amount),
            "chooser": name_in(CHOOSERS, self.chooser),
            "settings": settings,
        }


def make_strategy(
    amount: str, chooser: str = DEFAULT_CHOOSER, expert_names: Sequence[str] = (), **settings: Any
) -> Strategy:
    """The strategy of these names and settings; settings left out keep their defaults.

    amount        a name of `trimtab.logits.registry.AMOUNTS`
    chooser       a name of `trimtab.logits.registry.CHOOSERS`; with one expert every chooser picks it; an amount
                  that uses no expert takes the default only
    expert_names  the experts in their order; needed where a setting names one
    settings      of either ingredient, see `describe_settings`
    raises        UnknownName with the nearest spelling; BadSetting for a value out of range or a pair that cannot be
    """
    amount, chooser = canonical(AMOUNTS, amount), canonical(CHOOSERS, chooser)
    kinds = find(AMOUNTS, amount), find(CHOOSERS, chooser)
    known = [{item.name: item for item in settings_of(kind)} for kind in kinds]
    reject_unknown(settings, known[0] | known[1], of=f"the strategy {amount} with chooser {chooser}")
    made = [
        make(kind, {name: value for name, value in settings.items() if name in names}, of=name)
        for kind, names, name in zip(kinds, known, (amount, chooser), strict=True)
    ]
    strategy = Strategy(made[0], made[1])
    _check_pair(strategy, amount, chooser)
    return strategy.for_experts(expert_names) if expert_names else strategy


def _check_pair(strategy: Strategy, amount: str, chooser: str) -> None:
    """Raise BadSetting where the chooser asks for what the amount cannot do."""
    if not strategy.amount.uses_experts and chooser != DEFAULT_CHOOSER:
        raise BadSetting(
            f"amount '{amount}' uses no expert, so chooser '{chooser}' has nothing to choose.",
            "With such an amount no expert speaks.",
            "leave the chooser out, or take an amount that uses experts, for example 'dynamic'.",
        )
    if strategy.chooser.is_joint and not strategy.amount.is_joint:
        raise BadSetting(
            f"amount '{amount}' cannot let all experts speak at once.",
            "Its alpha is searched for one expert at a time, as published.",
            f"choose chooser='{DEFAULT_CHOOSER}' or chooser='confident', or amount='static' with chooser='{chooser}'.",
        )


def strategy_from_dict(description: Mapping[str, Any], expert_names: Sequence[str] = ()) -> Strategy:
    """The strategy that `Strategy.to_dict` described; "chooser" and "settings" may be left out.

    raises    as `make_strategy`; UnknownName for a key that no strategy has
    """
    reject_unknown(description, dict.fromkeys(("amount", "chooser", "settings")), of="a strategy", noun="key")
    if "amount" not in description:
        raise BadSetting(
            "the strategy has no 'amount'.", f"Known: {', '.join(AMOUNTS)}.", 'for example {"amount": "dynamic"}.'
        )
    chooser, settings = description.get("chooser", DEFAULT_CHOOSER), description.get("settings") or {}
    return make_strategy(description["amount"], chooser=chooser, expert_names=expert_names, **settings)


def as_strategy(given: Strategy | str | Mapping[str, Any], expert_names: Sequence[str]) -> Strategy:
    """A strategy for these experts, from itself, an amount's name or {"amount", "chooser", "settings"}."""
    if isinstance(given, str):
        given = make_strategy(given, expert_names=expert_names)
    elif isinstance(given, Mapping):
        given = strategy_from_dict(given, expert_names)
    return given.for_experts(tuple(expert_names)) if expert_names else given


def describe_settings(name: str) -> tuple[Setting, ...]:
    """The settings of an amount or a chooser: name, type, default, unit, bounds and meaning.

    raises    UnknownName with the nearest spelling when neither family has the name
    """
    for family in FAMILIES:
        if family.aliases.get(name, name) in family:
            return settings_of(find(family, name))
    raise unknown_name("amount or chooser", name, (*AMOUNTS, *CHOOSERS))


def every_setting() -> tuple[Setting, ...]:
    """The settings of all amounts and choosers, one after the other; several may share a name."""
    return tuple(item for family in FAMILIES for name in family for item in settings_of(find(family, name)))
