"""The evaluation loop against `generate` and against one item at a time."""

from dataclasses import dataclass

import pytest
import torch

from tiny_models import make_model, make_tokenizer
from trimtab.core.errors import EmptyPrompt
from trimtab.measure import evaluate

PROMPTS = [
    "Q: Where does Ada Moss live?\nA:",
    "Q: What is 12 + 7?\nA:",
    "Q: 1\nA:",
    "Q: Which animal does Ben Reed keep in the city of Port Elm?\nA:",
    "the",
]


@dataclass(frozen=True)
class Asked:
    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] | None = None
    label: int | None = None


ASKED = [
    Asked("a", PROMPTS[0], " Port Elm", (" Port Elm", " a grey cat", " 19"), 0),
    Asked("b", PROMPTS[1], " 19", (" 19", " 7"), 0),
    Asked("c", PROMPTS[3], " a cat", (" a cat and works as clockmaker", " 4", " cat", " dog"), 2),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=[1, 2])
def model(request, tokenizer):
    return make_model(request.param, len(tokenizer))


def written_by_generate(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The same greedy answer by transformers' own loop, one prompt at a time."""
    token_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    stop = sorted(evaluate.stop_ids_of(tokenizer))
    out = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    written = [token_id for token_id in out[0, token_ids.shape[1] :].tolist() if token_id not in stop]
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("max_tokens", [60, 16_384])
def test_greedy_answers_are_those_of_generate(model, tokenizer, max_tokens: int) -> None:
    prefixes = evaluate.read_prompts(model, tokenizer, PROMPTS, max_new_tokens=12, max_tokens=max_tokens)
    answers = evaluate.answer_prompts(model, tokenizer, prefixes, max_new_tokens=12)
    assert answers == [written_by_generate(model, tokenizer, prompt, 12) for prompt in PROMPTS]


def test_a_prompt_read_once_can_be_answered_twice(model, tokenizer) -> None:
    prefixes = evaluate.read_prompts(model, tokenizer, PROMPTS, max_new_tokens=8)
    first = evaluate.answer_prompts(model, tokenizer, prefixes, max_new_tokens=8)
    assert evaluate.answer_prompts(model, tokenizer, prefixes, max_new_tokens=8) == first


def test_finished_rows_leave_the_batch_and_the_others_go_on_unchanged(model, tokenizer) -> None:
    prefixes = evaluate.read_prompts(model, tokenizer, PROMPTS, max_new_tokens=16)
    usual = evaluate.continue_greedily(model, prefixes[0], frozenset(), 16)
    # What some rows write first ends them; the other rows must stay as they are.
    stop = frozenset({usual[0][0], usual[1][1]})
    for answer, whole in zip(evaluate.continue_greedily(model, prefixes[0], stop, 16), usual, strict=True):
        ends = [index for index, token_id in enumerate(whole) if token_id in stop]
        assert answer == (whole[: ends[0]] if ends else whole)


def test_stop_tokens_are_the_end_and_every_line_break(tokenizer) -> None:
    stop = evaluate.stop_ids_of(tokenizer)
    assert tokenizer.eos_token_id in stop
    assert set(tokenizer("\n")["input_ids"]) <= stop
    assert all("\n" in tokenizer.decode([i]) or i == tokenizer.eos_token_id for i in stop)


def test_an_empty_prompt_is_refused(model, tokenizer) -> None:
    with pytest.raises(EmptyPrompt, match="the prompt is empty"):
        evaluate.read_prompts(model, tokenizer, ["a", ""], max_new_tokens=4)


@torch.inference_mode()
def summed_by_hand(model, tokenizer, prompt: str, choice: str) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    token_ids = tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
    log_probs = model(token_ids).logits[0].log_softmax(-1)
    return sum(float(log_probs[at - 1, token_ids[0, at]]) for at in range(start, token_ids.shape[1]))


@pytest.mark.parametrize("max_tokens", [40, 16_384])
def test_choices_are_scored_as_one_by_one(model, tokenizer, max_tokens: int) -> None:
    choices = evaluate.encode_choices(tokenizer, ASKED)
    log_probs = evaluate.read_choices(model, tokenizer, choices, max_tokens)
    per_token = log_probs.gather(1, choices.token_ids[:, None])[:, 0]
    found = [float(part.sum()) for part in torch.split(per_token, choices.lengths)]
    by_hand = [summed_by_hand(model, tokenizer, item.prompt, c) for item in ASKED for c in item.choices]
    assert found == pytest.approx(by_hand, abs=2e-4)
    sums = iter(by_hand)
    best = [max((next(sums), -index) for index in range(len(item.choices))) for item in ASKED]
    assert evaluate.choose(choices, log_probs) == [-index for _, index in best]


def test_batches_hold_every_row_once_and_stay_within_bounds() -> None:
    sequences = [[1] * n for n in (5, 1, 9, 3, 3, 7)]
    found = list(evaluate.batches(sequences, pad_id=0, max_tokens=20, extra=2))
    assert sorted(row for batch in found for row in batch.rows) == list(range(6))
    for batch in found:
        assert len(batch.rows) == 1 or batch.token_ids.shape[0] * (batch.token_ids.shape[1] + 2) <= 20
        assert [sum(row) for row in batch.mask.tolist()] == [len(sequences[row]) for row in batch.rows]
