"""What holds for every model of transformers holds for a fused one: with and without cache, in batches, with beams."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

import tiny
from fusing import PROMPTS, check_same_tokens, fuse, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, TrimtabWarning

PAIRS = [("llama", kind) for kind in tiny.KINDS] + [(kind, "llama") for kind in tiny.KINDS[1:]] + [("gemma2", "gpt2")]


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_cached_is_uncached_and_a_batch_is_its_rows(kinds):
    model = fuse(kinds)
    inputs, batch = new_tokens(model, PROMPTS)
    _, uncached = new_tokens(model, PROMPTS, use_cache=False)
    check_same_tokens(model, batch, uncached, inputs)
    for row, prompt in enumerate(PROMPTS):
        single, alone = new_tokens(model, prompt)
        check_same_tokens(model, batch[row : row + 1], alone, single)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_padding_on_either_side_changes_no_logits(kinds):
    model = fuse(kinds)
    text = model.encode(PROMPTS[0])["input_ids"]
    plain = model(text, use_cache=False).logits
    for left, right in ((5, 0), (0, 7), (3, 4)):
        ids = torch.nn.functional.pad(text, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
        padded = model(ids, attention_mask=mask, use_cache=False).logits[:, left : left + text.shape[1]]
        torch.testing.assert_close(padded, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("mistral", "gemma2")], ids="-".join)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True, "top_k": 20},
        {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
        {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {
            "bad_words_ids": [[5], [6, 7]],
            "min_new_tokens": 10,
            "renormalize_logits": True,
            "sequence_bias": [[[9], 2.0]],
        },
    ],
    ids=["beams", "beams2of4", "beams-sampled", "warpers", "samples", "processors"],
)
def test_every_way_to_decode_gives_the_same_with_and_without_a_cache(kinds, options):
    model = fuse(kinds)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(new_tokens(model, PROMPTS, use_cache=use_cache, max_new_tokens=16, **options)[1])
    assert found[0].shape == (3 * options.get("num_return_sequences", 1), found[0].shape[1])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("mistral", "llama"), ("gpt2", "mistral")], ids="-".join)
def test_assistants_change_the_speed_and_not_the_tokens(kinds):
    model = fuse(kinds)
    prompt = "abcabcabc, abcabc and so on, abcabc"  # long enough to leave the sliding window behind
    inputs, greedy = new_tokens(model, prompt)
    assistants = [
        {"assistant_model": model.members.experts["math"].model},
        {"assistant_model": model.members.strong.model},
        {"assistant_model": fuse(kinds, "static", experts=1)},
        {"prompt_lookup_num_tokens": 3},
    ]
    for options in assistants:
        check_same_tokens(model, new_tokens(model, prompt, **options)[1], greedy, inputs)
    sampled = new_tokens(model, prompt, assistant_model=model.members.base.model, do_sample=True)[1]
    assert sampled.shape[1] > 0


def test_a_static_cache_gives_the_same_tokens():
    for kinds in (("llama", "gpt2"), ("mistral", "gemma2")):
        model = fuse(kinds)
        inputs, dynamic = new_tokens(model, PROMPTS)
        check_same_tokens(model, new_tokens(model, PROMPTS, cache_implementation="static")[1], dynamic, inputs)


@pytest.mark.parametrize("kind", ["offloaded", "quantized"])
def test_other_caches_are_refused(fused, kind):
    with pytest.raises(BadSetting, match=f"cache_implementation='{kind}' is not for fused models"):
        new_tokens(fused, "Q", cache_implementation=kind)


def test_a_prompt_read_in_chunks_gives_the_same_tokens(fused):
    inputs, whole = new_tokens(fused, PROMPTS)
    check_same_tokens(fused, new_tokens(fused, PROMPTS, prefill_chunk_size=4)[1], whole, inputs)


def test_a_cache_carries_a_conversation_on(fused):
    first = fused.encode("Hello. ")
    opened = fused.generate(**first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([opened.sequences, fused.encode("And then?")["input_ids"]], dim=-1)
    options = {"attention_mask": torch.ones_like(more), "max_new_tokens": 8, "do_sample": False}
    carried = fused.generate(more, past_key_values=opened.past_key_values, **options)
    afresh = fused.generate(more, **options)
    torch.testing.assert_close(carried, afresh)


def test_text_streams_token_by_token(fused):
    seen = []

    class Ear(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            seen.append(text)

    inputs, ids = new_tokens(fused, "Q: and now", max_new_tokens=12)
    fused.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=Ear(fused.tokenizer, skip_prompt=True))
    assert "".join(seen) == fused.tokenizer.decode(ids[0])


def test_stop_strings_and_criteria_end_a_text(fused):
    inputs, ids = new_tokens(fused, "Q: and now", max_new_tokens=12)
    third = fused.tokenizer.decode(ids[0, 2])
    stopped = fused.generate(
        **inputs, max_new_tokens=12, do_sample=False, stop_strings=[third], tokenizer=fused.tokenizer
    )
    assert stopped.shape[1] - inputs["input_ids"].shape[1] <= 3

    class FiveMore(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            is_done = input_ids.shape[1] >= inputs["input_ids"].shape[1] + 5
            return torch.full((input_ids.shape[0],), is_done)

    five = fused.generate(
        **inputs, max_new_tokens=12, do_sample=False, stopping_criteria=StoppingCriteriaList([FiveMore()])
    )
    assert five.shape[1] == inputs["input_ids"].shape[1] + 5


def test_the_generation_config_is_heard(fused):
    inputs = fused.encode("Q: and now")
    output = fused.generate(
        **inputs, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("limit", [{"max_new_tokens": 500}, {"max_length": 600}], ids=["new", "all"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_length_that_the_model_is_set_to_is_cut_where_a_context_ends(limit, drafts):
    model = fuse()
    for name, value in limit.items():
        setattr(model.generation_config, name, value)
    prompt = torch.full((1, tiny.CONTEXT - 4), 9)
    options = {"do_sample": False, "speculate": drafts, "prefix_allowed_tokens_fn": lambda row, ids: [7, 8]}
    with pytest.warns(TrimtabWarning, match="1 of 1 texts were cut after 5 new tokens"):
        assert model.generate(prompt, **options).shape[1] == tiny.CONTEXT + 1
    config = GenerationConfig(pad_token_id=0)  # says nothing of lengths
    with pytest.warns(TrimtabWarning, match="1 of 1 texts were cut after 5 new tokens"):
        model.generate(prompt, config, **options)
    assert model.generate(prompt, **options, max_new_tokens=2).shape[1] == tiny.CONTEXT - 2  # the call goes first


def only(*ids):
    """For `generate`: the next token is the one whose turn it is, the last one for ever."""
    start = []

    def allowed(batch, sequence):
        start.append(len(sequence)) if not start else None
        return [ids[min(len(sequence) - start[0], len(ids) - 1)]]

    return allowed


def test_token_0_can_end_a_text(fused):
    inputs = fused.encode("Q: and now")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 0}
    trace = fused.generate(**inputs, **options, prefix_allowed_tokens_fn=only(7, 0), trace=True)
    assert [step.token_id for step in trace.steps] == [7, 0]


def test_token_0_is_a_token_where_nothing_is_padding():
    base = tiny.make(seed=1)
    for name in ("pad_token_id", "eos_token_id"):
        setattr(base.generation_config, name, None)
    model = FusedCausalLM.from_members(base, base, {"x": tiny.tuned(base, 2)})  # without a tokenizer
    assert model.config.pad_token_id is None
    prompt = torch.full((1, tiny.CONTEXT - 4), 9)
    options = {"max_new_tokens": 20, "do_sample": False, "prefix_allowed_tokens_fn": only(0)}
    with pytest.warns(TrimtabWarning, match="1 of 1 texts were cut after 5 new tokens"):
        model.generate(prompt, **options)


def test_scores_and_logits_come_out(fused):
    inputs = fused.encode(PROMPTS)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    output = fused.generate(**inputs, max_new_tokens=3, **options)
    assert len(output.logits) == len(output.scores) == 3
    torch.testing.assert_close(output.logits[0], fused(**inputs, logits_to_keep=1).logits[:, 0])


def test_generate_text_gives_the_new_text_only(fused):
    _, ids = new_tokens(fused, PROMPTS, max_new_tokens=9)
    texts = fused.generate_text(PROMPTS, max_new_tokens=9, do_sample=False)
    assert texts == fused.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(fused.generate_text(PROMPTS[0], max_new_tokens=2, do_sample=True, num_return_sequences=3)) == 3
