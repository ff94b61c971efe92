"""What is recorded of every step is what happened there."""

import json
import math

import pytest
import torch

from fusing import PROMPTS, fuse
from trimtab import Trace
from trimtab.core.errors import BadSetting

NAMES = ["strong", "base", "math", "facts"]


@torch.no_grad()
def test_every_step_holds_what_the_strategy_did(fused):
    trace = fused.trace(PROMPTS[0], max_new_tokens=8, do_sample=False)
    inputs = fused.encode(PROMPTS[0])
    ids = fused.generate(**inputs, max_new_tokens=8, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert [step.token_id for step in trace.steps] == ids[0, start:].tolist()
    assert trace.prompt == PROMPTS[0]
    assert trace.text == fused.tokenizer.decode(ids[0, start:]) == "".join(step.token for step in trace.steps)
    for at, step in enumerate(trace.steps):
        laws = [m.model(ids[:, : start + at]).logits[:, -1].log_softmax(-1) for m in fused.members]
        fusion = fused.strategy(laws[0], laws[1], torch.stack(laws[2:]))
        assert step.kl_nats == pytest.approx(float(fusion.kl_nats), rel=1e-3, abs=1e-5)
        assert step.reverse_kl_nats == pytest.approx(float(fusion.reverse_kl_nats), rel=1e-3, abs=1e-5)
        assert step.alpha == pytest.approx(dict(zip(NAMES[2:], fusion.alpha[:, 0].tolist(), strict=True)), abs=1e-3)
        assert step.chosen == [name for name, on in zip(NAMES[2:], fusion.is_chosen[:, 0], strict=True) if on]
        for name, law in zip([*NAMES, "fused"], [*laws, fusion.log_probs], strict=True):
            entropy = float(-(law.exp() * law).sum())
            assert step.entropy_nats[name] == pytest.approx(entropy, rel=1e-3, abs=1e-5)
            best = law[0].exp().topk(5)
            assert [p for _, p in step.top5[name]] == pytest.approx(best.values.tolist(), rel=1e-3)
            assert [t for t, _ in step.top5[name]] == [fused.tokenizer.decode([i]) for i in best.indices.tolist()]
        assert step.token == step.top5["fused"][0][0], "greedy takes the best"


def test_a_trace_survives_json(fused):
    trace = fused.trace("Q", max_new_tokens=3)
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    assert trace.expert_names == ["math", "facts"]
    assert trace.strategy == fused.strategy.to_dict()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True}], ids=str)
def test_beams_drafts_and_samples_are_traced_alike(fused, options):
    torch.manual_seed(1)
    trace = fused.trace("abcabcabc", max_new_tokens=6, **options)
    torch.manual_seed(1)
    ids = fused.generate(**fused.encode("abcabcabc"), max_new_tokens=6, **options)[0, 9:].tolist()
    ends = [at for at, token in enumerate(ids) if token == fused.config.eos_token_id]
    assert [step.token_id for step in trace.steps] == ids[: ends[0] + 1 if ends else None]


def test_a_batch_gives_a_trace_per_row(fused):
    traces = fused.generate(
        **fused.encode(PROMPTS), max_new_tokens=4, num_return_sequences=2, do_sample=True, trace=True
    )
    assert [trace.prompt for trace in traces] == [
        PROMPTS[0],
        PROMPTS[0],
        PROMPTS[1],
        PROMPTS[1],
        PROMPTS[2],
        PROMPTS[2],
    ]
    single = fused.trace(PROMPTS[1], max_new_tokens=4, do_sample=False)
    batch = fused.generate(**fused.encode(PROMPTS), max_new_tokens=4, do_sample=False, trace=True)
    assert [s.token_id for s in batch[1].steps] == [s.token_id for s in single.steps]
    assert batch[1].steps[0].kl_nats == pytest.approx(single.steps[0].kl_nats, rel=1e-3)


def test_the_end_of_text_is_the_last_step(fused):
    trace = fused.trace("Q", max_new_tokens=12, do_sample=False)
    ends = {trace.steps[3].token_id}
    cut = fused.trace("Q", max_new_tokens=12, do_sample=False, eos_token_id=list(ends))
    first = [step.token_id in ends for step in trace.steps].index(True)
    assert [step.token_id for step in cut.steps] == [step.token_id for step in trace.steps[: first + 1]]
    pair = fused.generate(
        **fused.encode(["Q", "Other"]), max_new_tokens=12, do_sample=False, eos_token_id=list(ends), trace=True
    )
    assert [step.token_id for step in pair[0].steps] == [step.token_id for step in cut.steps]
    stopped = fused.generate(
        **fused.encode(["Q", "Other"]),
        max_new_tokens=12,
        do_sample=False,
        trace=True,
        stop_strings=[trace.steps[3].token],
        tokenizer=fused.tokenizer,
    )
    assert [step.token_id for step in stopped[0].steps] == [step.token_id for step in cut.steps]


def test_token_ids_can_be_traced_and_amounts_without_alpha():
    model = fuse(strategy="mixture", experts=1)
    trace = model.trace(torch.tensor([10, 11, 12]), max_new_tokens=2)
    assert trace.steps[0].alpha is None
    assert math.isfinite(trace.steps[0].kl_nats)
    with pytest.raises(BadSetting, match="trace takes one prompt"):
        model.trace(PROMPTS, max_new_tokens=2)


def test_own_prompts_are_traced_as_they_were_read():
    model = fuse(prompts={"math": "Q: {prompt} A:"})
    trace = model.trace("Why?", max_new_tokens=5, do_sample=False)
    assert trace.prompt == "Why?"
    assert all(step.token == step.top5["fused"][0][0] for step in trace.steps)
