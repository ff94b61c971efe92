"""The pull of small experts on a strong model: the direction of each delta, and how far tuning moved the small model.

One rule for impossible tokens, wherever deltas are used: only where strong, base and expert all give a token some mass
is there a delta. A token that base or expert rule out has delta 0, so the strong model alone decides about it; a token
that the strong model rules out stays ruled out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, linalg

from trimtab.logits.solver.compiled import CompiledFamily, can_take
from trimtab.logits.solver.tilted import TiltedFamily, row_slices, wide_type
from trimtab.logits.solver.tolerances import RULED_OUT_NATS


@dataclass(frozen=True)
class DeltaTargets:
    """Where experts pull the strong model at one position, and the divergences that tuning cost the small one.

    family   rows [expert, batch]     the distributions that each expert's delta alone can reach
    forward  [target, expert, batch]  KL(expert || base) in nats: what KL(fused || strong) should become
    reverse  [target, expert, batch]  KL(base || expert) in nats: what KL(strong || fused) should become

    The axis `target` holds the several targets that one expert is asked to meet at once: its own only, or all experts'.
    """

    family: TiltedFamily | CompiledFamily
    forward: Float[Tensor, "target expert batch"]
    reverse: Float[Tensor, "target expert batch"]

    def with_all_targets(self) -> "DeltaTargets":
        """The same pull, every expert now asked to meet the targets of all: the paper's summed objective."""
        count = self.forward.shape[1]
        forward, reverse = (x[0].unsqueeze(1).expand(-1, count, -1) for x in (self.forward, self.reverse))
        return DeltaTargets(self.family, forward, reverse)

    def objective(self, alpha: Float[Tensor, "expert batch"]) -> Float[Tensor, "expert batch"]:
        """The paper's objective of each expert alone at its alpha, summed over its targets; nats squared."""
        moments = self.family.at(alpha)
        return summed_objective(moments.kl_nats, moments.reverse_kl_nats, self.forward, self.reverse)


def summed_objective(
    kl_nats: Float[Tensor, "expert batch"],
    reverse_kl_nats: Float[Tensor, "expert batch"],
    forward: Float[Tensor, "target expert batch"],
    reverse: Float[Tensor, "target expert batch"],
) -> Float[Tensor, "expert batch"]:
    """sum_t [KL(fused || strong) - KL(Q_t || Q)]^2 + [KL(strong || fused) - KL(Q || Q_t)]^2, for given divergences.

    source    Fan et al. 2024, arXiv 2406.15480, the objective for several experts
    """
    return ((kl_nats - forward).square() + (reverse_kl_nats - reverse).square()).sum(dim=0)


def measure_deltas(
    strong: Float[Tensor, "batch vocab"],
    base: Float[Tensor, "batch vocab"],
    experts: Float[Tensor, "expert batch vocab"],
) -> DeltaTargets:
    """Deltas of all experts and their own targets, from the members' log-probabilities.

    strong, base  [batch, vocab]          log-probabilities; a constant added to a row cancels
    experts       [expert, batch, vocab]  same token ids
    returns       DeltaTargets with one target per expert: its own; worked on by compiled code where that is possible
    """
    if can_take(strong, base, experts):
        family = CompiledFamily(strong, base, experts)
        return DeltaTargets(family, family.forward.unsqueeze(0), family.reverse.unsqueeze(0))
    return measure_deltas_plainly(strong, base, experts)


def measure_deltas_plainly(
    strong: Float[Tensor, "batch vocab"],
    base: Float[Tensor, "batch vocab"],
    experts: Float[Tensor, "expert batch vocab"],
) -> DeltaTargets:
    """What `measure_deltas` measures, for any device and type, with torch alone: the reference."""
    wide = wide_type(strong)
    delta = torch.empty(experts.shape, dtype=wide, device=experts.device)
    forward, reverse = torch.empty_like(delta[..., 0]), torch.empty_like(delta[..., 0])  # [expert, batch]
    for piece in row_slices(base):
        base_piece = base[piece].to(wide)
        for index, expert in enumerate(experts):
            measured = _measure(base_piece, expert[piece].to(wide))
            delta[index, piece], forward[index, piece], reverse[index, piece] = measured
    return DeltaTargets(TiltedFamily(strong, delta), forward.unsqueeze(0), reverse.unsqueeze(0))


def _measure(base: Tensor, expert: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's delta [row, vocab], and both divergences between it and the base, [row]."""
    is_shared = (base > RULED_OUT_NATS) & (expert > RULED_OUT_NATS)
    delta = torch.where(is_shared, expert - base, 0.0)
    # Both distributions are renormalised on the tokens they share: otherwise a divergence could come out negative.
    expert_probs, expert_log_mass = _restrict(expert, is_shared)
    base_probs, base_log_mass = _restrict(base, is_shared)
    offset = expert_log_mass - base_log_mass
    forward = (linalg.vecdot(expert_probs, delta) - offset).clamp_min(0.0)
    reverse = (offset - linalg.vecdot(base_probs, delta)).clamp_min(0.0)
    return delta, forward, reverse


def _restrict(log_probs: Tensor, is_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities renormalised on the kept tokens, and the log of their mass; zeros where nothing is kept."""
    kept = torch.where(is_kept, log_probs, -torch.inf)
    top = kept.amax(dim=-1, keepdim=True)
    is_empty = top == -torch.inf
    probs = kept.masked_fill_(is_empty, 0.0).softmax(dim=-1).masked_fill_(is_empty, 0.0)
    # The likeliest token's unnormalised minus its normalised log-probability is the log of the mass.
    log_mass = torch.where(is_empty, 0.0, top - probs.amax(dim=-1, keepdim=True).log())
    return probs, log_mass.squeeze(-1)
