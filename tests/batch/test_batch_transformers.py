"""Requests answered by the transformers engine, against the fused model asked directly."""

import json
import shutil

import pytest
import torch

import tiny
from asking import chat, complete
from trimtab import FusedCausalLM
from trimtab.batch.responses import LOWEST_LOGPROB
from trimtab.batch.rows import Row, RowError, answered
from trimtab.batch.transformers_engine import TransformersEngine
from trimtab.batch.worker import Answering
from trimtab.logits.generation_settings import sampling_defaults

PROMPTS = ["Where is Ada?", "12+7", "a", "The quick brown fox sleeps."]


@pytest.fixture(scope="module")
def worker(fused_dir):
    return Answering(TransformersEngine(fused_dir), ["fused", "alias"])


@pytest.fixture(scope="module")
def fused(fused_dir):
    return FusedCausalLM.from_pretrained(fused_dir)


def ask(worker, *rows):
    """Bodies, or errors, in the order of the rows."""
    outcomes = answered(worker, [Row(row["custom_id"], row) for row in rows])
    return [outcome.error or outcome.value for outcome in outcomes]


def first(answer):
    assert not isinstance(answer, RowError), answer
    return answer["choices"][0]


def direct(fused, prompt, **options):
    """The fused model's own greedy text, and its tokens."""
    inputs = fused.encode([prompt])
    ids = fused.generate(**inputs, **{"do_sample": False, "max_new_tokens": 12, "speculate": 0} | options)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    new = new[: new.index(1) + 1] if 1 in new else new
    return fused.tokenizer.decode(new, skip_special_tokens=True), new


def test_greedy_texts_are_the_fused_models_own_in_whatever_batch(worker, fused):
    rows = [complete(f"t{i}", prompt, max_tokens=12) for i, prompt in enumerate(PROMPTS)]
    rows += [chat(f"c{i}", prompt, max_tokens=12) for i, prompt in enumerate(PROMPTS)]
    asked = [*PROMPTS, *([{"role": "user", "content": prompt}] for prompt in PROMPTS)]
    for answer, row, prompt in zip(ask(worker, *rows), rows, asked, strict=True):
        text, new = direct(fused, prompt)
        choice = first(answer)
        is_chat = row["url"].endswith("chat/completions")
        assert (choice["message"]["content"] if is_chat else choice["text"]) == text
        assert answer["object"] == ("chat.completion" if is_chat else "text_completion")
        assert choice["finish_reason"] == ("stop" if new[-1] == 1 else "length")
        prompt_tokens = fused.encode([prompt])["input_ids"].shape[1]
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(new)}
        assert answer["usage"] == counts | {"total_tokens": prompt_tokens + len(new)}
        assert answer["model"] == "fused"
        assert ask(worker, row)[0]["choices"] == answer["choices"]


def test_a_seeded_row_has_the_same_text_in_whatever_batch_it_falls(worker):
    def seeded(seed, prompt="Where is Ada?", **more):
        return complete(f"s{seed}{prompt}", prompt, temperature=1.0, max_tokens=10, seed=seed, **more)

    alone = {seed: ask(worker, seeded(seed))[0]["choices"] for seed in range(4)}
    others = [complete(f"o{i}", prompt, temperature=1.0, max_tokens=10) for i, prompt in enumerate(PROMPTS)]
    together = ask(worker, others[0], seeded(2), seeded(0, "12+7"), *others[1:], seeded(0), seeded(3), seeded(1))
    assert [together[place]["choices"] for place in (6, 8, 1, 7)] == list(alone.values())
    assert len({json.dumps(choices) for choices in alone.values()}) == 4
    several = ask(worker, seeded(1, n=3))[0]["choices"]
    assert len({choice["text"] for choice in several}) == 3
    assert [choice["index"] for choice in several] == [0, 1, 2]


def test_rows_without_a_seed_differ_and_leave_the_seeded_ones_alone(worker):
    rows = [complete(f"o{i}", "Where is Ada?", temperature=1.0, max_tokens=10) for i in range(4)]
    seeded = complete("s", "Where is Ada?", temperature=1.0, max_tokens=10, seed=5)
    answers = [ask(worker, seeded, *rows)[1:] for _ in range(2)]
    assert len({first(answer)["text"] for batch in answers for answer in batch}) == 8


@pytest.mark.parametrize(
    ("name", "values"),
    [("temperature", (0.3, 3.0)), ("top_p", (0.05, 1.0)), ("top_k", (1, 50)), ("min_p", (0.9, 0.0)), ("seed", (0, 1))],
)
def test_every_setting_of_the_drawing_changes_what_is_drawn(worker, name, values):
    sampled = {"temperature": 1.5, "max_tokens": 16, "seed": 3}
    rows = [complete(f"{name}{value}", "12+7", **sampled | {name: value}) for value in values]
    one, other = (first(answer)["text"] for answer in ask(worker, *rows))
    assert one != other


def test_a_repetition_penalty_changes_the_text_and_min_tokens_puts_the_end_off(worker, fused):
    plain, new = direct(fused, "12+7", max_new_tokens=24)
    penalised, longer = ask(
        worker,
        complete("a", "12+7", max_tokens=24, repetition_penalty=5.0),
        complete("b", "12+7", max_tokens=24, stop_token_ids=[new[2]], min_tokens=5),
    )
    assert first(penalised)["text"] != plain
    assert longer["usage"]["completion_tokens"] > 5
    ended = ask(worker, complete("c", "12+7", max_tokens=24, stop_token_ids=[new[2]]))[0]
    at = new.index(new[2]) + 1
    assert ended["usage"]["completion_tokens"] == at
    assert (first(ended)["finish_reason"], first(ended)["stop_reason"]) == ("stop", new[2])
    assert first(ended)["text"] == fused.tokenizer.decode(new[: at - 1])


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_stop_texts_end_a_text_before_them(worker, fused, length, speculate):
    whole = {prompt: direct(fused, prompt, max_new_tokens=24)[0] for prompt in PROMPTS}
    stops = {prompt: text[5 : 5 + length] for prompt, text in whole.items()}
    worker._engine._fused.speculate = speculate
    answers = ask(worker, *(complete(p, p, max_tokens=24, stop=["never said", stops[p]]) for p in PROMPTS)) + ask(
        worker, *(complete(p, p, max_tokens=24, stop=next(iter(stops.values()))) for p in PROMPTS)
    )
    worker._engine._fused.speculate = "auto"
    wanted = [(p, stops[p]) for p in PROMPTS] + [(p, next(iter(stops.values()))) for p in PROMPTS]
    for answer, (prompt, stop) in zip(answers, wanted, strict=True):
        choice, text = first(answer), whole[prompt]
        if stop in text:
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
            assert choice["text"] == text[: text.index(stop)]
            assert answer["usage"]["completion_tokens"] == text.index(stop) + len(stop)
        else:
            assert choice["text"] == text
            assert choice["stop_reason"] is None


def test_a_stop_text_that_the_prompt_begins_stops_nothing(worker, fused):
    text, _ = direct(fused, "12+7")
    answer = ask(worker, complete("a", "12+7", max_tokens=12, stop=[f"7{text[0]}"]))[0]
    assert f"7{text[0]}" not in text
    assert first(answer)["text"] == text


def test_log_probabilities_are_those_of_the_fused_law(worker, fused):
    completion, conversation, bare = ask(
        worker,
        complete("a", "12+7", max_tokens=6, logprobs=3),
        chat("b", "12+7", max_tokens=6, logprobs=True, top_logprobs=2),
        chat("c", "12+7", max_tokens=6, logprobs=True),
    )
    text, new = direct(fused, "12+7", max_new_tokens=6)
    found = first(completion)["logprobs"]
    assert found["tokens"] == [fused.tokenizer.decode([token]) for token in new]
    assert found["text_offset"] == list(range(len(new)))
    score = float(fused.score(["12+7"], ["".join(found["tokens"])])[0]) if new[-1] != 1 else None
    if score is not None:
        assert sum(found["token_logprobs"]) == pytest.approx(score, abs=1e-3)
    for top, logprob in zip(found["top_logprobs"], found["token_logprobs"], strict=True):
        assert len(top) == 3
        assert max(top.values()) == logprob
    content = first(conversation)["logprobs"]["content"]
    assert all(
        len(step["top_logprobs"]) == 2 and step["top_logprobs"][0]["logprob"] == step["logprob"] for step in content
    )
    assert all(bytes(step["bytes"]).decode() == step["token"] for step in content)
    assert all(step["top_logprobs"] == [] for step in first(bare)["logprobs"]["content"])
    assert first(completion)["text"] == text
    assert all(logprob >= LOWEST_LOGPROB for logprob in found["token_logprobs"])


def test_log_probabilities_are_raw_whatever_the_drawing_is(worker):
    hot, cold = ask(
        worker,
        complete("a", "12+7", max_tokens=1, logprobs=5, temperature=4.0, seed=1, top_k=2),
        complete("b", "12+7", max_tokens=1, logprobs=5),
    )
    ours, theirs = (first(answer)["logprobs"]["top_logprobs"][0] for answer in (hot, cold))
    assert len(theirs) == 5
    assert {token: ours[token] for token in theirs} == pytest.approx(theirs)


def test_several_prompts_and_token_ids(worker, fused):
    ids = [[int(token) for token in fused.encode([prompt])["input_ids"][0]] for prompt in PROMPTS]
    by_text, by_ids, one = ask(
        worker,
        complete("a", PROMPTS, max_tokens=8),
        complete("b", ids, max_tokens=8),
        complete("c", ids[0], max_tokens=8),
    )
    assert [choice["text"] for choice in by_text["choices"]] == [direct(fused, p, max_new_tokens=8)[0] for p in PROMPTS]
    assert [choice["index"] for choice in by_text["choices"]] == [0, 1, 2, 3]
    assert (by_ids["choices"], by_ids["usage"]) == (by_text["choices"], by_text["usage"])
    assert one["choices"] == by_text["choices"][:1]


def test_a_chat_without_a_length_may_fill_the_context(worker, fused):
    answer = ask(worker, chat("a", "Where is Ada?", stop=["zzzz"]))[0]
    used = answer["usage"]
    assert first(answer)["finish_reason"] == "stop" or used["total_tokens"] == tiny.CONTEXT


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (complete("x", "a" * 120, max_tokens=9), "120 tokens, and 9 new tokens are asked for"),
        (complete("x", "a" * 200), "200 tokens"),
        (chat("x", "a" * 200), "can read 128 tokens in all"),
        (complete("x", [5, tiny.VOCAB]), f"prompt holds token {tiny.VOCAB}"),
        (complete("x", "a", stop_token_ids=[10**30]), f"stop_token_ids holds token {10**30}"),
        (complete("x", "a", model="gpt-9"), "run the batch with --model-name gpt-9"),
        (complete("x", "a", min_tokens=5, max_tokens=4), "min_tokens is 5"),
        (complete("x", "a", presence_penalty=0.5), "the transformers engine cannot follow"),
    ],
)
def test_a_row_that_cannot_be_answered_fails_alone(worker, row, says):
    before, bad, after = ask(worker, complete("a", "12+7", model="alias"), row, complete("b", "12+7"))
    assert isinstance(bad, RowError)
    assert bad.is_input
    assert says in bad.message
    assert first(before)["text"] == first(after)["text"]
    assert before["model"] == "alias"


STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('The user speaks first') }}{% endif %}"
    "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}{{ messages[0].content / 2 if messages[1] else '' }}"
)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (chat("x", "", messages=[{"role": "system", "content": "Be brief."}]), "TemplateError: The user speaks first"),
        (
            chat("x", "", messages=[{"role": "user", "content": "a"}] * 2),
            "template refuses the conversation: TypeError",
        ),
        (complete("x", "12\ud800"), r"the prompt holds '\ud800', which is half a character"),
        (chat("x", "\udfff7"), r"the prompt holds '\udfff', which is half a character"),
    ],
)
@pytest.mark.parametrize("prompts", [{}, {"math": "chat"}])
def test_a_row_that_the_template_or_the_tokenizer_refuses_fails_alone_and_the_others_are_written_together(
    fused_dir, tmp_path, monkeypatch, row, says, prompts
):
    folder = fused_dir.parent
    members = (str(folder / "strong"), str(folder / "base"), {"math": str(folder / "math")})
    FusedCausalLM.from_members(*members, prompts=prompts).save_pretrained(tmp_path / "strict")
    engine, written = TransformersEngine(tmp_path / "strict"), []
    engine.tokenizer.chat_template = STRICT
    write = engine.write
    monkeypatch.setattr(engine, "write", lambda jobs: written.append(len(jobs)) or write(jobs))
    rows = [chat("a", "12+7", max_tokens=4), row, complete("b", "12+7", max_tokens=4)]
    before, bad, after = ask(Answering(engine, ["fused"]), *rows)
    assert written == [2]
    assert isinstance(bad, RowError)
    assert (bad.kind, bad.is_input) == ("BadSetting", True)
    assert says in bad.message
    assert first(before)["message"]["content"]
    assert first(after)["text"]


def test_a_row_that_cannot_be_prepared_for_another_reason_fails_alone_too(worker, monkeypatch):
    engine, longest, write = worker._engine, worker._engine.longest_prompt, worker._engine.write
    written = []

    def failing(job):
        if job.prompt == "fails":
            raise RuntimeError("out of memory")
        return longest(job)

    monkeypatch.setattr(engine, "longest_prompt", failing)
    monkeypatch.setattr(engine, "write", lambda jobs: written.append(len(jobs)) or write(jobs))
    good = complete("a", "12+7", max_tokens=4)
    before, bad, after = ask(worker, good, complete("b", "fails"), good | {"custom_id": "c"})
    assert written == [2]
    assert (bad.kind, bad.is_input) == ("RuntimeError", False)
    assert before["choices"] == after["choices"]


@pytest.mark.parametrize("prompts", [{}, {"math": "Please answer: {prompt}"}])
def test_without_a_chat_template_a_conversation_is_written_as_serve_writes_it(fused_dir, tmp_path, prompts):
    for name in ("strong", "base", "math"):
        shutil.copytree(fused_dir.parent / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    members = (str(tmp_path / "strong"), str(tmp_path / "base"), {"math": str(tmp_path / "math")})
    bare = FusedCausalLM.from_members(*members, prompts=prompts)
    bare.save_pretrained(tmp_path / "bare")
    worker = Answering(TransformersEngine(tmp_path / "bare"), ["bare"])
    messages = [{"role": role, "content": "1+1"} for role in ("system", "user")]
    conversation, text = ask(
        worker,
        chat("a", "", messages=messages, max_tokens=8),
        complete("b", "System: 1+1\nUser: 1+1\nAssistant:", max_tokens=8),
    )
    assert conversation["usage"] == text["usage"]
    if not prompts:  # a member's own prompt holds the contents of a conversation, not its rendering
        assert first(conversation)["message"]["content"] == first(text)["text"]
    else:
        assert first(conversation)["message"]["content"]


def test_a_generation_that_fails_fails_its_row_alone(worker, monkeypatch):
    fused, generate = worker._engine._fused, FusedCausalLM.generate

    def failing(self, *args, **kwargs):
        if bool((kwargs["input_ids"] == 7).any()):
            raise RuntimeError("out of memory")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(fused), "generate", failing)
    before, bad, after = ask(
        worker,
        complete("a", [5, 6], max_tokens=4),
        complete("b", [6, 7], max_tokens=4),
        complete("c", [5, 6], max_tokens=4),
    )
    assert bad.kind == "RuntimeError"
    assert not bad.is_input
    assert before["choices"] == after["choices"]


def test_members_with_prompts_of_their_own_are_given_them(fused_dir, tmp_path, fused):
    folder = fused_dir.parent
    members = (str(folder / "strong"), str(folder / "base"), {"math": str(folder / "math")})
    own = FusedCausalLM.from_members(*members, prompts={"math": "Please answer: {prompt}"})
    own.save_pretrained(tmp_path / "own")
    worker = Answering(TransformersEngine(tmp_path / "own"), ["own"])
    answer, ids, long = ask(
        worker, complete("a", "12+7", max_tokens=12), complete("b", [5, 6]), complete("c", "a" * 105, max_tokens=10)
    )
    assert first(answer)["text"] == direct(own, "12+7")[0] != direct(fused, "12+7")[0]
    assert "token ids, but members render prompts of their own" in ids.message
    assert "the prompt has 120 tokens" in long.message


def test_a_worker_draws_afresh_although_torch_starts_every_process_alike(fused_dir):
    torch.manual_seed(0)
    TransformersEngine(fused_dir)
    one = torch.initial_seed()
    torch.manual_seed(0)
    TransformersEngine(fused_dir)
    assert len({0, one, torch.initial_seed()}) == 3


def test_conversations_are_rendered_as_their_request_says(fused):
    """Each row of a batch by its own fields, for every member."""
    thinking = (
        tiny.CHAT + "{% if tools %}T{% endif %}{% if enable_thinking is defined and not enable_thinking %}#{% endif %}"
    )
    fused = tuned_to(fused, thinking, prompts={"math": "chat"})
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes, "}]
    rows = {
        "plain": ({"messages": talk[:1]}, {}),
        "thinking": (
            {"messages": talk[:1], "chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False},
        ),
        "tools": ({"messages": talk[:1], "tools": [{"type": "function"}]}, {"tools": [{"type": "function"}]}),
        "second turn": ({"messages": talk}, {"add_generation_prompt": True}),
        "continued": (
            {"messages": talk, "continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": True},
        ),
    }
    worker = Answering(WithModel(fused), ["fused"])
    answers = ask(worker, *(chat(name, "", max_tokens=6, **body) for name, (body, _) in rows.items()))
    for answer, (body, options) in zip(answers, rows.values(), strict=True):
        wanted = fused.generate_text(body["messages"], options, max_new_tokens=6, do_sample=False, speculate=0)[0]
        assert first(answer)["message"]["content"] == wanted


def test_rows_follow_the_directorys_generation_settings_unless_they_say_otherwise(fused):
    fused = tuned_to(fused, tiny.CHAT)
    fused.generation_config.update(temperature=0.01, min_p=0.2, repetition_penalty=1.5, max_new_tokens=4, top_k=3)
    worker = Answering(WithModel(fused), ["fused"])
    free = {"temperature": None}
    silent, loud = ask(
        worker,
        chat("silent", "Hi", **free),
        chat("loud", "Hi", temperature=0, min_p=0, repetition_penalty=1, top_k=0, max_tokens=9),
    )
    assert silent["usage"]["completion_tokens"] <= 4
    talk = [{"role": "user", "content": "Hi"}]
    options = {"do_sample": False, "speculate": 0}
    assert first(silent)["message"]["content"] == fused.generate_text(talk, **options)[0]
    plain = {"repetition_penalty": 1.0, "max_new_tokens": 9, **options}
    assert first(loud)["message"]["content"] == fused.generate_text(talk, **plain)[0]


def tuned_to(fused, template, **options):
    """The same members with a chat template of this test's own."""
    members = fused.members
    experts = {name: member.model for name, member in members.experts.items()}
    tokenizer = tiny.make_tokenizer(chat_template=template)
    return FusedCausalLM.from_members(members.strong.model, members.base.model, experts, tokenizer=tokenizer, **options)


class WithModel(TransformersEngine):
    """The engine on a model that is loaded."""

    def __init__(self, fused):
        self._fused, self.tokenizer = fused, fused.tokenizer
        self.context, self.vocab_size = fused.config.max_position_embeddings, fused.config.vocab_size
        self.defaults = sampling_defaults(fused.generation_config)
