"""What fusion did at each token of the requests that asked for it, kept for the latest of them."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.logits.strategy import Fusion

REQUESTS_KEPT = 256
POSITIONS_KEPT = 8192  # of one request
ALL_POSITIONS_KEPT = 131_072  # of all requests: some 60 MB with four experts, however long the texts are


class Step(NamedTuple):
    """One position, as small as it can be: a server keeps many.

    alphas      [expert]; None for strategies without one
    is_chosen   [expert]
    kl, reverse_kl   nats
    """

    alphas: tuple[float, ...] | None
    is_chosen: tuple[bool, ...]
    kl: float
    reverse_kl: float


class TraceBook:
    """Per key and position: alphas, who spoke, and how far the strong model was moved."""

    def __init__(self, expert_names: Sequence[str]) -> None:
        self._names = tuple(expert_names)
        self._kept: OrderedDict[str, dict[int, Step]] = OrderedDict()
        self._count = 0

    def add(self, fusion: Fusion, keys: Sequence[str | None], positions: Sequence[int]) -> None:
        """Keeps the rows [row] that have a key. A position read again, as after a draft that failed, is replaced."""
        alphas = None if fusion.alpha is None else fusion.alpha.T.tolist()
        is_chosen = fusion.is_chosen.T.tolist()
        kl, reverse = fusion.kl_nats.tolist(), fusion.reverse_kl_nats.tolist()
        for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
            if key is not None:
                row_alphas = None if alphas is None else tuple(alphas[row])
                self._keep(key, position, Step(row_alphas, tuple(is_chosen[row]), kl[row], reverse[row]))

    def _keep(self, key: str, position: int, step: Step) -> None:
        steps = self._kept.setdefault(key, {})
        self._kept.move_to_end(key)
        is_new = position not in steps
        if is_new and len(steps) >= POSITIONS_KEPT:
            return
        steps[position] = step
        self._count += is_new
        while len(self._kept) > REQUESTS_KEPT or self._count > ALL_POSITIONS_KEPT:
            _, oldest = self._kept.popitem(last=False)
            self._count -= len(oldest)

    def steps(self, key: str, start: int) -> list[dict[str, Any]]:
        """The steps of a key from a position on, in order, as far as they follow one another."""
        steps, found = self._kept.get(key, {}), []
        while start in steps:
            found.append(self._told(steps[start]))
            start += 1
        return found

    def _told(self, step: Step) -> dict[str, Any]:
        return {
            "alpha": None if step.alphas is None else dict(zip(self._names, step.alphas, strict=True)),
            "chosen": [name for name, speaks in zip(self._names, step.is_chosen, strict=True) if speaks],
            "kl_nats": _finite(step.kl),
            "reverse_kl_nats": _finite(step.reverse_kl),
        }


def _finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None
