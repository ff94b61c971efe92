"""A strategy: how much of an expert's delta is added (amount), and which experts speak (chooser).

    strategy = make_strategy("dynamic", chooser="paper", alpha_max=2.0)
    fusion = strategy(strong, base, experts)

A strategy is a pure function of one position's log-probabilities: it remembers nothing between steps, so that beams,
speculation, chunked prefill and scoring all see the same law.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.core.divergence import kl_nats
from trimtab.core.errors import BadSetting, MemberMismatch, UnknownName, unknown_name
from trimtab.core.registry import Table, find
from trimtab.core.settings import Setting, check_settings, reject_unknown, settings_of
from trimtab.logits.registry import AMOUNTS, CHOOSERS
from trimtab.logits.strategy.base import Choice, JointAmount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Fusion:
    """What a strategy made of one position.

    log_probs        [batch, vocab]   fused law, normalised
    alpha            [expert, batch]  0 for experts that do not speak; None for amounts that have no alpha
    is_chosen        [expert, batch]  who spoke
    kl_nats          [batch]          KL(fused || strong): how far the strong model was moved
    reverse_kl_nats  [batch]          KL(strong || fused); inf where the fused law rules out what the strong one allows
    """

    log_probs: Float[Tensor, "batch vocab"]
    alpha: Float[Tensor, "expert batch"] | None
    is_chosen: Bool[Tensor, "expert batch"]
    kl_nats: Float[Tensor, " batch"]
    reverse_kl_nats: Float[Tensor, " batch"]


@dataclass(frozen=True)
class Strategy:
    """An amount and a chooser. Build it with `make_strategy`, which checks names and settings.

    expert_names may be empty where no setting names an expert; otherwise it lists all experts in their order.
    """

    amount: Any
    chooser: Any
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
        places = torch.arange(experts.shape[0], device=experts.device)
        step = Step(strong, base, experts, places.unsqueeze(-1).expand(experts.shape[:2]), self.expert_names)
        if self.amount.uses_experts:
            choice = self.chooser(step, self.amount)
        else:
            choice = Choice(self.amount.joint_log_probs(step), None, torch.zeros_like(step.who, dtype=torch.bool))
        return _fusion(strong, choice)

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
            if hasattr(ingredient, "check_names"):
                ingredient.check_names(names)
        return dataclasses.replace(self, expert_names=names)

    def to_dict(self) -> dict[str, Any]:
        """Names and all settings, as JSON can hold them; `strategy_from_dict` is the way back."""
        settings = dataclasses.asdict(self.amount) | dataclasses.asdict(self.chooser)
        return {
            "amount": _name_of(AMOUNTS, self.amount),
            "chooser": _name_of(CHOOSERS, self.chooser),
            "settings": settings,
        }


NO_CHOICE = "paper"  # the default chooser: that of a strategy for which nobody chose one


def make_strategy(amount: str, chooser: str = NO_CHOICE, expert_names: Sequence[str] = (), **settings: Any) -> Strategy:
    """The strategy of these names and settings; settings left out keep their defaults.

    amount        a name of `trimtab.logits.registry.AMOUNTS`
    chooser       a name of `trimtab.logits.registry.CHOOSERS`; with one expert every chooser picks it; an amount
                  that uses no expert takes the default only
    expert_names  the experts in their order; needed where a setting names one
    settings      of either ingredient, see `describe_settings`
    raises        UnknownName with the nearest spelling; BadSetting for a value out of range or a pair that cannot be
    """
    kinds = find(AMOUNTS, amount), find(CHOOSERS, chooser)
    known = [{item.name: item for item in settings_of(kind)} for kind in kinds]
    reject_unknown(settings, known[0] | known[1], of=f"the strategy {amount} with chooser {chooser}")
    for kind in kinds:
        check_settings(kind, settings)
    made = [kind(**{k: v for k, v in settings.items() if k in names}) for kind, names in zip(kinds, known, strict=True)]
    if chooser == "sum" and not isinstance(made[0], JointAmount):
        raise BadSetting(
            f"amount '{amount}' cannot let all experts speak at once.",
            "Its alpha is searched for one expert at a time, as in the paper.",
            "choose chooser='paper' or chooser='confident', or amount='static' with chooser='sum'.",
        )
    if chooser != NO_CHOICE and not made[0].uses_experts:
        raise BadSetting(
            f"amount '{amount}' uses no expert, so chooser '{chooser}' has nothing to choose.",
            "With such an amount no expert speaks.",
            "leave the chooser out, or take an amount that uses experts, for example 'dynamic'.",
        )
    strategy = Strategy(made[0], made[1])
    return strategy.for_experts(expert_names) if expert_names else strategy


def strategy_from_dict(description: Mapping[str, Any], expert_names: Sequence[str] = ()) -> Strategy:
    """The strategy that `Strategy.to_dict` described; "chooser" and "settings" may be left out.

    raises    as `make_strategy`; UnknownName for a key that no strategy has
    """
    reject_unknown(description, dict.fromkeys(("amount", "chooser", "settings")), of="a strategy", noun="key")
    if "amount" not in description:
        raise BadSetting(
            "the strategy has no 'amount'.", f"Known: {', '.join(AMOUNTS)}.", 'for example {"amount": "dynamic"}.'
        )
    chooser, settings = description.get("chooser", NO_CHOICE), description.get("settings") or {}
    return make_strategy(description["amount"], chooser=chooser, expert_names=expert_names, **settings)


def describe_settings(name: str) -> tuple[Setting, ...]:
    """The settings of an amount or a chooser: name, type, default, unit, bounds and meaning.

    raises    UnknownName with the nearest spelling when neither table has the name
    """
    for table in (AMOUNTS, CHOOSERS):
        if name in table:
            return settings_of(find(table, name))
    raise unknown_name("amount or chooser", name, (*AMOUNTS, *CHOOSERS))


def every_setting() -> tuple[Setting, ...]:
    """The settings of all amounts and choosers, one after the other; several may share a name."""
    return tuple(item for table in (AMOUNTS, CHOOSERS) for name in table for item in settings_of(find(table, name)))


def _name_of(table: Table, ingredient: Any) -> str:
    kind = type(ingredient)
    for name, entry in table.items():
        if entry.where == f"{kind.__module__}:{kind.__qualname__}":
            return name
    raise UnknownName(
        f"{kind.__qualname__} has no name in the registry.", "", "add a line to trimtab/logits/registry.py."
    )


def _fusion(strong: Tensor, choice: Choice) -> Fusion:
    """The choice with the divergences it cost, in the strong model's type."""
    fused, alpha = choice.log_probs.to(strong.dtype), None if choice.alpha is None else choice.alpha.to(strong.dtype)
    if choice.moved is not None:
        there, back = (moved.to(strong.dtype) for moved in choice.moved)
    else:
        strong = strong.log_softmax(dim=-1)
        there, back = kl_nats(fused, strong), kl_nats(strong, fused)
    return Fusion(fused, alpha, choice.is_chosen, there, back)
