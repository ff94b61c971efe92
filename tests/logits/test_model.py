"""The fused model as a model: identities, scoring, number types, chunks, and what it refuses."""

import copy
import math

import pytest
import torch

import tiny
from fusing import PROMPTS, check_same_tokens, fuse, new_tokens
from trimtab import FusedCausalLM, make_strategy
from trimtab.core.errors import BadSetting
from trimtab.logits.forward import reader


def plain_tokens(model, inputs, count=24):
    """What a member alone generates."""
    return model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("strategy", ["dynamic", "static", "grid", "cautious"])
@pytest.mark.filterwarnings("ignore:expert .* adds nothing")
def test_an_expert_that_learned_nothing_leaves_the_strong_model_alone(strategy):
    base, strong = tiny.make(seed=1), tiny.make(seed=0, width=48)
    model = FusedCausalLM.from_members(strong, base, {"same": copy.deepcopy(base)}, strategy, tiny.make_tokenizer())
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, plain_tokens(strong, inputs), inputs)


def test_alpha_one_with_strong_equal_to_base_gives_the_expert():
    base = tiny.make(seed=1)
    expert = tiny.tuned(base, 5)
    strategy = make_strategy("static", alpha=1.0)
    model = FusedCausalLM.from_members(base, base, {"math": expert}, strategy, tiny.make_tokenizer())
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, plain_tokens(expert, inputs), inputs)
    assert len(model.reader.runs) == 2, "a model in two roles is read once"


def test_the_logits_are_what_the_strategy_makes_of_the_members():
    model = fuse(("llama", "gpt2"), "static")
    inputs = model.encode(PROMPTS[0])
    laws = [m.model(**inputs).logits.log_softmax(-1) for m in model.members]
    delta = laws[2] + laws[3] - 2 * laws[1]
    alpha = model.strategy.amount.alpha
    alone = FusedCausalLM.from_members(
        model.members.strong.model,
        model.members.base.model,
        {name: member.model for name, member in model.members.experts.items()},
        {"amount": "static", "chooser": "sum"},
        model.tokenizer,
    )
    expected = (laws[0] + alpha * delta).log_softmax(-1)
    torch.testing.assert_close(alone(**inputs).logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


def test_logits_to_keep_gives_the_same_positions(fused):
    inputs = fused.encode(PROMPTS)
    full = fused(**inputs).logits
    torch.testing.assert_close(fused(**inputs, logits_to_keep=1).logits, full[:, -1:], atol=1e-4, rtol=1e-4)
    real = inputs["attention_mask"].bool()
    for keep in (5, torch.tensor([2, 7, 11])):
        kept = fused(**inputs, logits_to_keep=keep).logits
        where = slice(-keep, None) if isinstance(keep, int) else keep
        torch.testing.assert_close(kept[real[:, where]], full[:, where][real[:, where]], atol=1e-4, rtol=1e-4)


def test_labels_give_the_mean_negative_log_likelihood(fused):
    ids = fused.encode(PROMPTS[0])["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    output = fused(ids, labels=labels)
    picked = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(output.loss, -picked[:, 4:].mean())
    assert fused(ids, labels=labels, return_dict=False)[0] == output.loss


def test_logits_and_loss_carry_no_gradient(fused):
    ids = fused.encode(PROMPTS[0])["input_ids"]
    assert any(parameter.requires_grad for parameter in fused.parameters())
    with torch.enable_grad():
        output = fused(ids, labels=ids)
    assert not output.logits.requires_grad
    assert not output.loss.requires_grad


def test_chunks_of_rows_change_nothing(fused, monkeypatch):
    inputs = fused.encode(PROMPTS)
    real = inputs["attention_mask"].bool()
    whole = fused(**inputs).logits
    monkeypatch.setattr(reader, "CHUNK_NUMBERS", 7 * tiny.VOCAB * 4)
    assert fused.reader.chunk_rows == 7
    torch.testing.assert_close(fused(**inputs).logits[real], whole[real], atol=1e-5, rtol=1e-5)
    single = fused(inputs["input_ids"][2:], use_cache=False).logits
    torch.testing.assert_close(single, whole[2:], atol=1e-4, rtol=1e-4)


def test_padding_holds_the_uniform_law(fused):
    inputs = fused.encode(PROMPTS)
    logits = fused(**inputs).logits
    padding = logits[~inputs["attention_mask"].bool()]
    torch.testing.assert_close(padding, torch.full_like(padding, -math.log(tiny.VOCAB)))


def test_score_sums_the_log_likelihood_of_the_continuation(fused):
    prompts, answers = [PROMPTS[0], PROMPTS[1], PROMPTS[1]], [" in a house", " 19", " 20 or more"]
    scores = fused.score(prompts, answers)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        ids = fused.encode(prompt + answer)["input_ids"]
        count = len(answer)
        laws = fused(ids, use_cache=False).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = laws.gather(-1, ids[0, -count:, None]).sum()
        torch.testing.assert_close(score, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_members_are_fused_in_float32(dtype):
    base = tiny.make(seed=1)
    strong, experts = tiny.make(seed=0, width=48), {"math": tiny.tuned(base, 4)}
    for model in (strong, base, *experts.values()):
        model.to(dtype)
    model = FusedCausalLM.from_members(strong, base, experts, "dynamic", tiny.make_tokenizer())
    inputs, ids = new_tokens(model, PROMPTS)
    assert model.dtype == dtype
    assert model(**inputs).logits.dtype == torch.float32
    # A bf16 logit near 8 is known to 1/32; fusion multiplies that by up to 1 + 2 alpha.
    check_same_tokens(model, ids, new_tokens(model, PROMPTS, use_cache=False)[1], inputs, tolerance=0.3, most=3)


def test_members_of_different_number_types_stand_together():
    base = tiny.make(seed=1)
    model = FusedCausalLM.from_members(
        tiny.make(seed=0).to(torch.bfloat16), base, {"math": tiny.tuned(base, 4)}, "dynamic", tiny.make_tokenizer()
    )
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, new_tokens(model, PROMPTS, use_cache=False)[1], inputs, tolerance=0.3, most=3)


def test_a_model_in_training_mode_is_put_to_evaluation():
    base = tiny.make("gpt2", seed=1).train()  # GPT-2 has dropout
    model = FusedCausalLM.from_members(base, base, {"x": tiny.tuned(base, 3).train()}, "static", tiny.make_tokenizer())
    ids = model.encode("abc")["input_ids"]
    torch.testing.assert_close(model(ids).logits, model(ids).logits)


def test_the_strategy_can_be_changed():
    model = fuse(strategy="static")
    ids = model.encode(PROMPTS[0])["input_ids"]
    before = model(ids).logits
    model.strategy = {"amount": "static", "settings": {"alpha": 0.25}}
    assert not torch.allclose(model(ids).logits, before)
    assert model.config.strategy["settings"]["alpha"] == 0.25
    model.strategy = "dynamic"
    assert model.strategy.expert_names == ("math", "facts")


def test_it_shows_what_it_is_made_of(fused):
    assert fused.expert_names == ("math", "facts")
    assert fused.member_names == ("strong", "base", "math", "facts")
    assert fused.config.vocab_size == tiny.VOCAB
    assert fused.config.max_position_embeddings == tiny.CONTEXT
    assert fused.get_input_embeddings() is fused.members.strong.model.get_input_embeddings()
    count = sum(p.numel() for m in fused.members for p in m.model.parameters())
    assert sum(p.numel() for p in fused.parameters()) == count


@pytest.mark.parametrize("name", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_what_members_of_different_widths_cannot_give_is_refused(fused, name):
    value = torch.zeros(1, 3, 48) if name == "inputs_embeds" else True
    with pytest.raises(BadSetting, match=f"a fused model has no {name}"):
        fused(torch.tensor([[5, 6, 7]]), **{name: value})


def test_foreign_caches_and_masks_are_refused(fused):
    from transformers import DynamicCache

    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadSetting, match="past_key_values is a DynamicCache"):
        fused(ids, past_key_values=DynamicCache())
    with pytest.raises(BadSetting, match="the attention mask has 4 axes"):
        fused(ids, attention_mask=torch.ones(1, 1, 3, 3))


def test_no_expert_at_all_is_allowed_where_the_amount_needs_none():
    model = FusedCausalLM.from_members(tiny.make(seed=0), tiny.make(seed=1), {}, "contrastive", tiny.make_tokenizer())
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, new_tokens(model, PROMPTS, use_cache=False)[1], inputs)
