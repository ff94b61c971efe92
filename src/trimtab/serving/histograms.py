"""Counts of what fusion did, kept where the logits are: sums and histograms per expert; no device is waited for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.logits.strategy.fusion import Fusion
from trimtab.serving.device_copy import sent

ALPHA_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 5.0)  # upper, included
KL_EDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats
NOBODY = "none"  # steps at which no expert spoke, as with strategies that use none


class Tally:
    """Alpha and KL(fused || strong) of the steps at which each expert spoke."""

    def __init__(self, expert_names: Sequence[str]) -> None:
        self.names = (*expert_names, NOBODY)
        self._sums: dict[str, Tensor] = {}  # made with the first step, on its device

    def add(self, fusion: Fusion, is_counted: Sequence[bool] | None = None) -> None:
        """Counts every row [row]; with `is_counted`, those only. Nothing here waits for the device."""
        speaks = fusion.is_chosen
        speaks = torch.cat([speaks, ~speaks.any(dim=0, keepdim=True)])  # [name, row]
        if is_counted is not None:
            speaks = speaks & sent(is_counted, speaks.device)
        kl = fusion.kl_nats.expand(speaks.shape)
        self._add("kl_nats", kl, speaks, KL_EDGES)
        if fusion.alpha is not None:
            alpha = torch.cat([fusion.alpha, fusion.alpha.new_zeros(1, fusion.alpha.shape[1])])
            self._add("alpha", alpha, speaks, ALPHA_EDGES)

    def _add(self, name: str, values: Tensor, speaks: Tensor, edges: tuple[float, ...]) -> None:
        if name not in self._sums:
            shape = (speaks.shape[0], len(edges) + 2)  # a sum, then a bucket under each edge, and one above all
            self._sums[name] = torch.zeros(shape, dtype=torch.float64, device=values.device)
            self._sums[f"{name} edges"] = sent(edges, values.device)
        weights = speaks.to(torch.float64)
        values = torch.where(speaks, values, 0.0)
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
