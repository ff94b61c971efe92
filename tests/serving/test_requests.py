"""What a request may set: checked values, named mistakes, and the strategy that comes of them."""

import pytest

from trimtab import make_strategy
from trimtab.core.errors import BadSetting, UnknownName
from trimtab.logits.strategy.fusion import strategy_from_dict
from trimtab.serving.requests import NOTHING_SET, RequestSettings, read_settings

NAMES = ("math", "facts", "code")
DYNAMIC = make_strategy("dynamic", expert_names=NAMES)


def test_nothing_set_is_the_directorys_strategy() -> None:
    for given in (None, {}, {"kv_transfer_params": {"any": 1}}):
        assert read_settings(given, DYNAMIC) == NOTHING_SET
    assert NOTHING_SET.strategy(DYNAMIC) is DYNAMIC


def test_every_setting_is_read() -> None:
    given = {"alpha": 1, "experts": ["code", "math"], "alpha_max": 0.5, "trace": 1}
    found = read_settings(given, DYNAMIC)
    assert found == RequestSettings(1.0, ("math", "code"), (("alpha_max", 0.5),), "")
    strategy = found.strategy(DYNAMIC)
    assert strategy.expert_names == ("math", "code")
    assert strategy.amount.alpha_max == 0.5
    assert read_settings({"expert": "facts"}, DYNAMIC).experts == ("facts",)


def test_what_is_not_set_stays_as_the_directory_has_it() -> None:
    present = make_strategy("static", "sum", NAMES, alpha={"math": 1.0, "facts": 0.5, "code": 2.0})
    strategy = read_settings({"experts": ["facts", "code"]}, present).strategy(present)
    assert strategy.amount.alpha == {"facts": 0.5, "code": 2.0}
    only = make_strategy("dynamic", "only", NAMES, expert="math")
    assert read_settings({"expert": "code"}, only).strategy(only).chooser.expert == "code"


def test_requests_to_a_directory_with_former_names_are_read() -> None:
    """The chooser was called "paper" when the directory was written."""
    present = strategy_from_dict({"amount": "dynamic", "chooser": "paper"}, NAMES)
    strategy = read_settings({"experts": ["math", "facts"], "alpha_max": 1}, present).strategy(present)
    assert strategy == make_strategy("dynamic", "joint_objective", ("math", "facts"), alpha_max=1.0)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"alpha": float("nan")}, BadSetting, "'alpha' is nan"),
        ({"alpha": float("inf")}, BadSetting, "from 0 to 10"),
        ({"alpha": -0.5}, BadSetting, "from 0 to 10"),
        ({"alpha": "1"}, BadSetting, "a number"),
        ({"alpha": True}, BadSetting, "a number"),
        ({"alpha": [1.0]}, BadSetting, "a number"),
        ({"alpha": 10**400}, BadSetting, "a number"),
        ({"alpha_max": 11.0}, BadSetting, "'alpha_max' is 11.0"),
        ({"alpha_mx": 1.0}, UnknownName, "did you mean 'alpha_max'"),
        ({"weight": 0.5}, UnknownName, "no setting of a request 'weight'"),
        ({"expert": "maths"}, UnknownName, "Known: code, facts, math"),
        ({"experts": []}, BadSetting, "math, facts, code"),
        ({"experts": [1]}, BadSetting, "a list of names"),
        ({"expert": 3}, BadSetting, "a name"),
        ({"expert": "math", "experts": ["facts"]}, BadSetting, "both"),
        ({"kv_transfer_params": "x"}, UnknownName, "no setting of a request 'kv_transfer_params'"),
        ({"trace": 2}, BadSetting, "1 or 0"),
        ({"trace": [1]}, BadSetting, "1 or 0"),
    ],
)
def test_mistakes_are_named(given, kind, told: str) -> None:
    with pytest.raises(kind, match=None) as caught:
        read_settings(given, DYNAMIC)
    assert told in str(caught.value)


def test_what_the_strategy_cannot_take_is_refused() -> None:
    only = make_strategy("dynamic", "only", NAMES, expert="math")
    with pytest.raises(UnknownName, match="no expert 'math'"):
        read_settings({"experts": ["facts", "code"]}, only)
    with pytest.raises(BadSetting, match="uses no expert"):
        read_settings({"expert": "math"}, make_strategy("contrastive", expert_names=NAMES))
