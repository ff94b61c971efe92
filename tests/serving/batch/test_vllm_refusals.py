"""Rows that vLLM refuses, or gives up, fail alone: the engine goes on, and the reason is the client's to read."""

import gc

import pytest
from vllm.outputs import CompletionOutput

from asking import chat, complete
from trimtab import FusedCausalLM
from trimtab.batch.requests import Sampling
from trimtab.batch.rows import BrokenWorker, Row, answered
from trimtab.batch.vllm_engine import VllmEngine, _answer
from trimtab.batch.worker import Answering, Job
from trimtab.core.errors import BadSetting, TrimtabError

REFUSED = {"type": "integer", "minimum": 5, "maximum": 3}  # by every backend, when the request is handed over
NEVER = {"type": "string", "pattern": "[^\\s\\S]"}  # taken; no text follows it
UNCOMPILED = {"type": "object", "patternProperties": {"(": {}}}  # taken; the grammar cannot be made


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals") / "fused"
    FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"}).save_pretrained(folder)
    engine = VllmEngine(folder, None, {"max_num_seqs": 8, "max_num_batched_tokens": 32})
    yield engine
    engine._llm.llm_engine.engine_core.shutdown()
    gc.collect()


def ask(engine, *rows):
    """Outcomes as a worker on Ray gives them."""
    return answered(Answering(engine, ["fused"]), [Row(row["custom_id"], row) for row in rows])


def schema(name, content, prompt="Which pet?"):
    form = {"type": "json_schema", "json_schema": {"name": "asked", "schema": content}}
    return chat(name, prompt, max_tokens=12, response_format=form)


def held(engine):
    return engine._llm.llm_engine.get_num_unfinished_requests()


def test_rows_that_vllm_refuses_fail_alone_with_its_reason(engine):
    good = [complete(f"good-{number}", prompt, max_tokens=8) for number, prompt in enumerate(("Q: Where", "Q: Who"))]
    alone = [ask(engine, row)[0].value["choices"] for row in good]
    bad = [schema("no backend", REFUSED), complete("stop", "Q: Where", stop_token_ids=[10**6])]
    outcomes = ask(engine, good[0], *bad, good[1])
    assert [outcomes[place].value["choices"] for place in (0, 3)] == alone
    for outcome in outcomes[1:3]:
        assert outcome.value is None
        assert (outcome.error.kind, outcome.error.is_input) == ("BadSetting", True)
    assert "vLLM refuses the request: " in outcomes[1].error.message
    assert "stop_token_ids holds token 1000000" in outcomes[2].error.message
    assert held(engine) == 0


def test_all_rows_of_a_batch_may_be_refused(engine):
    jobs = [Job("", (5, 6), Sampling(max_tokens=4, stop_token_ids=(10**9,))) for _ in range(30)]
    found = engine.write(jobs)
    assert all(isinstance(one, BadSetting) for one in found)
    assert "out-of-vocab" in str(found[0])
    assert held(engine) == 0
    assert engine.write([]) == []


def test_a_request_that_vllm_takes_by_half_breaks_the_worker(engine, monkeypatch):
    """What is held without being counted would be waited for without end."""
    core = engine._llm.llm_engine.engine_core

    def refuse(request):
        raise ValueError("the core does not take it")

    monkeypatch.setattr(core, "add_request", refuse)
    with pytest.raises(BrokenWorker, match="the core does not take it"):
        engine.write([Job("", (5, 6), Sampling(max_tokens=4))])
    monkeypatch.undo()
    states = engine._llm.llm_engine.output_processor.request_states
    engine._llm.llm_engine.abort_request(list(states), internal=True)
    assert held(engine) == 0


@pytest.mark.parametrize("content", [NEVER, UNCOMPILED])
def test_a_schema_that_no_text_follows_is_the_rows_fault(engine, content):
    good = complete("good", "Q: Where", max_tokens=8)
    before, bad, after = ask(engine, good, schema("never", content), good | {"custom_id": "again"})
    assert (bad.error.kind, bad.error.is_input) == ("BadSetting", True), bad
    assert "response_format cannot be met" in bad.error.message
    assert before.value["choices"] == after.value["choices"]


@pytest.mark.parametrize(
    ("reason", "schema", "kind"),
    [("error", None, TrimtabError), ("error", "{}", BadSetting), ("abort", "{}", TrimtabError)],
)
def test_a_text_that_is_not_whole_is_an_error(reason, schema, kind):
    def output(index, finish_reason):
        return CompletionOutput(index, "text", [5], None, None, finish_reason=finish_reason)

    sampling = Sampling(n=2, max_tokens=4, schema=schema)
    found = _answer(sampling, [output(0, "stop"), output(1, reason)])
    assert type(found) is kind
    assert reason in str(found) or "response_format" in str(found)
    assert len(_answer(sampling, [output(0, "stop"), output(1, "length")])) == 2


def test_seeded_rows_whose_prompts_are_read_in_parts_have_their_texts_in_whatever_batch(engine):
    """Steps of 32 tokens: every prompt takes several, and how many depends on who is there, too."""
    prompts = [f"Q: {number}+{number}=\nA: {number}\n" * 8 for number in range(4)]
    rows = [complete(f"r{n}", prompt, temperature=1.0, seed=n, max_tokens=10) for n, prompt in enumerate(prompts)]
    alone = [ask(engine, row)[0] for row in rows]
    assert all(outcome.value["usage"]["prompt_tokens"] > 64 for outcome in alone)
    together = ask(engine, *rows)
    assert [one.value["choices"] for one in together] == [one.value["choices"] for one in alone]
    assert len({one.value["choices"][0]["text"] for one in alone}) > 1
