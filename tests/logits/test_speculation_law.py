"""Speculation leaves the output law as it is: exact algebra for one round, chi-square against enumeration for texts."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

import tiny
from trimtab import FusedCausalLM
from trimtab.logits.speculation.decode import SpeculativeDecoder
from trimtab.logits.speculation.verify import accepted, draw, residual, standing

VOCAB, PROMPT, STEPS = 4, torch.tensor([[2, 3, 3]]), 3
WARPERS = {"temperature": 1.3, "top_p": 0.9, "top_k": 0}
TEXTS = list(itertools.product(range(VOCAB), repeat=STEPS))
STRATEGIES = [
    {"amount": "dynamic"},
    {"amount": "grid"},
    {"amount": "cautious"},
    {"amount": "static", "settings": {"alpha": 1.5}},
    {"amount": "filter"},
    {"amount": "product"},
    {"amount": "mixture"},
    {"amount": "contrastive"},
    {"amount": "dynamic", "chooser": "confident"},
    {"amount": "dynamic", "chooser": "only", "settings": {"expert": "facts"}},
    {"amount": "static", "chooser": "sum"},
    {"amount": "filter", "chooser": "sum"},
]


def label(strategy):
    return "-".join([strategy["amount"], strategy.get("chooser", "paper")])


# ---- one round, exactly


def round_law(target, proposal):
    """The law of a round's first token with a draft of one, straight from its two cases. Scores [vocab]."""
    vocab = len(target)
    law = torch.zeros(vocab, dtype=torch.float64)
    q = proposal.double().softmax(-1)
    for x in range(vocab):
        if q[x] == 0:
            continue
        row, drafted = target.unsqueeze(0), torch.tensor([x])
        stands = min(1.0, float(target.double().softmax(-1)[x] / q[x]))
        rest = residual(row, proposal.unsqueeze(0), drafted)[0].double().softmax(-1)
        law += q[x] * (1 - stands) * rest
        law[x] += q[x] * stands
    return law


@pytest.mark.parametrize("seed", range(20))
def test_a_round_gives_the_target(seed):
    generator = torch.Generator().manual_seed(seed)
    target, proposal = (3 * torch.randn(2, 7, generator=generator)).unbind()
    if seed % 3 == 0:
        target[:2], proposal[1:4] = -torch.inf, -torch.inf  # after top-p, with different tokens cut
    torch.testing.assert_close(round_law(target, proposal), target.double().softmax(-1), atol=1e-6, rtol=0)


def test_a_drafted_token_stands_with_the_probability_of_the_ratio():
    torch.manual_seed(0)
    target, proposal = torch.randn(2, 1, 1, 5)
    for x in range(5):
        draft = torch.full((20000, 1), x)
        stands = standing(draft, target.expand(20000, 1, 5), proposal.expand(20000, 1, 5), do_sample=True)
        ratio = (target.log_softmax(-1) - proposal.log_softmax(-1))[0, 0, x].exp().clamp_max(1.0)
        assert abs(float(stands.float().mean() - ratio)) < 0.015
        certain = standing(draft, target.expand(20000, 1, 5), None, do_sample=True).float().mean()
        assert abs(float(certain - target.softmax(-1)[0, 0, x])) < 0.015


def test_a_looked_up_token_is_replaced_by_any_other():
    target = torch.tensor([[0.3, 0.2, 0.5]]).log()
    rest = residual(target, None, torch.tensor([2])).exp()
    torch.testing.assert_close(rest / rest.sum(), torch.tensor([[0.6, 0.4, 0.0]]))


def test_equal_laws_leave_no_residual_and_fall_back_to_the_target():
    target = torch.randn(3, 6)
    torch.testing.assert_close(
        residual(target, target, torch.zeros(3, dtype=torch.long)).softmax(-1), target.softmax(-1)
    )


def test_greedy_stands_where_it_is_the_likeliest():
    target = torch.randn(2, 3, 8)
    best = target.argmax(-1)
    draft = best.clone()
    draft[1, 1] = (draft[1, 1] + 1) % 8
    stands = standing(draft, target, None, do_sample=False)
    assert accepted(stands, torch.tensor([3, 3])).tolist() == [3, 1]
    assert accepted(stands, torch.tensor([2, 3])).tolist() == [2, 1]  # filling does not count
    assert draw(target[:, 0], do_sample=False).tolist() == best[:, 0].tolist()


# ---- texts, against enumeration


@pytest.fixture(scope="module")
def members():
    base = tiny.make(seed=1, width=16, layers=1, vocab=VOCAB)
    experts = {name: tiny.tuned(base, seed, strength=0.8) for name, seed in (("math", 10), ("facts", 11))}
    return tiny.make(seed=0, width=16, layers=1, vocab=VOCAB), base, experts


def fused_of(members, strategy):
    strong, base, experts = members
    fused = FusedCausalLM.from_members(strong, base, experts, strategy)
    fused.generation_config.eos_token_id = fused.generation_config.pad_token_id = None
    return fused


def enumerated(fused):
    """The probability of every text of STEPS tokens, from whole readings without cache or drafts. [text]"""
    rows = torch.tensor(TEXTS)
    laws = fused(torch.cat([PROMPT.expand(len(rows), -1), rows], -1), use_cache=False).logits[:, 2:-1]
    warped = laws / WARPERS["temperature"]
    ordered, places = warped.softmax(-1).sort(descending=True)
    is_out = (ordered.cumsum(-1) - ordered) > WARPERS["top_p"]
    warped = warped.masked_fill(torch.zeros_like(is_out).scatter(-1, places, is_out), -torch.inf)
    return warped.log_softmax(-1).gather(-1, rows.unsqueeze(-1)).squeeze(-1).sum(-1).exp()


def sampled(fused, batch, draws, **options):
    """How often each text came out. [text]"""
    counts = torch.zeros(VOCAB**STEPS)
    weights = torch.tensor([VOCAB**i for i in reversed(range(STEPS))])
    options = {"speculate": 2, "max_new_tokens": STEPS, "do_sample": True, **WARPERS} | options
    for _ in range(draws // batch):
        new = fused.generate(PROMPT.expand(batch, -1), **options)[:, PROMPT.shape[1] :]
        counts += torch.bincount((new * weights).sum(-1), minlength=VOCAB**STEPS)
    assert fused.last_speculation.is_on == (options["speculate"] != 0)
    return counts


def p_value(counts, law):
    """Of a chi-square test; texts that are expected fewer than 5 times are counted together."""
    expected = law.double() * counts.sum()
    if counts[law == 0].sum() > 0:
        return 0.0  # a text came out that cannot
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) < 5]
    common = torch.ones_like(law, dtype=torch.bool).index_fill(0, rare, False)
    seen = torch.cat([counts[common], counts[rare].sum().view(1)]).double()
    wanted = torch.cat([expected[common], expected[rare].sum().view(1)])
    if wanted[-1] < 1:
        seen, wanted = seen[:-1], wanted[:-1]
    return chisquare(seen, wanted * (seen.sum() / wanted.sum())).pvalue


@pytest.mark.parametrize("strategy", STRATEGIES, ids=label)
@pytest.mark.parametrize(("batch", "draws"), [(1, 80), (8, 320), (1000, 4000)])
def test_sampling_follows_the_fused_law(members, strategy, batch, draws):
    fused = fused_of(members, strategy)
    torch.manual_seed(7)
    assert p_value(sampled(fused, batch, draws), enumerated(fused)) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES, ids=label)
@pytest.mark.parametrize("batch", [1, 8])
def test_every_token_of_a_long_text_follows_its_law(members, strategy, batch):
    """The probability integral transform: each token's place in its own law, ties broken at random, is uniform."""
    fused = fused_of(members, strategy)
    torch.manual_seed(5)
    prompt = PROMPT.expand(batch, -1)
    texts = fused.generate(prompt, speculate=3, max_new_tokens=100 if batch == 1 else 50, do_sample=True)
    law = fused(texts, use_cache=False).logits[:, PROMPT.shape[1] - 1 : -1].exp()
    new = texts[:, PROMPT.shape[1] :].unsqueeze(-1)
    below = law.cumsum(-1).gather(-1, new) - law.gather(-1, new)
    places = (below + law.gather(-1, new) * torch.rand(new.shape)).flatten()
    counts = torch.histc(places, bins=10, min=0.0, max=1.0)
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("draft", ["lately", "mixture", "fused", "prompt", "base", "facts"])
@pytest.mark.parametrize("length", [1, 3, "auto"])
def test_sampling_follows_the_fused_law_whoever_drafts(members, draft, length, monkeypatch):
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    fused = fused_of(members, "dynamic")
    torch.manual_seed(3)
    counts = sampled(fused, 1000, 4000, speculate=length, speculate_draft=draft)
    assert p_value(counts, enumerated(fused)) > 1e-3


def test_the_test_sees_a_bonus_from_the_strong_model(members, monkeypatch):
    fused = fused_of(members, "dynamic")
    honest = SpeculativeDecoder._with_bonus

    def from_the_strong_model(self, target, logits, texts, draft):
        strong = [logits[self._run_of["strong"]]] * len(logits)
        return honest(self, target, dict(enumerate(strong)), texts, draft)

    torch.manual_seed(7)
    assert p_value(sampled(fused, 1000, 8000), enumerated(fused)) > 1e-3
    monkeypatch.setattr(SpeculativeDecoder, "_with_bonus", from_the_strong_model)
    torch.manual_seed(7)
    assert p_value(sampled(fused, 1000, 8000), enumerated(fused)) < 1e-9


def test_the_test_sees_replacements_from_the_fused_law_itself(members, monkeypatch):
    fused = fused_of(members, "dynamic")
    monkeypatch.setattr("trimtab.logits.speculation.decode.residual", lambda target, proposal, rejected: target)
    torch.manual_seed(7)
    assert p_value(sampled(fused, 1000, 8000), enumerated(fused)) < 1e-9


def test_equal_seeds_give_equal_texts(members):
    fused = fused_of(members, "dynamic")
    options = {"speculate": 3, "max_new_tokens": 30, "do_sample": True}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(fused.generate(PROMPT, **options).tolist())
    assert texts[0] == texts[1] != texts[2]
