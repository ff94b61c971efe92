"""Between amounts and choosers: what an amount would do with each expert alone, and who was chosen to speak."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.divergence import kl_nats
from trimtab.logits.solver.deltas import DeltaTargets, summed_objective
from trimtab.logits.solver.tilted import take_expert
from trimtab.logits.strategy.step import Step


@runtime_checkable
class AlphaAmount(Protocol):
    """An amount that moves the strong model along an expert's delta, by alpha."""

    uses_experts: ClassVar[bool]

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """How far each expert alone would move the strong model along its delta. [expert, batch]"""


@runtime_checkable
class DistributionAmount(Protocol):
    """An amount that makes a law of its own out of strong, base and one expert: no alpha describes it."""

    uses_experts: ClassVar[bool]

    def log_probs(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """Log-probabilities, normalised, for each expert alone. [expert, batch, vocab]"""


@runtime_checkable
class JointAmount(Protocol):
    """An amount that can let all experts speak at once."""

    uses_experts: ClassVar[bool]

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities, normalised, of all experts together. [batch, vocab]"""


Amount = AlphaAmount | DistributionAmount | JointAmount


@dataclass(frozen=True)
class Proposal:
    """Every expert's own fused law: given by its alpha along the delta, or written out.

    alpha  [expert, batch]         None for amounts that have no alpha
    laws   [expert, batch, vocab]  None for amounts that have one
    """

    step: Step
    meets_all_targets: bool
    alpha: Float[Tensor, "expert batch"] | None
    log_probs: Float[Tensor, "expert batch vocab"] | None

    @cached_property
    def deltas(self) -> DeltaTargets:
        """The experts' deltas and what each of them is asked to meet."""
        return targets_of(self.step, self.meets_all_targets)

    def objective(self) -> Float[Tensor, "expert batch"]:
        """How far each expert's law is from the targets it is asked to meet: the paper's summed objective."""
        if self.alpha is not None:
            return self.deltas.objective(self.alpha)
        assert self.log_probs is not None
        strong = self.deltas.family.strong.expand_as(self.log_probs)
        log_probs = self.log_probs.to(strong.dtype)
        return summed_objective(
            kl_nats(log_probs, strong), kl_nats(strong, log_probs), self.deltas.forward, self.deltas.reverse
        )


@dataclass(frozen=True)
class Choice:
    """What a chooser decided.

    log_probs  [batch, vocab]   the fused law, normalised
    alpha      [expert, batch]  0 for experts that do not speak; None for amounts that have no alpha
    is_chosen  [expert, batch]  who speaks
    moved      two of [batch]   KL(fused || strong) and KL(strong || fused) where they are known without another look
                                at the vocabulary; else None
    """

    log_probs: Float[Tensor, "batch vocab"]
    alpha: Float[Tensor, "expert batch"] | None
    is_chosen: Bool[Tensor, "expert batch"]
    moved: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]] | None = None


def choose(proposal: Proposal, expert: Int[Tensor, " batch"]) -> Choice:
    """One expert per row, `expert` [batch], picked among the proposals of all."""
    return _choice_of_one(proposal, place=expert, expert=expert, count=proposal.step.experts.shape[0])


def let_speak(amount: AlphaAmount | DistributionAmount, step: Step, expert: Int[Tensor, " batch"]) -> Choice:
    """One expert per row, known beforehand, asked to meet its own targets: the others cost nothing."""
    narrowed = propose(amount, step.narrow(expert))
    return _choice_of_one(narrowed, place=torch.zeros_like(expert), expert=expert, count=step.experts.shape[0])


def _choice_of_one(proposal: Proposal, place: Tensor, expert: Tensor, count: int) -> Choice:
    """The choice of the expert that stands in `place` [batch] of the proposal and is `expert` [batch] of `count`."""
    everyone = torch.arange(count, device=expert.device)
    is_chosen = everyone.unsqueeze(-1) == expert  # [expert, batch]
    if proposal.alpha is None:
        assert proposal.log_probs is not None
        return Choice(take_expert(proposal.log_probs, place), None, is_chosen)
    tilt = proposal.deltas.family.tilt(proposal.alpha, place)
    alpha = torch.where(is_chosen, take_expert(proposal.alpha, place), 0.0)
    return Choice(tilt.log_probs, alpha, is_chosen, moved=(tilt.kl_nats, tilt.reverse_kl_nats))


def targets_of(step: Step, meets_all_targets: bool) -> DeltaTargets:
    """The step's pull: every expert with its own targets, or each asked to meet the targets of all."""
    return step.deltas.with_all_targets() if meets_all_targets else step.deltas


def propose(amount: AlphaAmount | DistributionAmount, step: Step, meets_all_targets: bool = False) -> Proposal:
    """What `amount` would do with each expert of the step alone."""
    if isinstance(amount, AlphaAmount):
        alpha = amount.alphas(step, targets_of(step, meets_all_targets))
        return Proposal(step, meets_all_targets, alpha=alpha, log_probs=None)
    return Proposal(step, meets_all_targets, alpha=None, log_probs=amount.log_probs(step))
