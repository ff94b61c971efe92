"""Each amount against its equation, written out a second time and slowly."""

import math

import pytest
import torch

from laws import draw_members, kl, objective, scan
from trimtab.core.errors import BadSetting
from trimtab.logits.strategy.fusion import make_strategy

SEEDS = range(5)


def fuse(name, laws, chooser="joint_objective", names=(), **settings):
    return make_strategy(name, chooser=chooser, expert_names=names, **settings)(*laws)


def grid_by_hand(strong, base, expert):
    """Algorithm 1 for one expert and one row, in plain Python floats."""

    def softmax(logits):
        top = max(logits)
        total = sum(math.exp(x - top) for x in logits)
        return [math.exp(x - top) / total for x in logits]

    def divergence(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    p, q, t = softmax(strong), softmax(base), softmax(expert)
    best = (math.inf, 0.0)
    for step in range(21):
        alpha = step / 10
        fused = softmax([s + alpha * (e - b) for s, b, e in zip(strong, base, expert, strict=True)])
        loss = (divergence(fused, p) - divergence(t, q)) ** 2 + (divergence(p, fused) - divergence(q, t)) ** 2
        best = min(best, (loss, alpha))
    return best[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_is_algorithm_1(seed):
    strong, base, experts = draw_members(10, 12, 1, seed)
    fusion = fuse("grid", (strong, base, experts))
    expected = [grid_by_hand(strong[i].tolist(), base[i].tolist(), experts[0, i].tolist()) for i in range(10)]
    torch.testing.assert_close(fusion.alpha[0], torch.tensor(expected))


def test_the_grid_has_the_papers_points():
    amount = make_strategy("grid").amount
    assert len(amount.candidates()) == 21
    torch.testing.assert_close(torch.tensor(amount.candidates()), torch.linspace(0, 2, 21))
    assert make_strategy("grid", alpha_max=0.0).amount.candidates() == [0.0]


@pytest.mark.parametrize(
    ("alpha_max", "alpha_step", "count"), [(1.0, 0.3, 5), (2.0, 0.7, 4), (0.3, 0.1, 4), (1.0, 1.0, 2)]
)
def test_the_end_of_the_grid_is_tried(alpha_max, alpha_step, count):
    points = make_strategy("grid", alpha_max=alpha_max, alpha_step=alpha_step).amount.candidates()
    assert points[-1] == pytest.approx(alpha_max)
    assert points[:-1] == pytest.approx([i * alpha_step for i in range(count - 1)])


def test_an_alpha_at_the_end_of_the_grid_is_found():
    """A delta that must be taken beyond the range ends at its end, however the steps fall."""
    strong, base, experts = draw_members(6, 20, 1, seed=3)
    small = (strong + 0.05 * (strong - strong.mean(-1, keepdim=True))).log_softmax(-1)  # hardly moves the strong model
    fusion = fuse("grid", (small, base, experts), alpha_max=0.1, alpha_step=0.03)
    exact = fuse("dynamic", (small, base, experts), alpha_max=0.1)
    at_end = exact.alpha == 0.1
    assert at_end.any()
    torch.testing.assert_close(fusion.alpha[at_end], exact.alpha[at_end])


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_is_the_minimum_of_the_papers_objective(seed):
    strong, base, experts = draw_members(40, 25, 1, seed)
    fusion = fuse("dynamic", (strong, base, experts))
    strong, base, expert = strong.double(), base.double(), experts[0].double()
    alpha, best, _ = scan(strong, base, expert)
    torch.testing.assert_close(fusion.alpha[0].double(), alpha, rtol=0, atol=2e-5)
    reached = objective(strong, base, expert, fusion.alpha[0].double())
    assert (reached <= best + 1e-6).all()
    gridded = fuse("grid", (strong.float(), base.float(), experts)).alpha[0].double()
    assert (reached <= objective(strong, base, expert, gridded) + 1e-6).all()
    assert (gridded - fusion.alpha[0]).abs().max() <= 0.05 + 1e-4 or (reached < best + 1e-6).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_cautious_stays_below_both_targets_and_below_dynamic(seed):
    strong, base, experts = draw_members(40, 25, 1, seed)
    cautious, dynamic = (fuse(name, (strong, base, experts)) for name in ("cautious", "dynamic"))
    assert (cautious.alpha <= dynamic.alpha + 2e-5).all()
    assert (cautious.alpha < dynamic.alpha - 1e-2).any()
    assert (cautious.kl_nats <= kl(experts[0], base) + 1e-4).all()
    assert (cautious.reverse_kl_nats <= kl(base, experts[0]) + 1e-4).all()
    inside = cautious.alpha[0] < 2.0
    excess = torch.maximum(cautious.kl_nats - kl(experts[0], base), cautious.reverse_kl_nats - kl(base, experts[0]))
    assert excess[inside].abs().max() < 1e-4  # one of the two targets is met


@pytest.mark.parametrize("seed", SEEDS)
def test_static_alpha_1_on_the_base_itself_gives_the_expert(seed):
    _, base, experts = draw_members(6, 20, 1, seed)
    torch.testing.assert_close(fuse("static", (base, base, experts)).log_probs, experts[0], rtol=1e-5, atol=1e-5)


def test_static_alpha_0_gives_the_strong_model_and_alphas_add_up():
    strong, base, experts = draw_members(6, 20, 2, seed=1)
    nothing = fuse("static", (strong, base, experts), alpha=0.0)
    torch.testing.assert_close(nothing.log_probs, strong)
    summed = fuse("static", (strong, base, experts), "sum", ("a", "b"), alpha={"a": 0.5, "b": -0.25})
    expected = strong + 0.5 * (experts[0] - base) - 0.25 * (experts[1] - base)
    torch.testing.assert_close(summed.log_probs, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_alphas_by_name_need_names():
    laws = draw_members(2, 9, 2, seed=1)
    with pytest.raises(BadSetting, match="alpha names the experts a"):
        make_strategy("static", alpha={"a": 1.0})(*laws)


def filter_by_hand(strong, base, expert, beta):
    """The posterior filter of one row, in plain Python floats."""
    c = sum(min(math.exp(b), math.exp(e)) for b, e in zip(base, expert, strict=True))
    logs = [math.log(c) + e - b for b, e in zip(base, expert, strict=True)]
    weights = [math.exp(s + min(0.0, x) + beta * max(0.0, x)) for s, x in zip(strong, logs, strict=True)]
    return [math.log(w / sum(weights)) for w in weights]


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_filter_is_its_equation(beta):
    strong, base, experts = draw_members(6, 12, 1, seed=2)
    fusion = fuse("filter", (strong, base, experts), beta=beta)
    for i in range(6):
        expected = filter_by_hand(strong[i].tolist(), base[i].tolist(), experts[0, i].tolist(), beta)
        torch.testing.assert_close(fusion.log_probs[i], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_filter_with_beta_1_is_proxy_tuning_and_with_beta_0_only_rules_out(seed):
    strong, base, experts = draw_members(6, 20, 1, seed)
    whole = fuse("filter", (strong, base, experts), beta=1.0)
    proxy = fuse("static", (strong, base, experts), alpha=1.0)
    torch.testing.assert_close(whole.log_probs, proxy.log_probs, rtol=1e-4, atol=1e-5)
    capped = fuse("filter", (strong, base, experts), beta=0.0)
    weight = capped.log_probs - strong  # up to a constant: at most 0, and 0 for every token in the expert's style
    gap = experts[0] - base
    overlap = torch.minimum(base.exp(), experts[0].exp()).sum(-1, keepdim=True).log()
    in_style = gap + overlap >= 0
    for i in range(6):
        kept = weight[i][in_style[i]]
        torch.testing.assert_close(kept, kept[:1].expand_as(kept), rtol=1e-4, atol=1e-5)
        assert (weight[i] <= kept[0] + 1e-5).all()


def test_filters_of_several_experts_multiply():
    strong, base, experts = draw_members(4, 15, 2, seed=3)
    both = fuse("filter", (strong, base, experts), "sum")
    first = fuse("filter", (strong, base, experts[:1])).log_probs
    then = fuse("filter", (first, base, experts[1:])).log_probs
    torch.testing.assert_close(both.log_probs, then, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_product_and_mixture_are_the_two_means(weight):
    strong, base, experts = draw_members(4, 15, 2, seed=4)
    geometric = fuse("product", (strong, base, experts[:1]), weight=weight).log_probs
    expected = strong.exp() ** (1 - weight) * experts[0].exp() ** weight
    torch.testing.assert_close(geometric.exp(), expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    arithmetic = fuse("mixture", (strong, base, experts[:1]), weight=weight).log_probs
    expected = (1 - weight) * strong.exp() + weight * experts[0].exp()
    torch.testing.assert_close(arithmetic.exp(), expected, rtol=1e-4, atol=1e-6)
    together = fuse("mixture", (strong, base, experts), "sum", weight=weight).log_probs
    expected = (1 - weight) * strong.exp() + weight * experts.exp().mean(0)
    torch.testing.assert_close(together.exp(), expected, rtol=1e-4, atol=1e-6)
    together = fuse("product", (strong, base, experts), "sum", weight=weight).log_probs
    expected = ((1 - weight) * strong + weight * experts.mean(0)).softmax(-1)
    torch.testing.assert_close(together.exp(), expected, rtol=1e-4, atol=1e-6)


def test_the_ensembles_do_not_look_at_the_base():
    strong, base, experts = draw_members(4, 15, 1, seed=5)
    for name in ("product", "mixture"):
        one, other = (fuse(name, (strong, b, experts), "confident").log_probs for b in (base, base.flip(-1)))
        assert torch.equal(one, other)


def test_a_product_of_laws_without_common_tokens_is_the_strong_model():
    strong = torch.tensor([[0.5, 0.5, 0.0]]).log()
    expert = torch.tensor([[[0.0, 0.0, 1.0]]]).log()
    fusion = fuse("product", (strong, strong, expert), "confident")
    torch.testing.assert_close(fusion.log_probs.exp(), strong.exp())


@pytest.mark.parametrize("seed", SEEDS)
def test_contrastive_is_its_equation_and_keeps_plausible_tokens_only(seed):
    strong, base, experts = draw_members(6, 20, 1, seed)
    fusion = fuse("contrastive", (strong, base, experts), contrast=0.7, plausibility=0.2)
    is_plausible = strong.exp() >= 0.2 * strong.exp().amax(-1, keepdim=True)
    scores = torch.where(is_plausible, 1.7 * strong - 0.7 * base, -torch.inf)
    torch.testing.assert_close(fusion.log_probs, scores.log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert (fusion.log_probs[~is_plausible] == -torch.inf).all()
    assert (fusion.reverse_kl_nats[~is_plausible.all(-1)] == torch.inf).all()
    nothing = fuse("contrastive", (strong, base, experts), contrast=0.0, plausibility=0.0)
    torch.testing.assert_close(nothing.log_probs, strong)
    greedy = fuse("contrastive", (strong, base, experts), plausibility=1.0)
    assert torch.equal(greedy.log_probs.argmax(-1), strong.argmax(-1))


def test_contrastive_uses_no_expert():
    strong, base, experts = draw_members(3, 12, 2, seed=6)
    fusion = fuse("contrastive", (strong, base, experts))
    assert fusion.alpha is None
    assert not fusion.is_chosen.any()
    assert torch.equal(fusion.log_probs, fuse("contrastive", (strong, base, experts.flip(-1))).log_probs)
