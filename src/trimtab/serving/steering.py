"""Rows of logits fused each by the settings of its own request; what was done is counted, and kept where asked for.

Fusing and counting never wait for the device, whatever the settings. Keeping does: a step with a traced request waits
until its values are there, to copy them to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.divergence import kl_nats
from trimtab.logits.strategy.fusion import Fusion, Strategy
from trimtab.serving.batch_fusion import member_log_probs, parted, zero_points
from trimtab.serving.device_copy import to_device
from trimtab.serving.histograms import Histograms
from trimtab.serving.requests import NOTHING_SET, RequestSettings
from trimtab.serving.traces import TraceBook, TraceKey


@dataclass(frozen=True)
class RowOwners:
    """Whose the rows of logits of one step are.

    settings    [row]   of the row's request
    keys        [row]   under which the row's values are kept; None: they are not
    positions   [row]   of the token that was read, in the row's text; empty where nothing is kept
    is_counted  [row]   rows whose distribution decides about a token; others, as of half-read prompts, are not counted
    """

    settings: Sequence[RequestSettings]
    keys: Sequence[TraceKey | None]
    positions: Sequence[int]
    is_counted: Sequence[bool]


@runtime_checkable
class Owners(Protocol):
    """What knows whose rows are whose."""

    def of(self, hidden_states: Tensor) -> RowOwners | None:
        """Owners of the rows [row, width] that are about to be fused; None: nobody's, as when an engine warms up."""
        ...


class Steering:
    """Fusion with settings per request, for one model of an engine."""

    def __init__(self, plan: Any, owners: Owners) -> None:
        """
        plan     a `ServingPlan`; its strategy holds where a request sets nothing
        owners   tells whose rows are whose
        """
        self.plan = plan
        self.owners = owners
        self.histograms = Histograms(plan.strategy.expert_names)
        self.traces = TraceBook(plan.strategy.expert_names)

    def warm_up(self, device: torch.device) -> None:
        """Fuses some rows of no meaning, so that no request waits while the solver is compiled."""
        count = len(self.plan.body_of) - 2
        members = torch.randn(count + 2, 2, self.plan.vocab_size, device=device).log_softmax(dim=-1)
        fuse_each(members[0], members[1], members[2:], [NOTHING_SET] * 2, self.plan.strategy)

    def fuse(self, logits: Sequence[Tensor], hidden_states: Tensor) -> Float[Tensor, "row vocab"]:
        """Fused logits, float32, as `fuse_rows` returns them; each row by its request's settings.

        logits          [row, tokens of that body] of each body, the strong one first
        hidden_states   [row, width], what the logits were computed from: it tells whose rows they are
        """
        plan, owners, fused = self.plan, self.owners.of(hidden_states), []
        for piece, members in member_log_probs(logits, plan.body_of, plan.vocab_size):
            settings = [NOTHING_SET] * len(members[0]) if owners is None else owners.settings[piece]
            fusion = fuse_each(*parted(members), settings, plan.strategy)
            if owners is not None:
                self._remember(fusion, owners, piece)
            fused.append(fusion.log_probs + zero_points(logits[0][piece], plan.vocab_size))
        return fused[0] if len(fused) == 1 else torch.cat(fused)

    def _remember(self, fusion: Fusion, owners: RowOwners, piece: slice) -> None:
        is_counted = owners.is_counted[piece]
        if any(is_counted):
            self.histograms.add(fusion, None if all(is_counted) else is_counted)
        keys = owners.keys[piece]
        if any(key is not None for key in keys):
            self.traces.add(fusion, keys, owners.positions[piece])


def fuse_each(
    strong: Float[Tensor, "row vocab"],
    base: Float[Tensor, "row vocab"],
    experts: Float[Tensor, "expert row vocab"],
    settings: Sequence[RequestSettings],
    present: Strategy,
) -> Fusion:
    """Every row fused by its own settings; rows of equal settings go through the strategy together.

    strong, base, experts   log-probabilities
    settings                [row]
    present                 the strategy where nothing is set; it names the experts
    returns                 Fusion over all experts: alpha 0 for those that a request left out
    """
    groups: dict[RequestSettings, list[int]] = {}
    for row, asked in enumerate(settings):
        groups.setdefault(RequestSettings(asked.alpha, asked.experts, asked.numbers), []).append(row)
    if len(groups) == 1:
        return _fuse_alike(strong, base, experts, next(iter(groups)), present)
    order = [row for members in groups.values() for row in members]
    index = to_device([order, sorted(range(len(order)), key=order.__getitem__)], strong.device)  # [there and back, row]
    there, back = torch.split(index[0], [len(members) for members in groups.values()]), index[1]
    parts = [
        _fuse_alike(strong[rows], base[rows], experts[:, rows], asked, present)
        for asked, rows in zip(groups, there, strict=True)
    ]
    alphas = [part.alpha for part in parts if part.alpha is not None]
    return Fusion(
        log_probs=torch.cat([part.log_probs for part in parts])[back],
        alpha=torch.cat(alphas, dim=-1)[:, back] if len(alphas) == len(parts) else None,
        is_chosen=torch.cat([part.is_chosen for part in parts], dim=-1)[:, back],
        kl_nats=torch.cat([part.kl_nats for part in parts])[back],
        reverse_kl_nats=torch.cat([part.reverse_kl_nats for part in parts])[back],
    )


def _fuse_alike(strong: Tensor, base: Tensor, experts: Tensor, asked: RequestSettings, present: Strategy) -> Fusion:
    strategy = asked.strategy(present)
    if not asked.experts or asked.experts == present.expert_names:
        return _scaled(strategy(strong, base, experts), strong, asked.alpha)
    # Views and stacks: a list of places as an index would be copied to the device first.
    chosen = {name: index for index, name in enumerate(asked.experts)}
    among = torch.stack([experts[present.expert_names.index(name)] for name in asked.experts])
    fusion = _scaled(strategy(strong, base, among), strong, asked.alpha)

    def spread(values: Tensor) -> Tensor:  # [expert asked for, row] to [expert, row]
        nothing = torch.zeros_like(values[0])
        return torch.stack([values[chosen[name]] if name in chosen else nothing for name in present.expert_names])

    alpha = None if fusion.alpha is None else spread(fusion.alpha)
    return Fusion(fusion.log_probs, alpha, spread(fusion.is_chosen), fusion.kl_nats, fusion.reverse_kl_nats)


def _scaled(fusion: Fusion, strong: Tensor, scale: float) -> Fusion:
    """The distribution at `scale` times the shift from the strong model: log p + scale (log p_fused - log p).

    For a distribution log p + alpha d this is log p + (scale alpha) d. A token that either rules out stays
    ruled out. Normalised.
    """
    if scale == 1.0:
        return fusion
    is_out = (strong == -torch.inf) | ((fusion.log_probs == -torch.inf) & (scale > 0))
    shift = (fusion.log_probs - strong).masked_fill(is_out, 0.0)
    # At scale 0 what the fused distribution alone rules out must not become 0 * inf.
    shift = shift.masked_fill(fusion.log_probs == -torch.inf, 0.0)
    log_probs = (strong + scale * shift).masked_fill(is_out, -torch.inf).log_softmax(dim=-1)
    alpha = None if fusion.alpha is None else fusion.alpha * scale
    return Fusion(log_probs, alpha, fusion.is_chosen, kl_nats(log_probs, strong), kl_nats(strong, log_probs))
