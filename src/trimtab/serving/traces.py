"""What fusion did at each token of the requests that asked for it, kept for the latest of them."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from trimtab.logits.strategy import Fusion

REQUESTS_KEPT = 256
POSITIONS_KEPT = 8192  # of one request


class TraceBook:
    """Per key and position: alphas, who spoke, and how far the strong model was moved."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[int, dict[str, Any]]] = OrderedDict()

    def add(
        self, fusion: Fusion, keys: Sequence[str | None], positions: Sequence[int], expert_names: Sequence[str]
    ) -> None:
        """Keeps the rows [row] that have a key. A position read again, as after a draft that failed, is replaced."""
        alphas = None if fusion.alpha is None else fusion.alpha.tolist()
        is_chosen, kl, reverse = fusion.is_chosen.tolist(), fusion.kl_nats.tolist(), fusion.reverse_kl_nats.tolist()
        for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
            if key is None:
                continue
            steps = self._of(key)
            if len(steps) >= POSITIONS_KEPT and position not in steps:
                continue
            steps[position] = {
                "alpha": None if alphas is None else {name: alphas[e][row] for e, name in enumerate(expert_names)},
                "chosen": [name for e, name in enumerate(expert_names) if is_chosen[e][row]],
                "kl_nats": _finite(kl[row]),
                "reverse_kl_nats": _finite(reverse[row]),
            }

    def _of(self, key: str) -> dict[int, dict[str, Any]]:
        steps = self._kept.setdefault(key, {})
        self._kept.move_to_end(key)
        while len(self._kept) > REQUESTS_KEPT:
            self._kept.popitem(last=False)
        return steps

    def steps(self, key: str, start: int) -> list[dict[str, Any]]:
        """The steps of a key from a position on, in order, as far as they follow one another."""
        steps, found = self._kept.get(key, {}), []
        while start in steps:
            found.append(steps[start])
            start += 1
        return found


def _finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None
