"""What fusion did at each token of the requests that asked for it, kept for the latest of them."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.logits.strategy.fusion import Fusion

REQUESTS_KEPT = 256  # requests to the engine, each with all its choices: one per prompt that a client sends
POSITIONS_KEPT = 8192  # of one request, its choices together
DROPPED_KEPT = 16 * REQUESTS_KEPT  # requests that are known to have been dropped, so that they do not come back
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


class TraceKey(NamedTuple):
    """Where the steps of one text are kept.

    request   the key that a request was given
    choice    number of the choice among the request's
    """

    request: str
    choice: int = 0


class _Kept:
    """What is kept of one request: the steps of every choice by position, and how many there are."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[int, Step]] = {}
        self.count = 0


class TraceBook:
    """Per request, choice and position: alphas, who spoke, and how far the strong model was moved.

    When there is no more room, the request that was silent longest is dropped with all its choices. A dropped request
    that still runs is not kept again: its trace would begin in the middle, and drive out another one.
    """

    def __init__(self, expert_names: Sequence[str]) -> None:
        self._names = tuple(expert_names)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._count = 0

    def add(self, fusion: Fusion, keys: Sequence[TraceKey | None], positions: Sequence[int]) -> None:
        """Keeps the rows [row] that have a key. A position read again, as after a draft that failed, is replaced."""
        alphas = None if fusion.alpha is None else fusion.alpha.T.tolist()
        is_chosen = fusion.is_chosen.T.tolist()
        kl, reverse = fusion.kl_nats.tolist(), fusion.reverse_kl_nats.tolist()
        for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
            if key is not None and key.request not in self._dropped:
                row_alphas = None if alphas is None else tuple(alphas[row])
                self._keep(key, position, Step(row_alphas, tuple(is_chosen[row]), kl[row], reverse[row]))

    def _keep(self, key: TraceKey, position: int, step: Step) -> None:
        kept = self._kept.setdefault(key.request, _Kept())
        self._kept.move_to_end(key.request)
        steps = kept.choices.setdefault(key.choice, {})
        is_new = position not in steps
        if is_new and kept.count >= POSITIONS_KEPT:
            return
        steps[position] = step
        kept.count += is_new
        self._count += is_new
        while len(self._kept) > REQUESTS_KEPT or self._count > ALL_POSITIONS_KEPT:
            self._drop()

    def _drop(self) -> None:
        request, oldest = self._kept.popitem(last=False)
        self._count -= oldest.count
        self._dropped[request] = None
        while len(self._dropped) > DROPPED_KEPT:
            self._dropped.popitem(last=False)

    def steps(self, key: TraceKey, start: int) -> list[dict[str, Any]]:
        """The steps of a choice from a position on, in order, as far as they follow one another."""
        kept, found = self._kept.get(key.request), []
        steps = {} if kept is None else kept.choices.get(key.choice, {})
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
