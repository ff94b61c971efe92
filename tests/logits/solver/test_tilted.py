"""The tilted family against its definition, and the laws that its divergences obey."""

import pytest
import torch

from laws import LAWS, draw_laws, kl
from trimtab.logits.solver.tilted import TiltedFamily


@pytest.mark.parametrize("name", LAWS)
def test_moments_are_those_of_the_fused_law(name):
    strong, base, expert = draw_laws(name, rows=50, vocab=13, seed=1)
    family = TiltedFamily(strong, expert - base)
    alpha = torch.linspace(0, 2, 50, dtype=torch.float64)
    moments = family.at(alpha)
    fused = (strong + alpha.unsqueeze(-1) * (expert - base)).log_softmax(-1)
    centred = expert - base - (strong.exp() * (expert - base)).sum(-1, keepdim=True)
    scale = centred.abs().amax(-1)
    mean = (fused.exp() * centred).sum(-1)
    assert ((moments.mean - mean).abs() <= 1e-12 * (1 + scale)).all()
    variance = (fused.exp() * (centred - mean.unsqueeze(-1)) ** 2).sum(-1)
    assert ((moments.variance - variance).abs() <= 1e-11 * (1 + scale**2)).all()
    torch.testing.assert_close(moments.kl_nats, kl(fused, strong), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moments.reverse_kl_nats, kl(strong, fused), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_both_divergences_grow_with_alpha(name):
    strong, base, expert = draw_laws(name, rows=100, vocab=20, seed=2)
    family = TiltedFamily(strong, expert - base)
    walk = [family.at(torch.full((100,), a, dtype=torch.float64)) for a in torch.linspace(0, 2, 41).tolist()]
    for values in (torch.stack([m.kl_nats for m in walk]), torch.stack([m.reverse_kl_nats for m in walk])):
        assert (values.diff(dim=0) >= -1e-12 * (1 + values[1:])).all()


def test_slopes_are_those_of_the_docstring():
    strong, base, expert = draw_laws("gauss", rows=40, vocab=20, seed=3)
    family = TiltedFamily(strong, expert - base)
    alpha, step = torch.linspace(0.1, 1.9, 40, dtype=torch.float64), 1e-5
    here, below, above = family.at(alpha), family.at(alpha - step), family.at(alpha + step)
    slope = (above.kl_nats - below.kl_nats) / (2 * step)
    torch.testing.assert_close(slope, alpha * here.variance, rtol=1e-5, atol=1e-6)
    reverse_slope = (above.reverse_kl_nats - below.reverse_kl_nats) / (2 * step)
    torch.testing.assert_close(reverse_slope, here.mean, rtol=1e-5, atol=1e-6)


def test_several_experts_at_once_are_the_experts_one_by_one():
    strong, base, first = draw_laws("gauss", rows=30, vocab=20, seed=4)
    _, _, second = draw_laws("gauss", rows=30, vocab=20, seed=5)
    deltas = torch.stack([first - base, second - base])
    alpha = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = TiltedFamily(strong, deltas).at(alpha)
    for i in range(2):
        alone = TiltedFamily(strong, deltas[i]).at(alpha[i])
        torch.testing.assert_close(together.variance[i], alone.variance, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.log_partition[i], alone.log_partition, rtol=1e-12, atol=1e-14)


def test_some_rows_are_a_family_of_their_own_and_share_the_count():
    strong, base, expert = draw_laws("gauss", rows=6, vocab=9, seed=6)
    family = TiltedFamily(strong, torch.stack([expert - base, base - expert]))
    alpha = torch.full((2, 6), 0.7, dtype=torch.float64)
    rows = torch.tensor([11, 0, 8])
    some = family.take(rows).at(torch.full((3,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(some.mean, family.at(alpha).mean.flatten()[rows])
    assert family.evaluations == 2


def test_slicing_changes_nothing(monkeypatch):
    strong, base, expert = draw_laws("gauss", rows=30, vocab=20, seed=7)
    alpha = torch.full((30,), 1.3, dtype=torch.float64)
    whole = TiltedFamily(strong, expert - base).at(alpha)
    monkeypatch.setattr("trimtab.logits.solver.tilted.CPU_SLICE", 7 * 20)
    sliced = TiltedFamily(strong, expert - base).at(alpha)
    assert torch.equal(whole.variance, sliced.variance)
