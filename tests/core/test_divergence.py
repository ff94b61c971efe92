"""Divergences and entropy of next-token laws."""

import math

import pytest
import torch

from laws import draw_laws
from trimtab.core.divergence import entropy_nats, kl_nats


@pytest.mark.parametrize("seed", range(5))
def test_kl_is_the_sum_of_its_definition_and_at_least_zero(seed):
    p, q, _ = draw_laws("gauss", rows=20, vocab=11, seed=seed)
    expected = torch.tensor(
        [sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    )
    torch.testing.assert_close(kl_nats(p, q), expected.double(), rtol=1e-6, atol=1e-9)
    assert (kl_nats(p, q) >= 0).all()
    assert kl_nats(p, p).abs().max() == 0


def test_a_token_of_probability_zero_counts_where_the_other_law_uses_it():
    half = torch.tensor([[0.5, 0.5, 0.0]]).log()
    third = torch.full((1, 3), 1 / 3).log()
    torch.testing.assert_close(kl_nats(half, third), torch.tensor([math.log(1.5)]))
    assert kl_nats(third, half).item() == math.inf
    assert kl_nats(half, half).item() == 0


def test_entropy_lies_between_certainty_and_uniformity():
    laws = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy_nats(laws), torch.tensor([0.0, math.log(4), math.log(2)]))
