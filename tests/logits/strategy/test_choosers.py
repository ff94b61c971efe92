"""Each chooser against its rule, written out a second time and slowly."""

import pytest
import torch

from laws import Draw, draw_members, kl
from trimtab.core.divergence import entropy_nats
from trimtab.logits.strategy.fusion import make_strategy

NAMES = ("math", "facts", "jokes")


def summed_objective(strong, base, experts, fused):
    """The paper's objective for several experts, of one fused law [vocab], all float64."""
    return sum(
        (kl(fused, strong) - kl(expert, base)) ** 2 + (kl(strong, fused) - kl(base, expert)) ** 2 for expert in experts
    )


def algorithm_1(strong, base, experts, grid):
    """The verbatim double loop over experts and alphas for one row; returns objective, expert, alpha."""
    best = (torch.inf, 0, 0.0)
    for index, expert in enumerate(experts):
        for alpha in grid:
            fused = (strong + alpha * (expert - base)).log_softmax(-1)
            loss = summed_objective(strong, base, experts, fused).item()
            if loss < best[0]:
                best = (loss, index, alpha)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_grid_with_the_papers_chooser_is_the_double_loop(seed):
    strong, base, experts = draw_members(6, 15, 3, seed)
    fusion = make_strategy("grid")(strong, base, experts)
    for i in range(6):
        laws = strong[i].double(), base[i].double(), experts[:, i].double()
        _, expert, alpha = algorithm_1(*laws, [step / 10 for step in range(21)])
        assert fusion.is_chosen[:, i].nonzero().item() == expert
        assert fusion.alpha[expert, i].item() == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_with_the_papers_chooser_is_the_double_loop_made_dense(seed):
    """The summed objective and the distance to the mean targets have the same minimum: the solver uses the latter."""
    strong, base, experts = draw_members(6, 15, 3, seed)
    fusion = make_strategy("dynamic")(strong, base, experts)
    for i in range(6):
        laws = strong[i].double(), base[i].double(), experts[:, i].double()
        alphas = torch.linspace(0, 2, 401, dtype=torch.float64).unsqueeze(-1)
        walks = [(laws[0] + alphas * (law - laws[1])).log_softmax(-1) for law in laws[2]]  # [401, vocab] each
        loss = min(summed_objective(*laws, walk).min().item() for walk in walks)
        expert = fusion.is_chosen[:, i].nonzero().item()
        alpha = fusion.alpha[expert, i].double()
        fused = (laws[0] + alpha * (laws[2][expert] - laws[1])).log_softmax(-1)
        reached = summed_objective(*laws, fused).item()
        assert reached <= loss + 1e-6
        assert reached >= loss - 1e-3  # and 401 points come close


@pytest.mark.parametrize("amount", ["static", "filter", "product", "mixture"])
def test_the_papers_chooser_takes_the_best_of_what_any_amount_proposes(amount):
    strong, base, experts = draw_members(20, 15, 3, seed=5)
    fusion = make_strategy(amount)(strong, base, experts)
    members = [[law.double() for law in (strong[i], base[i], experts[:, i])] for i in range(20)]
    chosen = [summed_objective(*members[i], fusion.log_probs[i].double()) for i in range(20)]
    for index in range(3):
        alone = make_strategy(amount)(strong, base, experts[index : index + 1])
        for i in range(20):
            assert chosen[i] <= summed_objective(*members[i], alone.log_probs[i].double()) * (1 + 1e-4) + 1e-5
    assert len(fusion.is_chosen.int().argmax(0).unique()) > 1


def test_the_confident_chooser_takes_the_lowest_entropy_and_its_own_targets():
    strong, base, experts = draw_members(20, 15, 3, seed=6)
    experts = (experts * torch.rand(3, 20, 1, generator=Draw(1, 1, 0).generator) * 3).log_softmax(-1)
    fusion = make_strategy("dynamic", chooser="confident")(strong, base, experts)
    surest = entropy_nats(experts).argmin(0)
    assert torch.equal(fusion.is_chosen.int().argmax(0), surest)
    assert len(surest.unique()) == 3
    for i in range(20):
        one = slice(i, i + 1)
        alone = make_strategy("dynamic")(strong[one], base[one], experts[surest[i], one].unsqueeze(0))
        torch.testing.assert_close(fusion.log_probs[i], alone.log_probs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amount", ["dynamic", "static", "filter", "mixture"])
def test_only_the_named_expert_speaks_as_if_it_were_alone(amount):
    strong, base, experts = draw_members(8, 15, 3, seed=7)
    for index, name in enumerate(NAMES):
        fusion = make_strategy(amount, "only", NAMES, expert=name)(strong, base, experts)
        alone = make_strategy(amount)(strong, base, experts[index : index + 1])
        torch.testing.assert_close(fusion.log_probs, alone.log_probs, rtol=1e-5, atol=2e-5)
        assert fusion.is_chosen[index].all()
        assert fusion.is_chosen.sum() == 8


def test_the_sum_does_not_depend_on_how_a_delta_is_split():
    """Two experts with half of a delta each are one expert with the whole."""
    strong, base, experts = draw_members(8, 15, 1, seed=8)
    half = (base + (experts[0] - base) / 2).log_softmax(-1)
    split = make_strategy("static", chooser="sum")(strong, base, torch.stack([half, half]))
    whole = make_strategy("static", chooser="sum")(strong, base, experts)
    torch.testing.assert_close(split.log_probs, whole.log_probs, rtol=1e-4, atol=1e-4)


def test_among_equal_experts_the_first_speaks():
    strong, base, experts = draw_members(8, 15, 1, seed=9)
    for chooser in ("joint_objective", "confident"):
        fusion = make_strategy("dynamic", chooser=chooser)(strong, base, experts.expand(3, -1, -1).contiguous())
        assert fusion.is_chosen[0].all()
