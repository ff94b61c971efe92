"""Random members' laws, ordinary and nasty, and the slow truth about them: a dense float64 scan."""

import torch
from torch import Tensor
from torch.nn.functional import pad

ALPHA_MAX = 2.0


class Draw:
    """Random numbers from one generator, float64."""

    def __init__(self, rows: int, vocab: int, seed: int) -> None:
        self.rows, self.vocab, self.generator = rows, vocab, torch.Generator().manual_seed(seed)

    def normal(self) -> Tensor:
        return torch.randn(self.rows, self.vocab, generator=self.generator, dtype=torch.float64)

    def uniform(self) -> Tensor:
        return torch.rand(self.rows, self.vocab, generator=self.generator, dtype=torch.float64)

    def scale(self, low: float, high: float) -> Tensor:
        """One log-uniform number per row."""
        share = torch.rand(self.rows, 1, generator=self.generator, dtype=torch.float64)
        return low * (high / low) ** share

    def levels(self, count: int) -> Tensor:
        return torch.randint(0, count, (self.rows, self.vocab), generator=self.generator).double()


def gauss(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Normal logits of all sharpnesses."""
    base = draw.normal() * draw.scale(0.1, 10)
    return draw.normal() * draw.scale(0.1, 10), base, base + draw.normal() * draw.scale(0.01, 10)


def spikes(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Tuning changed a few tokens by up to 30 nats and the others hardly."""
    base = draw.normal() * draw.scale(0.5, 6)
    is_changed = draw.uniform() < (draw.scale(1.5, 20) / draw.vocab)
    return draw.normal() * draw.scale(0.5, 6), base, base + is_changed * draw.normal() * draw.scale(1, 30)


def heavy(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Heavy-tailed logits: laws that are nearly one-hot, and deltas of a hundred nats."""
    strong = draw.normal() * draw.scale(0.5, 4) / (draw.uniform() + 0.1)
    base = strong * draw.scale(0.01, 1) + draw.normal() * draw.scale(0.5, 6)
    return strong, base, base + draw.normal() * draw.scale(0.2, 6) / (draw.uniform() + 0.1)


def kinks(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens 30 nats below the top whose delta lifts them: the fused law jumps from token to token."""
    base = draw.normal() * draw.scale(0.5, 8)
    return -30 * draw.uniform(), base, base + (draw.uniform() - 0.5) * draw.scale(3, 60)


def steps(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of tokens that rise one after the other: every seventh row has several local minima."""
    level = draw.levels(4)
    strong = -level * draw.scale(2, 20) + draw.normal() / 2
    base = draw.normal() * draw.scale(0.5, 5)
    return strong, base, base + level * draw.scale(1, 20) + 0.3 * draw.normal()


LAWS = {law.__name__: law for law in (gauss, spikes, heavy, kinks, steps)}


def draw_laws(name: str, rows: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of strong, base and expert, [rows, vocab] each, float64."""
    strong, base, expert = LAWS[name](Draw(rows, vocab, seed))
    return strong.log_softmax(-1), base.log_softmax(-1), expert.log_softmax(-1)


def draw_members(batch: int, vocab: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ordinary members: strong and base [batch, vocab], experts [expert, batch, vocab]; float32 log-probabilities."""
    draws = [Draw(batch, vocab, seed * 100 + i) for i in range(count + 2)]
    strong, base = 2.0 * draws[0].normal(), 1.5 * draws[1].normal()
    experts = torch.stack([base + draw.normal() for draw in draws[2:]])
    return tuple(x.float().log_softmax(-1) for x in (strong, base, experts))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of finite log-probabilities, straight from its definition."""
    return (p.exp() * (p - q)).sum(-1)


def targets_of(base: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """How far tuning moved the small model: KL(Q_1 || Q) and KL(Q || Q_1), [row] each."""
    return kl(expert, base), kl(base, expert)


def objective(
    strong: Tensor, base: Tensor, expert: Tensor, alpha: Tensor, targets: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The paper's J at alpha [row], straight from its equation; all laws [row, vocab] and finite.

    targets   `targets_of(base, expert)`, for callers that ask for many alphas
    """
    forward, reverse = targets_of(base, expert) if targets is None else targets
    fused = (strong + alpha.unsqueeze(-1) * (expert - base)).log_softmax(-1)
    return (kl(fused, strong) - forward) ** 2 + (kl(strong, fused) - reverse) ** 2


def rises_nearby(strong: Tensor, base: Tensor, expert: Tensor, alpha: Tensor, best: Tensor) -> Tensor:
    """Whether J rises measurably, beyond the rounding of J itself, within 1e-5 of its minimum, which may be an end."""
    targets = targets_of(base, expert)
    scale = targets[0] ** 2 + targets[1] ** 2
    beside = [
        objective(strong, base, expert, (alpha + s * 1e-5).clamp(0, ALPHA_MAX), targets).sub(best) for s in (-1, 1)
    ]
    return (torch.stack(beside).amax(0) > 1e-11 * scale) & (scale > 1e-10)


def scan(strong: Tensor, base: Tensor, expert: Tensor, points: int = 1001) -> tuple[Tensor, Tensor, Tensor]:
    """The truth: best alpha, J there, and the number of local minima, from a dense scan and three zooms into each of
    the three lowest of them."""
    targets = targets_of(base, expert)
    grid = torch.linspace(0, ALPHA_MAX, points, dtype=strong.dtype)
    values = torch.stack([objective(strong, base, expert, a.expand(len(strong)), targets) for a in grid], 1)
    around = pad(values, (1, 1), value=torch.inf)
    is_minimum = (values <= around[:, :-2]) & (values <= around[:, 2:])
    lowest = torch.where(is_minimum, values, torch.inf).topk(3, largest=False)
    found = []
    for start in lowest.indices.T:
        alpha, width = grid[start], ALPHA_MAX / (points - 1)
        for _ in range(3):
            near = (alpha + width * torch.linspace(-1, 1, 31, dtype=strong.dtype).unsqueeze(1)).clamp(0, ALPHA_MAX)
            best = torch.stack([objective(strong, base, expert, a, targets) for a in near]).min(0)
            alpha, width = near.gather(0, best.indices.unsqueeze(0)).squeeze(0), width / 15
        found.append((alpha, best.values))
    alphas, objectives = (torch.stack(x) for x in zip(*found, strict=True))
    which = objectives.argmin(0, keepdim=True)
    return alphas.gather(0, which)[0], objectives.gather(0, which)[0], is_minimum.sum(1)
