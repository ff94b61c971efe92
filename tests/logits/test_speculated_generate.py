"""What `generate` is asked for beside tokens, with drafts as without: scores, criteria, windows, modes and refusals."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer

import tiny
from fusing import PROMPTS, fuse, new_tokens
from trimtab.core.errors import BadSetting

MANY = [*PROMPTS, "abcabcabc, abcabc and so on, abcabc", "Q"]


class Shown(StoppingCriteria):
    """Ends a text when its steps' likeliest tokens have come to a probability of 3, and keeps what it is shown."""

    is_row_wise = True

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append([step.clone() for step in scores])
        return torch.stack(scores).softmax(-1).amax(-1).sum(0) > 3.0


def test_criteria_are_shown_the_scores_so_far(fused):
    options = {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.3, "do_sample": False}
    inputs, shown = fused.encode(MANY[0]), {}
    for drafts in (0, 3):
        shown[drafts] = Shown()
        criteria = {"stopping_criteria": StoppingCriteriaList([shown[drafts]])}
        output = fused.generate(**inputs, **options, **criteria, max_new_tokens=40, speculate=drafts)
        assert 3 < len(output.scores) == len(shown[drafts].seen) < 40
        for steps in shown[drafts].seen:
            torch.testing.assert_close(steps, list(output.scores[: len(steps)]), rtol=0, atol=0)
    assert [len(steps) for steps in shown[3].seen] == [len(steps) for steps in shown[0].seen]
    torch.testing.assert_close(shown[3].seen[-1], shown[0].seen[-1], atol=1e-3, rtol=1e-4)


def test_criteria_of_each_row_are_shown_its_own_scores(fused):
    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 8}
    criteria = Shown()
    criteria.__class__ = type("Never", (Shown,), {"__call__": lambda self, *args: Shown.__call__(self, *args) & False})
    output = fused.generate(**fused.encode(MANY), **options, stopping_criteria=[criteria], speculate=3)
    rows = {row: [step[row] for step in output.scores] for row in range(len(MANY))}
    for steps in criteria.seen:
        assert all(step.shape == (1, tiny.VOCAB) for step in steps)
        assert any(all(torch.equal(a[0], b) for a, b in zip(steps, rows[row], strict=False)) for row in rows)


def test_criteria_are_shown_no_scores_where_nobody_asked(fused):
    seen = []

    class Ear(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores)
            return False

    for options in ({}, {"return_dict_in_generate": True, "output_logits": True}):
        inputs = fused.encode(MANY[0])
        fused.generate(**inputs, **options, stopping_criteria=[Ear()], speculate=3, max_new_tokens=4, do_sample=False)
    assert seen
    assert all(scores is None for scores in seen)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("name", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_what_no_fused_model_has_is_refused_with_and_without_drafts(fused, name, drafts):
    value = torch.zeros(1, 3, 48) if name == "inputs_embeds" else True
    options = {"return_dict_in_generate": True, "speculate": drafts, "max_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadSetting, match=f"a fused model has no {name}"):
        fused.generate(ids, **options, **{name: value})
    fused.generate(ids, **options, **{name: None if name == "inputs_embeds" else False})


def test_hidden_states_are_refused_also_where_a_configuration_asks_for_them():
    model, ids = fuse(), torch.tensor([[5, 6, 7]])
    config = GenerationConfig(output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=4)
    with pytest.raises(BadSetting, match="a fused model has no output_hidden_states"):
        model.generate(ids, config, speculate=3)
    model.generation_config.output_hidden_states = True
    with pytest.raises(BadSetting, match="a fused model has no output_hidden_states"):
        model.generate(ids, speculate=3, max_new_tokens=4)


# ---- caches


def test_a_cache_that_is_handed_back_keeps_to_its_windows():
    model = fuse(("mistral", "gemma2"))
    options = {"do_sample": False, "return_dict_in_generate": True}
    opened = model.generate(**model.encode("Hello, hello, hello. "), max_new_tokens=20, **options, speculate=3)
    more = torch.cat([opened.sequences, model.encode("And then? And then?")["input_ids"]], dim=-1)
    options |= {"attention_mask": torch.ones_like(more), "max_new_tokens": 20, "speculate": 0}
    carried = model.generate(more, past_key_values=opened.past_key_values, **options)
    for cache in (opened.past_key_values, carried.past_key_values):
        sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        assert sliding
        for layer in sliding:
            assert not layer.record_past
            assert layer.keys.shape[-2] == layer.values.shape[-2] == layer.sliding_window - 1
    torch.testing.assert_close(carried.sequences, model.generate(more, **options).sequences)


# ---- other ways to generate


def other_modes(model):
    """Ways to generate that have no drafts of ours, as options of `generate`."""
    math = model.members.experts["math"].model
    return {
        "beams": {"num_beams": 2},
        "sampled beams": {"num_beams": 2, "do_sample": True},
        "assistant": {"assistant_model": math},
        "sampled assistant": {"assistant_model": math, "do_sample": True},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "own loop": {"custom_generate": lambda model, input_ids, **options: input_ids},
    }


@pytest.mark.parametrize("mode", ["beams", "sampled beams", "assistant", "sampled assistant", "lookup", "own loop"])
def test_beams_and_assistants_go_without(fused, mode):
    options = {"max_new_tokens": 4} | other_modes(fused)[mode]
    new_tokens(fused, "Q: and now", **options, speculate="auto")
    assert "no beams, no assistant model" in fused.last_speculation.reason
    new_tokens(fused, "Q: and now", **options, speculate=0)
    with pytest.raises(BadSetting, match=r"speculate=4 cannot be: only greedy and sampled generation") as error:
        new_tokens(fused, "Q: and now", **options, speculate=4)
    assert 'speculate="auto"' in error.value.fix


def test_beams_are_refused_where_the_model_is_set_to_a_number():
    model = fuse()
    model.speculate = 4
    with pytest.raises(BadSetting, match="speculate=4 cannot be"):
        model.generate(torch.tensor([[5, 6, 7]]), num_beams=2, max_new_tokens=4)
    model.generate(torch.tensor([[5, 6, 7]]), num_beams=2, max_new_tokens=4, speculate="auto")  # the fix
