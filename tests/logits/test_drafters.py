"""Who drafts by which rule, and what becomes of a rule where no expert has any weight."""

import json

import pytest
import torch

import tiny
from fusing import PROMPTS, fuse, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.logits.speculation.draft import check_rule, drafter_for
from trimtab.logits.strategy.fusion import make_strategy

NAMES = ("math", "facts")


@pytest.mark.parametrize(
    ("rule", "with_experts", "without"),
    [
        ("recent", "facts", "base"),
        ("fused", "fused", "base"),
        ("mixture", "mixture", "mixture"),
        ("math", "math", "math"),
        ("base", "base", "base"),
        ("prompt", "prompt", "prompt"),
    ],
)
def test_a_rule_means_the_base_where_the_amount_uses_no_expert(rule, with_experts, without):
    check_rule(rule, NAMES)
    weights = torch.tensor([0.1, 0.7])
    for amount, name in (("dynamic", with_experts), ("contrastive", without)):
        assert drafter_for(rule, NAMES, make_strategy(amount, expert_names=NAMES), weights).name == name
        model = fuse(strategy=amount)
        _, plain = new_tokens(model, PROMPTS[0], speculate=0)
        _, drafted = new_tokens(model, PROMPTS[0], speculate=3, speculate_draft=rule)
        assert torch.equal(plain, drafted)
        if rule != "prompt":
            members = {"math", "facts"} if name == "facts" else {name}  # recent: the one that weighs most, in turn
            found = set(model.last_speculation.drafters)
            assert found
            assert found <= members


def test_the_former_name_of_a_rule_opens(tmp_path, members_dir):
    """Directories and calls of before say "lately" for "recent"."""
    paths = [members_dir / name for name in ("strong", "base", "math", "facts")]
    experts = {"math": paths[2], "facts": paths[3]}
    model = FusedCausalLM.from_members(paths[0], paths[1], experts)
    model.save_pretrained(tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    written = json.loads(config.read_text())
    written |= {"speculate_draft": "lately", "strategy": {"amount": "dynamic", "chooser": "paper"}}
    config.write_text(json.dumps(written))
    opened = FusedCausalLM.from_pretrained(tmp_path / "old")
    assert opened.speculate_draft == "recent"
    assert opened.strategy.to_dict()["chooser"] == "joint_objective"
    opened.speculate_draft = "lately"
    assert opened.config.speculate_draft == "recent"
    new_tokens(opened, PROMPTS[0], speculate=3, speculate_draft="lately", max_new_tokens=6)
    assert set(opened.last_speculation.drafters) <= {"math", "facts"}


@pytest.mark.parametrize("rule", ["fused", "mixture"])
def test_rules_that_need_experts_are_refused_without(rule):
    model = FusedCausalLM.from_members(tiny.make(seed=0), tiny.make(seed=1), {}, "contrastive", tiny.make_tokenizer())
    with pytest.raises(BadSetting, match=f"speculate_draft is '{rule}', but there is no expert") as error:
        new_tokens(model, PROMPTS[0], speculate=3, speculate_draft=rule)
    with pytest.raises(BadSetting, match="there is no expert"):
        model.speculate_draft = rule
    assert model.speculate_draft == "auto"
    assert error.value.fix == "pass speculate_draft='base' or 'prompt', or leave it out."
    for fix in ("base", "prompt", None):
        new_tokens(model, PROMPTS[0], speculate=3, speculate_draft=fix)
    assert set(model.last_speculation.drafters) == {"base"}


@pytest.mark.parametrize(
    ("chooser", "one_pass", "experts", "who"),
    [
        ("joint_objective", True, 2, {"mixture"}),
        ("joint_objective", False, 2, {"math", "facts"}),
        ("joint_objective", True, 1, {"math"}),
        ("only", True, 2, {"math"}),
        ("only", False, 2, {"math"}),
    ],
)
def test_auto_drafts_with_all_where_it_costs_no_more_than_one(chooser, one_pass, experts, who):
    settings = {"settings": {"expert": "math"}} if chooser == "only" else {}
    strategy = {"amount": "dynamic", "chooser": chooser, **settings}
    model = fuse(strategy=strategy, experts=experts, one_pass=one_pass)
    new_tokens(model, PROMPTS[0], speculate=3)
    assert model.speculate_draft == "auto"
    assert set(model.last_speculation.drafters) <= who
    assert model.last_speculation.drafted > 0
