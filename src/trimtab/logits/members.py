"""Strong, base and experts: opened together, and checked against one another."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.errors import MemberMismatch, TrimtabWarning
from trimtab.models import adapters, ancestry
from trimtab.models.loading import Member, MemberLoader, Placement

# Names of members, and of rules that say who drafts.
RESERVED = ("strong", "base", "auto", "fused", "lately", "mixture", "prompt")


@dataclass
class Members:
    """Strong, base and experts, and the switches of the models that carry adapters (by the model's id)."""

    strong: Member
    base: Member
    experts: dict[str, Member]
    switches: dict[int, adapters.AdapterSwitch] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Member]:
        yield from (self.strong, self.base, *self.experts.values())

    def switch(self, member: Member) -> adapters.AdapterSwitch | None:
        """What turns this member's adapters on and off; None for a model without any."""
        return adapters.switch_on(member.model)


def gather(
    strong: Any,
    base: Any,
    experts: Mapping[str, Any],
    placement: Placement | None = None,
    beside: Path | None = None,
) -> Members:
    """All members, from loaded models or references (relative paths start at `beside`).

    raises    MemberMismatch when strong or base is missing or an expert's name cannot be used; UnknownName for a
              placement of a member that is not there
    """
    for role, source in (("strong", strong), ("base", base)):
        if source is None:
            raise MemberMismatch(
                f"there is no {role} model.",
                "An expert's delta is expert minus base, and it is added to the strong model.",
                f"pass {role}=...",
            )
    for name in experts:
        if not name or name in RESERVED:
            raise MemberMismatch(
                f"an expert cannot be called '{name}'.", f"Taken: {', '.join(RESERVED)}.", "give it another name."
            )
    placement = placement or Placement()
    placement.check_names(("strong", "base", *experts))
    loader = MemberLoader(placement, beside)
    strong_member, base_member = loader.member("strong", strong), loader.member("base", base)
    made = {name: loader.member(name, source, base=base_member) for name, source in experts.items()}
    return Members(strong_member, base_member, made, loader.switches)


def check_descent(members: Members, read: Callable[[Member, Tensor], Tensor], vocab_size: int) -> None:
    """Warns about each expert that was not, or may not have been, tuned from the base.

    The warning holds the divergence measured between the two.

    read    (member, token ids [batch, time]) -> logits [batch, time, vocab]
    """
    base = members.base
    for name, expert in members.experts.items():
        why = _why_no_descendant(expert, base)
        if not why:
            continue
        ids = ancestry.probe_ids(vocab_size)[:, : min(base.context or 10**9, expert.context or 10**9)]
        kl = ancestry.mean_kl_nats(read(expert, ids), read(base, ids))
        warnings.warn(
            f"expert '{name}' {why}, and KL(expert || base) is {kl:.2f} nats per token on fixed token sequences. Its "
            "delta then holds more than what tuning taught. Fix: pass the model that it was tuned from as base.",
            TrimtabWarning,
            stacklevel=3,
        )


def _why_no_descendant(expert: Member, base: Member) -> str:
    """What speaks against an expert having been tuned from the base; empty when nothing does."""
    if expert.adapter is not None or expert.model is base.model:
        return f"may not descend from the base: {expert.doubt}" if expert.doubt else ""
    cosine = ancestry.weight_cosine(expert.model, base.model)
    if cosine is not None and cosine > ancestry.UNRELATED_COSINE:
        return ""
    why = "its weights have other shapes" if cosine is None else f"the cosine of their weights is {cosine:.2f}"
    return f"does not descend from the base: {why}"
