"""What every strategy promises, whatever its ingredients."""

import dataclasses
import json

import pytest
import torch

from laws import draw_members
from trimtab.core.divergence import kl_nats
from trimtab.core.errors import BadSetting, MemberMismatch, UnknownName
from trimtab.core.registry import find
from trimtab.logits.registry import AMOUNTS, CHOOSERS, DEFAULT_CHOOSER
from trimtab.logits.strategy.fusion import (
    Strategy,
    describe_settings,
    make_strategy,
    strategy_from_dict,
)

NAMES = ("math", "facts", "jokes")
AMOUNT_KINDS = {name: find(AMOUNTS, name) for name in AMOUNTS}
CHOOSER_KINDS = {name: find(CHOOSERS, name) for name in CHOOSERS}
ALONG_DELTA = [name for name, kind in AMOUNT_KINDS.items() if kind.has_alpha]
SEARCHED = ("dynamic", "grid", "cautious")  # at equal objectives the smallest alpha


def can_pair(amount: str, chooser: str) -> bool:
    """As the ingredients declare: nothing to choose without experts, all at once only where both can."""
    if not AMOUNT_KINDS[amount].uses_experts:
        return chooser == DEFAULT_CHOOSER
    return AMOUNT_KINDS[amount].is_joint or not CHOOSER_KINDS[chooser].is_joint


PAIRS = [(amount, chooser) for amount in AMOUNTS for chooser in CHOOSERS if can_pair(amount, chooser)]


def build(amount: str, chooser: str = "joint_objective", names: tuple[str, ...] = NAMES, **settings) -> Strategy:
    if chooser == "only":
        settings.setdefault("expert", names[-1])
    return make_strategy(amount, chooser=chooser, expert_names=names, **settings)


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_every_strategy_returns_what_it_promises(amount, chooser):
    strong, base, experts = draw_members(6, 40, 3, seed=1)
    fusion = build(amount, chooser)(strong, base, experts)
    assert fusion.log_probs.dtype == torch.float32
    torch.testing.assert_close(fusion.log_probs.exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(fusion.kl_nats, kl_nats(fusion.log_probs, strong), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fusion.reverse_kl_nats, kl_nats(strong, fusion.log_probs), rtol=1e-4, atol=1e-5)
    assert fusion.is_chosen.shape == (3, 6)
    one_or_all = 3 if CHOOSER_KINDS[chooser].is_joint else 1
    speakers = one_or_all if AMOUNT_KINDS[amount].uses_experts else 0
    assert (fusion.is_chosen.sum(0) == speakers).all()
    assert (fusion.alpha is not None) == (amount in ALONG_DELTA)
    if fusion.alpha is not None:
        assert fusion.alpha.shape == (3, 6)
        assert fusion.alpha.dtype == torch.float32
        assert (fusion.alpha[~fusion.is_chosen] == 0).all()
        deltas = (fusion.alpha.unsqueeze(-1) * (experts - base)).sum(0)
        torch.testing.assert_close(fusion.log_probs, (strong + deltas).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_a_row_does_not_see_its_neighbours(amount, chooser):
    strong, base, experts = draw_members(5, 30, 3, seed=2)
    strategy = build(amount, chooser)
    together = strategy(strong, base, experts)
    for i in range(5):
        alone = strategy(strong[i : i + 1], base[i : i + 1], experts[:, i : i + 1])
        torch.testing.assert_close(together.log_probs[i], alone.log_probs[0], rtol=1e-5, atol=1e-4)
        assert torch.equal(together.is_chosen[:, i], alone.is_chosen[:, 0])


def check_it_keeps_nothing(strategy):
    """The same laws in another order, on the same object and on a new one, give the same to the last bit."""
    laws = [draw_members(3, 30, 3, seed=seed) for seed in range(20, 24)]
    first = [strategy(*law) for law in laws]
    for place in (3, 1, 1, 0, 2):
        again = strategy(*laws[place])
        for field in ("log_probs", "is_chosen", "kl_nats", "reverse_kl_nats", "alpha"):
            ours, theirs = getattr(again, field), getattr(first[place], field)
            assert (ours is theirs is None) or torch.equal(ours, theirs), field


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_ingredients_keep_nothing_from_call_to_call(amount, chooser):
    strategy = build(amount, chooser)
    check_it_keeps_nothing(strategy)
    assert not any(part.looks_back for part in (strategy.amount, strategy.chooser))


def test_an_ingredient_that_keeps_something_is_seen():
    class Fading(type(build("static").amount)):
        last = torch.zeros(())

        def joint_log_probs(self, step):
            law = super().joint_log_probs(step) + 0.1 * Fading.last
            Fading.last = law
            return law.log_softmax(-1)

    strategy = dataclasses.replace(build("static", "sum"), amount=Fading())
    with pytest.raises(AssertionError, match="log_probs"):
        check_it_keeps_nothing(strategy)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_with_one_expert_every_chooser_lets_it_speak(amount):
    strong, base, experts = draw_members(6, 30, 1, seed=3)
    choosers = [c for c in CHOOSERS if (amount, c) in PAIRS]
    fusions = [build(amount, c, names=("math",))(strong, base, experts) for c in choosers]
    for fusion in fusions[1:]:
        torch.testing.assert_close(fusion.log_probs, fusions[0].log_probs, rtol=1e-5, atol=2e-5)
        assert torch.equal(fusion.is_chosen, fusions[0].is_chosen)


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_the_order_of_the_experts_does_not_matter(amount, chooser):
    strong, base, experts = draw_members(6, 30, 3, seed=4)
    order = [2, 0, 1]
    names = tuple(NAMES[i] for i in order)
    settings = {"expert": "facts"} if chooser == "only" else {}
    plain = build(amount, chooser, **settings)(strong, base, experts)
    moved = build(amount, chooser, names=names, **settings)(strong, base, experts[order])
    torch.testing.assert_close(moved.log_probs, plain.log_probs, rtol=1e-5, atol=2e-5)
    assert torch.equal(moved.is_chosen, plain.is_chosen[order])


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("amount", [*ALONG_DELTA, "filter"])
def test_experts_that_learned_nothing_change_nothing(amount, chooser):
    if (amount, chooser) not in PAIRS:
        return
    strong, base, _ = draw_members(6, 30, 1, seed=5)
    fusion = build(amount, chooser)(strong, base, torch.stack([base] * 3))
    torch.testing.assert_close(fusion.log_probs, strong)
    assert fusion.kl_nats.max() < 1e-6
    if amount in SEARCHED:
        assert (fusion.alpha == 0).all()


@pytest.mark.parametrize("impossible", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_impossible_tokens_stay_impossible_and_never_make_a_nan(amount, chooser, impossible):
    strong, base, experts = draw_members(6, 12, 3, seed=6)
    for law in (strong, base, experts):  # in every member
        law[..., 5] = impossible
    strong[0, 1] = base[1, 2] = experts[0, 2, 3] = experts[1, 3, 4] = impossible  # in some members only
    base[4, 6] = experts[:, 4, 6] = impossible
    strong, base, experts = (law.log_softmax(-1) for law in (strong, base, experts))
    fusion = build(amount, chooser)(strong, base, experts)
    assert not fusion.log_probs.isnan().any()
    assert fusion.log_probs[:, 5].exp().max() == 0
    if amount != "mixture":
        assert fusion.log_probs[0, 1].exp() == 0
    assert not fusion.kl_nats.isnan().any()
    assert not fusion.reverse_kl_nats.isnan().any()
    if fusion.alpha is not None:
        assert fusion.alpha.isfinite().all()
    torch.testing.assert_close(fusion.log_probs.exp().sum(-1), torch.ones(6))


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_one_hot_members_never_make_a_nan(amount, chooser):
    certain = torch.full((4, 9), -torch.inf)
    certain[:, 2] = 0.0
    other = certain.roll(1, dims=-1)
    strong, base, experts = draw_members(4, 9, 3, seed=7)
    for laws in (
        (certain, base, experts),
        (strong, certain, experts),
        (strong, base, torch.stack([certain, other, base])),
        (certain, other, torch.stack([certain, other, certain])),
    ):
        fusion = build(amount, chooser)(*laws)
        assert not fusion.log_probs.isnan().any()
        assert not fusion.kl_nats.isnan().any()
        torch.testing.assert_close(fusion.log_probs.exp().sum(-1), torch.ones(4))


def test_narrow_members_are_fused_in_float32():
    laws = draw_members(3, 9, 2, seed=8)
    narrow = [law.bfloat16() for law in laws]
    for amount in AMOUNTS:
        fusion = make_strategy(amount)(*narrow)
        assert fusion.log_probs.dtype == fusion.kl_nats.dtype == torch.float32
        torch.testing.assert_close(fusion.log_probs, make_strategy(amount)(*(x.float() for x in narrow)).log_probs)


def test_float64_members_give_float64_laws():
    strong, base, experts = (law.double() for law in draw_members(3, 9, 1, seed=8))
    assert make_strategy("dynamic")(strong, base, experts).log_probs.dtype == torch.float64


def other_values(setting):
    """Values other than the default: ends and inner points of the range, or another expert's name."""
    if setting.low is None or setting.high is None:
        return [NAMES[0]] if setting.unit == "name" else [1.0, -1.0]
    points = [setting.low + part * (setting.high - setting.low) for part in (0.0, 0.01, 0.07, 0.3, 1.0)]
    return [point for point in points if point != setting.default]


@pytest.mark.parametrize("name", [*AMOUNTS, *CHOOSERS])
def test_every_setting_changes_the_output(name):
    laws = draw_members(8, 30, 3, seed=9)
    amount, chooser = (name, DEFAULT_CHOOSER) if name in AMOUNTS else ("static", name)
    before = build(amount, chooser)(*laws).log_probs.exp()
    for setting in describe_settings(name):
        after = [fused for value in other_values(setting) if (fused := changed(amount, chooser, setting, value, laws))]
        assert after, setting.name
        assert max((fused.log_probs.exp() - before).abs().max() for fused in after) > 1e-3, setting.name


def changed(amount, chooser, setting, value, laws):
    """The fusion with another value of one setting; None where another setting does not allow it."""
    try:
        return build(amount, chooser, **{setting.name: value})(*laws)
    except BadSetting:
        return None


@pytest.mark.parametrize("name", [*AMOUNTS, *CHOOSERS])
def test_every_setting_is_described_and_its_default_is_allowed(name):
    for setting in describe_settings(name):
        assert setting.doc
        assert not setting.doc.endswith(".")
        assert setting.unit, setting.name
        if isinstance(setting.default, float):
            assert setting.low is not None
            assert setting.low <= setting.default <= setting.high
            assert setting.parse(str(setting.default)) == setting.default
            assert str(setting.low) in setting.range or f"{setting.low:g}" in setting.range


def test_settings_come_from_text():
    (alpha,) = describe_settings("static")
    assert alpha.parse("0.5") == 0.5
    assert alpha.parse("math=0.5, facts=1") == {"math": 0.5, "facts": 1.0}
    (expert,) = describe_settings("only")
    assert expert.parse("math") == "math"
    with pytest.raises(BadSetting, match="alpha is 'much'"):
        alpha.parse("much")


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_a_strategy_survives_json(amount, chooser):
    settings = {"alpha_max": 0.3} if "alpha_max" in {item.name for item in describe_settings(amount)} else {}
    strategy = build(amount, chooser, **settings)
    description = json.loads(json.dumps(strategy.to_dict()))
    assert strategy_from_dict(description, NAMES) == strategy
    assert (description["amount"], description["chooser"]) == (amount, chooser)


def test_alphas_by_name_survive_json_and_follow_their_experts():
    strong, base, experts = draw_members(4, 20, 3, seed=10)
    alphas = {"jokes": 0.0, "math": 0.25, "facts": 1.5}
    strategy = build("static", "sum", alpha=alphas)
    assert strategy_from_dict(json.loads(json.dumps(strategy.to_dict())), NAMES) == strategy
    fusion = strategy(strong, base, experts)
    torch.testing.assert_close(fusion.alpha[:, 0], torch.tensor([0.25, 1.5, 0.0]))
    only = build("static", "only", expert="facts", alpha=alphas)(strong, base, experts)
    torch.testing.assert_close(only.alpha[:, 0], torch.tensor([0.0, 1.5, 0.0]))


def test_the_former_name_of_a_chooser_opens():
    """Directories written before the chooser was renamed hold its former name."""
    old = strategy_from_dict({"amount": "dynamic", "chooser": "paper", "settings": {"alpha_max": 1.0}}, NAMES)
    assert old == make_strategy("dynamic", "paper", NAMES, alpha_max=1.0) == build("dynamic", alpha_max=1.0)
    assert old.to_dict()["chooser"] == "joint_objective"
    assert describe_settings("paper") == describe_settings("joint_objective")


def test_the_default_is_the_published_method():
    strategy = strategy_from_dict({"amount": "dynamic"})
    assert strategy == make_strategy("dynamic")
    assert strategy.to_dict() == {"amount": "dynamic", "chooser": "joint_objective", "settings": {"alpha_max": 2.0}}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_strategy("dinamic"), UnknownName, "no amount 'dinamic'(?s:.*)did you mean 'dynamic'"),
        (lambda: make_strategy("dynamic", chooser="joint_objctive"), UnknownName, "did you mean 'joint_objective'"),
        (lambda: make_strategy("dynamic", alpha_mx=1.0), UnknownName, "did you mean 'alpha_max'"),
        (lambda: make_strategy("filter", alpha_max=1.0), UnknownName, "has no setting 'alpha_max'"),
        (
            lambda: strategy_from_dict({"amount": "dynamic", "choser": "sum"}),
            UnknownName,
            "no key 'choser'(?s:.*)'chooser'",
        ),
        (lambda: make_strategy("dynamic", alpha_max=-1.0), BadSetting, "alpha_max is -1.0(?s:.*)0 to 10"),
        (lambda: make_strategy("dynamic", alpha_max=float("nan")), BadSetting, "alpha_max is nan"),
        (lambda: make_strategy("dynamic", alpha_max="2"), BadSetting, "alpha_max is '2'"),
        (lambda: make_strategy("dynamic", alpha_max={"math": 1.0}), BadSetting, "alpha_max is"),
        (lambda: make_strategy("dynamic", alpha_max=True), BadSetting, "alpha_max is True"),
        (lambda: make_strategy("filter", beta=2.0), BadSetting, "0 to 1"),
        (lambda: make_strategy("dynamic", chooser="sum"), BadSetting, "cannot let all experts speak at once"),
        (
            lambda: make_strategy("contrastive", chooser="sum"),
            BadSetting,
            "uses no expert, so chooser 'sum' has nothing",
        ),
        (
            lambda: make_strategy("contrastive", "only", NAMES, expert="math"),
            BadSetting,
            "(?s)chooser 'only'.*leave the",
        ),
        (lambda: make_strategy("grid", alpha_max=0.3, alpha_step=0.7), BadSetting, "(?s)alpha_step is 0.7.*step=0.03"),
        (lambda: make_strategy("grid", alpha_step=2.5), BadSetting, "alpha_step is 2.5, but alpha_max is 2"),
        (lambda: make_strategy("static", "only", NAMES), BadSetting, "does not say which of 3 experts"),
        (lambda: make_strategy("static", "only", NAMES, expert="fact"), UnknownName, "did you mean 'facts'"),
        (lambda: make_strategy("static", "only", NAMES, expert=3), BadSetting, "expert is 3"),
        (
            lambda: make_strategy("static", "joint_objective", NAMES, alpha={"math": 1.0}),
            BadSetting,
            "alpha names the experts math",
        ),
        (
            lambda: strategy_from_dict({"amount": "static", "choser": "joint_objective"}),
            UnknownName,
            "did you mean 'chooser'",
        ),
        (lambda: strategy_from_dict({"chooser": "joint_objective"}), BadSetting, "no 'amount'"),
        (lambda: describe_settings("mixtur"), UnknownName, "did you mean 'mixture'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_proposed_repairs_work():
    strong, base, experts = draw_members(2, 9, 3, seed=11)
    for repaired in (
        build("dynamic", "joint_objective"),
        build("dynamic", "confident"),
        build("static", "sum"),
        build("contrastive", plausibility=0.0),
        build("grid", alpha_max=0.3, alpha_step=0.03),
        build("static", "only", expert="math"),
        build("static", alpha={"math": 1.0, "facts": 1.0, "jokes": 1.0}),
    ):
        assert repaired(strong, base, experts).log_probs.isfinite().all()


def test_the_number_of_experts_must_be_that_of_the_names():
    strong, base, experts = draw_members(2, 9, 2, seed=12)
    with pytest.raises(MemberMismatch, match="2 experts, but 3 names: math, facts, jokes"):
        build("dynamic")(strong, base, experts)
    with pytest.raises(MemberMismatch, match="there is no expert"):
        make_strategy("dynamic")(strong, base, experts[:0])
    assert not make_strategy("contrastive")(strong, base, experts[:0]).log_probs.isnan().any()


def test_a_shape_that_would_broadcast_in_silence_is_caught():
    strong, base, experts = draw_members(3, 9, 2, seed=13)
    with pytest.raises(Exception, match=r"(?s)batch|shape|type"):
        make_strategy("dynamic")(strong, base[:1], experts)
