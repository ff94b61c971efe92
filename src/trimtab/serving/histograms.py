"""Sums and histograms of alpha and KL per expert, kept on the device of the logits; adding never waits for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.logits.strategy.fusion import Fusion
from trimtab.serving.device_copy import to_device

ALPHA_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 5.0)  # upper, included
KL_EDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats
NO_EXPERT = "none"  # steps at which no expert was chosen, as with strategies that use none


class Histograms:
    """Alpha and KL(fused || strong) of the steps at which each expert was chosen."""

    def __init__(self, expert_names: Sequence[str]) -> None:
        self.names = (*expert_names, NO_EXPERT)
        self._sums: dict[str, Tensor] = {}  # made at the first step, on its device

    def add(self, fusion: Fusion, is_counted: Sequence[bool] | None = None) -> None:
        """Counts every row [row]; with `is_counted`, those only. Nothing here waits for the device."""
        is_chosen = fusion.is_chosen
        is_chosen = torch.cat([is_chosen, ~is_chosen.any(dim=0, keepdim=True)])  # [name, row]
        if is_counted is not None:
            is_chosen = is_chosen & to_device(is_counted, is_chosen.device)
        kl = fusion.kl_nats.expand(is_chosen.shape)
        self._add("kl_nats", kl, is_chosen, KL_EDGES)
        if fusion.alpha is not None:
            alpha = torch.cat([fusion.alpha, fusion.alpha.new_zeros(1, fusion.alpha.shape[1])])
            self._add("alpha", alpha, is_chosen, ALPHA_EDGES)

    def _add(self, name: str, values: Tensor, is_chosen: Tensor, edges: tuple[float, ...]) -> None:
        if name not in self._sums:
            shape = (is_chosen.shape[0], len(edges) + 2)  # a sum, then a bucket under each edge, and one above all
            self._sums[name] = torch.zeros(shape, dtype=torch.float64, device=values.device)
            self._sums[f"{name} edges"] = to_device(edges, values.device)
        weights = is_chosen.to(torch.float64)
        values = torch.where(is_chosen, values, 0.0)
        buckets = torch.bucketize(values.contiguous(), self._sums[f"{name} edges"]) + 1
        total = self._sums[name]
        total.scatter_add_(1, buckets, weights)
        total[:, 0] += values.sum(dim=-1, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """{"alpha" or "kl_nats": {expert: {"sum", "buckets": [count up to each edge, count above]}}}."""
        found: dict[str, Any] = {}
        for name in ("alpha", "kl_nats"):
            if name in self._sums:
                rows = self._sums[name].tolist()
                found[name] = {
                    who: {"sum": row[0], "buckets": [int(count) for count in row[1:]]}
                    for who, row in zip(self.names, rows, strict=True)
                }
        return found
