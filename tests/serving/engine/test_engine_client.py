"""What is taken down of traced texts, and what is told where no room was left for it."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams

from trimtab import make_strategy
from trimtab.serving.http.engine_client import SteeredEngine, TracedRequest, _is_part
from trimtab.serving.http.routes import show_metrics, show_trace
from trimtab.serving.requests import SEVERAL

STRATEGY = make_strategy("dynamic", expert_names=("math", "facts"))


class Dropping:
    """An engine that says three tokens, and whose workers keep so many steps of them."""

    renderer = SimpleNamespace(tokenizer=None)
    scheduler_config = SimpleNamespace(max_num_queued_reqs=10)
    vllm_config = SimpleNamespace(speculative_config=None)

    def __init__(self, kept):
        self.kept, self.asked = kept, []

    async def generate(self, prompt, params, request_id):
        self.asked.append(params.extra_args["trace"])
        choices = [SimpleNamespace(index=index, token_ids=[5, 6, 7], finish_reason=None) for index in range(params.n)]
        yield SimpleNamespace(prompt_token_ids=[1, 2], outputs=choices)

    def check_admission(self, n=1, request_id=None):
        raise QueueOverflowError

    async def collective_rpc(self, method, timeout, args):
        assert timeout is None  # with several processes, late answers would be taken for those of the next call
        assert method == "trimtab_traces"
        (places,) = args
        assert all(start == 1 for _, _, start in places)
        return [[[{"kl_nats": 0.0}] * self.kept for _ in places], [[] for _ in places]]


def traced(engine, *requests, asked_for="cmpl-a", n=1):
    """(status, content) of the trace, after these requests."""

    async def run():
        steered = SteeredEngine(engine, STRATEGY)
        for request in requests:
            params = SamplingParams(n=n, extra_args={"trace": 1})
            async for _ in engine.generate("x", params, request):
                pass
        state = SimpleNamespace(trimtab=steered)
        return await show_trace(SimpleNamespace(app=SimpleNamespace(state=state)), asked_for)

    answer = asyncio.run(run())
    return answer.status_code, json.loads(answer.body)


def test_a_trace_is_whole_cut_dropped_or_unknown():
    status, content = traced(Dropping(4), "cmpl-a-0")
    (choice,) = content["choices"]
    assert (status, choice["is_whole"], [token["token_id"] for token in choice["tokens"]]) == (200, True, [5, 6, 7])
    status, content = traced(Dropping(2), "cmpl-a-0")
    assert (status, content["choices"][0]["is_whole"], len(content["choices"][0]["tokens"])) == (200, False, 2)
    status, content = traced(Dropping(0), "cmpl-a-0")
    assert (status, "was dropped" in content["error"]["message"]) == (410, True)
    assert traced(Dropping(4), "cmpl-b-0")[0] == 404


class Silent(Dropping):
    """Its workers answer nobody."""

    async def collective_rpc(self, method, timeout, args):
        assert timeout is None
        await asyncio.Event().wait()


def test_workers_that_do_not_answer_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("trimtab.serving.http.engine_client.SECONDS_FOR_ENGINE", 0.05)
    status, content = traced(Silent(3), "cmpl-a-0")
    assert (status, "ask again later" in content["error"]["message"]) == (503, True)

    async def scrape():
        state = SimpleNamespace(trimtab=SteeredEngine(Silent(3), STRATEGY))
        return await show_metrics(SimpleNamespace(app=SimpleNamespace(state=state)))

    assert asyncio.run(scrape()).status_code == 503


def test_more_choices_than_the_queue_ever_takes_are_the_clients_fault():
    engine = Dropping(3)
    SteeredEngine(engine, STRATEGY)
    for n in (11, 10**20, 10**400):
        with pytest.raises(VLLMValidationError, match="VLLM_MAX_N_SEQUENCES"):
            engine.check_admission(n)
    with pytest.raises(QueueOverflowError):
        engine.check_admission(10)


def test_keys_are_our_own_and_say_whether_there_are_several_choices():
    engine = Dropping(3)
    _, content = traced(engine, "cmpl-a-0", "cmpl-a-0", n=2)
    assert [choice["index"] for choice in content["choices"]] == [0, 1, 0, 1]
    assert len(set(engine.asked)) == 2
    assert all(mark.endswith(SEVERAL) and "cmpl" not in mark and len(mark) > 32 for mark in engine.asked)


@pytest.mark.parametrize("is_new_only", [True, False])
def test_tokens_are_taken_down_as_far_as_there_is_room(monkeypatch, is_new_only):
    monkeypatch.setattr("trimtab.serving.http.engine_client.POSITIONS_KEPT", 5)
    traced = TracedRequest("a")
    for count in (2, 4):
        for index in (0, 1):
            traced.add(index, range(2) if is_new_only else range(count), is_new_only)
    assert [len(traced.choices[index]) for index in (0, 1)] == [3, 2]
    assert traced.lengths == {0: 4, 1: 4}


def test_which_requests_belong_to_a_response():
    for request in ("cmpl-a-0", "resp_a_12", "chatcmpl-a_3"):
        assert _is_part(request, request[: -2 if request[-2] in "-_" else -3])
    for request in ("cmpl-a-0-1", "cmpl-a-", "cmpl-a-x", "cmpl-ab-0", "cmpl-a.0", "cmpl-a"):
        assert not _is_part(request, "cmpl-a")
