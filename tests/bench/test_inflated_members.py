"""Members of the benches: sizes that fit a cost, prompts, counts."""

import pytest
import torch
from bench.inflation import count_parameters
from bench.members import CONTEXT, MemberFactory, Meter, Spec, size_for

from bench import members
from trimtab.core.errors import BadSetting
from trimtab.zoo import load_items

SPEC = Spec(16_000_000, 8, ("arithmetic", "facts"), small_parameters=1_500_000, dtype="float32")


@pytest.fixture(scope="module")
def factory():
    return MemberFactory()


def test_the_small_size_is_read_off_a_line():
    seconds = lambda size: 1e-3 + size * 1e-10  # noqa: E731
    size = size_for(3e-3, seconds, Spec(1_000_000_000, 20))
    assert seconds(size) == pytest.approx(3e-3, rel=1e-3)


def test_costs_that_cannot_be_are_refused():
    with pytest.raises(BadSetting, match=r"takes 2\.00 ms a step, 1\.00 are wanted"):
        size_for(1e-3, lambda size: 2e-3, Spec(100_000_000, 20))
    with pytest.raises(BadSetting, match="was as fast as"):
        size_for(3e-3, lambda size: 2e-3, Spec(100_000_000, 20))


def test_the_strong_model_is_kept_and_small_ones_have_the_size_asked(factory):
    one, other = factory.make(SPEC), factory.make(SPEC)
    assert one.strong is other.strong is one.fused.members.strong.model
    for model in (one.base, *one.experts.values()):
        assert count_parameters(model) == pytest.approx(1_500_000, rel=0.02)
    assert one.facts["strong_parameters"] == pytest.approx(16_000_000, rel=0.02)
    assert one.facts["measured_ratio"] > 1
    assert set(one.facts["forward_ms"]) == {"1", "2", "3", "5", "9", "17"}
    assert {model.config.max_position_embeddings for model in [one.strong, *one.small]} == {CONTEXT}


def test_merged_adapters_and_attached_ones_are_the_same_experts(factory):
    import dataclasses

    member_set = factory.make(dataclasses.replace(SPEC, is_lora=True))
    inputs = members.encode(member_set.tokenizer, members.prompts_of(SPEC.experts, 3))
    apart = members.fuse(member_set.strong, member_set.base, member_set.experts, member_set.tokenizer)
    torch.testing.assert_close(member_set.fused(**inputs).logits, apart(**inputs).logits, atol=2e-3, rtol=1e-3)
    adapted = members.adapted_model("facts", 1_500_000, SPEC)
    logits = [model(**inputs, logits_to_keep=1).logits for model in (adapted, member_set.experts["facts"])]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert member_set.fused.members.base.model in member_set.small


def test_prompts_take_the_tasks_in_turn_and_other_repeats_take_others():
    first, facts = load_items("arithmetic"), load_items("facts")
    assert members.prompts_of(["arithmetic", "facts"], 3) == [first[0].prompt, facts[0].prompt, first[1].prompt]
    assert members.prompts_of(["arithmetic"], 2, start=3) == [first[3].prompt, first[4].prompt]
    assert members.prompts_of(["arithmetic"], 1, start=len(first)) == [first[0].prompt]


@pytest.mark.parametrize("tokens", [8, 512])
def test_prompts_of_a_fixed_length(tokens):
    tokenizer = members.load_tokenizer()
    texts = members.long_prompts(["facts"], 2)
    inputs = members.encode(tokenizer, texts, tokens)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, tokens)
    assert texts[0].endswith(tokenizer.decode(inputs["input_ids"][0]))
    with pytest.raises(BadSetting, match="Expected: 5000"):
        members.encode(tokenizer, texts, 5000)


def test_a_meter_counts_forwards_and_tokens_only_while_it_is_open(factory):
    member_set = factory.make(SPEC)
    ids = torch.arange(2, 8).reshape(2, 3)
    with Meter({"strong": [member_set.strong], "small": member_set.small}) as meter:
        member_set.strong(ids)
        member_set.base(input_ids=ids[:, :1])
        member_set.experts["facts"](ids)
    member_set.strong(ids)
    assert meter.calls == {"strong": 1, "small": 2}
    assert meter.tokens == {"strong": 6, "small": 8}
    assert all(seconds > 0 for seconds in meter.seconds.values())
