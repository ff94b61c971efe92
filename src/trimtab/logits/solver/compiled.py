"""The tilted family of members' distributions on a CPU, worked on by compiled code: see `kernel`.

It answers what `TiltedFamily` answers, to rounding, and searches alpha by itself. Members are kept as they came; a
float64 copy of them is made only for those who ask for `strong` or `delta`. Needs numba: without
it, on other devices, and where gradients are wanted, `measure_deltas` makes a plain family, which is slower and else
the same.

The first call in a process that finds no machine code on disk compiles it, which takes some seconds; `warm_up` does so
beforehand.
"""

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.logits.solver.hermite import points
from trimtab.logits.solver.tilted import Moments, Tilt, TiltedFamily
from trimtab.logits.solver.tolerances import RULED_OUT_NATS

# Rows are shared among threads from this many numbers on: below, starting the threads costs more than they gain.
WORTH_THREADS = 1 << 18


@cache
def is_available() -> bool:
    """Whether numba is installed, so that alpha is searched by compiled code on CPUs."""
    return importlib.util.find_spec("numba") is not None


def can_take(*log_probs: Tensor) -> bool:
    """Whether compiled code can work on these log-probabilities."""
    return (
        is_available()
        and len({given.dtype for given in log_probs}) == 1
        and log_probs[0].dtype in (torch.float32, torch.float64)
        and all(given.device.type == "cpu" and not given.requires_grad for given in log_probs)
    )


def warm_up() -> None:
    """Have everything compiled for float32 members; nothing to do where numba is missing."""
    if is_available():
        halves = torch.tensor([[0.5, 0.5]]).log()
        family = CompiledFamily(halves, halves, halves.unsqueeze(0))
        family.match(family.forward, family.reverse, alpha_max=1.0, evaluations=3)
        family.smaller_root(family.forward, family.reverse, alpha_max=1.0, evaluations=2)
        alpha = torch.ones(1, 1, dtype=torch.float64)
        family.at(alpha)
        family.tilt(alpha, torch.zeros(1, dtype=torch.long))


class CompiledFamily:
    """One family per expert and row, and the divergences between expert and base.

    strong, base      [batch, vocab]          log-probabilities, float32 or float64, all alike, on a CPU
    experts           [expert, batch, vocab]
    forward, reverse  [expert, batch]         KL(expert || base) and KL(base || expert), nats, float64
    """

    forward: Float[Tensor, "expert batch"]
    reverse: Float[Tensor, "expert batch"]

    def __init__(
        self,
        strong: Float[Tensor, "batch vocab"],
        base: Float[Tensor, "batch vocab"],
        experts: Float[Tensor, "expert batch vocab"],
    ) -> None:
        self._given = strong, base, experts
        self._members = tuple(given.detach().contiguous().numpy() for given in (strong, base, experts))
        self._shape = experts.shape[:2]
        self._count = 0
        self._row_stats = np.empty((experts.shape[0] * experts.shape[1], 6))
        self._run(lambda kernel, a, b: kernel.prepare_rows(*self._members, a, b, self._row_stats))
        row_stats = torch.from_numpy(self._row_stats).view(*self._shape, 6)
        self.forward, self.reverse = row_stats[..., 3], row_stats[..., 4]

    @property
    def evaluations(self) -> int:
        """How often the family was evaluated, counting the row that needed most."""
        return self._count

    @cached_property
    def plain(self) -> TiltedFamily:
        """The same family on float64 tensors."""
        strong, base, experts = (given.double() for given in self._given)
        is_shared = (base > RULED_OUT_NATS) & (experts > RULED_OUT_NATS)
        return TiltedFamily(strong, torch.where(is_shared, experts - base, 0.0))

    @property
    def strong(self) -> Float[Tensor, "batch vocab"]:
        """Normalised log-probabilities of p, float64."""
        return self.plain.strong

    @property
    def delta(self) -> Float[Tensor, "expert batch vocab"]:
        """The centred deltas, float64."""
        return self.plain.delta

    def at(self, alpha: Float[Tensor, "expert batch"]) -> Moments:
        """A, A' and A'' at alpha, one number per row; costs one pass over the vocabulary."""
        alphas, moments = _numbers(alpha).reshape(-1), np.empty((3, self._row_stats.shape[0]))
        self._run(lambda kernel, a, b: kernel.evaluate(*self._members, self._row_stats, alphas, a, b, moments))
        self._count += 1
        log_partition, mean, variance = torch.from_numpy(moments).view(3, *self._shape)
        return Moments(alpha, log_partition, mean, variance)

    def tilt(self, alpha: Float[Tensor, "expert batch"], expert: Int[Tensor, " batch"]) -> Tilt:
        """The distribution p_a of one expert per row and how far it moved; log-probabilities in the members' type.

        alpha    [expert, batch]
        expert   [batch]          which expert is chosen in each row
        """
        log_probs, moved = (
            torch.empty_like(self._given[0], memory_format=torch.contiguous_format),
            np.empty((2, self._shape[1])),
        )
        alphas, who, written = _numbers(alpha), expert.contiguous().numpy(), log_probs.numpy()
        self._run(
            lambda kernel, a, b: kernel.write_fused(*self._members, self._row_stats, alphas, who, a, b, written, moved),
            self._shape[1],
        )
        kl_nats, reverse_kl_nats = torch.from_numpy(moved)
        return Tilt(log_probs, kl_nats, reverse_kl_nats)

    def match(
        self,
        forward: Float[Tensor, "expert batch"],
        reverse: Float[Tensor, "expert batch"],
        alpha_max: float,
        evaluations: int,
    ) -> Float[Tensor, "3 expert batch"]:
        """The best alpha, J there and its lower bound: what `match_divergences` promises."""
        return self._search("match", 4, forward, reverse, alpha_max, evaluations)

    def smaller_root(
        self,
        forward: Float[Tensor, "expert batch"],
        reverse: Float[Tensor, "expert batch"],
        alpha_max: float,
        evaluations: int,
    ) -> Float[Tensor, "1 expert batch"]:
        """The smaller root: what the function `smaller_root` promises."""
        return self._search("smaller_root", 2, forward, reverse, alpha_max, evaluations)

    def _search(
        self, name: str, results: int, forward: Tensor, reverse: Tensor, alpha_max: float, evaluations: int
    ) -> Tensor:
        targets = np.stack([_numbers(forward).reshape(-1), _numbers(reverse).reshape(-1)])
        found = np.empty((results, targets.shape[1]))
        tables = tuple(table.numpy() for table in points(torch.float64, torch.device("cpu")))
        self._run(
            lambda kernel, a, b: getattr(kernel, name)(
                *self._members, self._row_stats, targets, alpha_max, evaluations, *tables, a, b, found
            )
        )
        self._count += int(found[-1].max(initial=0.0))
        return torch.from_numpy(found[:-1]).view(results - 1, *self._shape)

    def _run(self, work: Callable[[Any, int, int], object], rows: int | None = None) -> None:
        """Work on all rows, in threads of their own where there is enough of it."""
        from trimtab.logits.solver import kernel

        rows = self._row_stats.shape[0] if rows is None else rows
        threads = min(rows, torch.get_num_threads()) if rows * self._given[0].shape[-1] >= WORTH_THREADS else 1
        if threads < 2:
            work(kernel, 0, rows)
            return
        ends = [rows * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda a, b: work(kernel, a, b), ends[:-1], ends[1:]))


def _numbers(values: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values per row as a float64 array."""
    return values.detach().to(torch.float64).contiguous().numpy()
