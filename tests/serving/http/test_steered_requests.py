"""Requests with settings of their own: the law asked for, in any company, sampled or scored; traces and metrics."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bench.served import ACCEPTED, DRAFTED
from servers import serving

from trimtab.serving.requests import read_settings
from trimtab.serving.steering import fuse_each

PROMPT = "Q: Who lives in the north?\nA:"
CHAT = {"model": "zoo", "messages": [{"role": "user", "content": "Which pet does Jakob Brulman keep?"}]}
SETTINGS = [
    {},
    {"alpha": 0},
    {"alpha": 0.5},
    {"alpha": 1.7, "expert": "math"},
    {"expert": "facts"},
    {"experts": ["facts", "math"], "alpha_max": 0.25},
]


def laws_of(fused, ids, given):
    """(fused log-probabilities of every position, Fusion) by the transformers engine's members and these settings."""
    members = [member.model(torch.tensor([ids])).logits[0].detach().log_softmax(-1) for member in fused.members]
    strong, base, *experts = members
    asked = read_settings(given, fused.strategy)
    return fuse_each(strong, base, torch.stack(experts), [asked] * len(ids), fused.strategy)


def complete(server, given, **more):
    body = {"model": "zoo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 5, "vllm_xargs": given}
    return server.ask("/v1/completions", body | more)


def check_law(fused, answer, given) -> None:
    """The log-probabilities of an answer are those of the law asked for, at its own tokens."""
    choice = answer["choices"][0]
    ids = fused.tokenizer(PROMPT)["input_ids"]
    new = choice["token_ids"]
    law = laws_of(fused, ids + new, given).log_probs[len(ids) - 1 :]
    wanted = [float(law[place, token]) for place, token in enumerate(new)]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-3)
    assert all(float(law[place].max()) - wanted[place] < 1e-3 for place in range(len(new)))  # greedy by that law


@pytest.mark.parametrize("given", SETTINGS, ids=json.dumps)
def test_the_law_is_the_one_asked_for(server, fused, given) -> None:
    check_law(fused, complete(server, given, return_token_ids=True), given)


def test_requests_of_unlike_settings_run_together(server, fused) -> None:
    asked = list(itertools.islice(itertools.cycle(SETTINGS), 36))
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda given: complete(server, given, return_token_ids=True, max_tokens=24), asked))
    for given, answer in zip(asked, answers, strict=True):
        check_law(fused, answer, given)
    texts = {json.dumps(given): answer["choices"][0]["text"] for given, answer in zip(asked, answers, strict=True)}
    assert len(set(texts.values())) > 2, "the settings hardly change anything here"


def test_prompts_are_scored_by_the_law_asked_for(server, fused) -> None:
    ids = fused.tokenizer(PROMPT)["input_ids"]

    def score(given):
        answer = complete(server, given, echo=True, max_tokens=1)
        return answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]

    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        scores = list(pool.map(score, SETTINGS))
    for given, found in zip(SETTINGS, scores, strict=True):
        law = laws_of(fused, ids, given).log_probs
        assert found == pytest.approx([float(law[place, ids[place + 1]]) for place in range(len(ids) - 1)], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(scores[0], scores[1], strict=True)) > 0.1


MISTAKES = [
    ({"expert": "fact"}, "did you mean 'facts'"),
    ({"alpha": -1}, "from 0 to 10"),
    ({"alpha": "x"}, "a number"),
    ({"alhpa": 1}, "did you mean 'alpha'"),
    ({"alpha_max": 1000}, "from 0 to 10"),
    ({"trace": "yes"}, "1 or 0"),
]


@pytest.mark.parametrize(("given", "told"), MISTAKES)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_answered_with_400_and_what_is_known(server, given, told: str, stream: bool) -> None:
    for path, body in (("/v1/completions", {"model": "zoo", "prompt": "a"}), ("/v1/chat/completions", CHAT)):
        status, text = server.call(path, {**body, "max_tokens": 2, "stream": stream, "vllm_xargs": given})
        assert (status, told in text) == (400, True), text


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_none_are_answered_with_400(server, word: bytes) -> None:
    body = b'{"model": "zoo", "prompt": "a", "max_tokens": 2, "vllm_xargs": {"alpha": ' + word + b"}}"
    status, text = server.call("/v1/completions", body)
    assert (status, "from 0 to 10" in text) == (400, True), text


def test_beam_search_takes_no_settings(server) -> None:
    body = {"model": "zoo", "prompt": "a", "max_tokens": 2, "use_beam_search": True, "n": 2}
    status, text = server.call("/v1/completions", {**body, "vllm_xargs": {"alpha": 0.5}})
    assert (status, "beam search" in text) == (400, True)


def test_a_trace_tells_what_fusion_did_at_each_token(server, fused) -> None:
    given = {"alpha": 0.5, "trace": 1}
    answer = complete(server, given, return_token_ids=True)
    trace = server.ask(f"/v1/traces/{answer['id']}")
    tokens = trace["choices"][0]["tokens"]
    ids, new = fused.tokenizer(PROMPT)["input_ids"], answer["choices"][0]["token_ids"]
    fusion = laws_of(fused, ids + new, given)
    assert [token["token_id"] for token in tokens] == new
    for place, token in enumerate(tokens, start=len(ids) - 1):
        assert token["kl_nats"] == pytest.approx(float(fusion.kl_nats[place]), abs=1e-3)
        wanted = dict(zip(fused.expert_names, fusion.alpha[:, place].tolist(), strict=True))
        assert token["alpha"] == pytest.approx(wanted, abs=2e-2)
        assert token["chosen"] == [name for e, name in enumerate(fused.expert_names) if fusion.is_chosen[e, place]]


def test_traces_of_several_prompts_and_choices_stay_apart(server) -> None:
    body = {"prompt": [PROMPT, "Q: 12+7\nA:"], "n": 2, "temperature": 1.0, "seed": 3, "return_token_ids": True}
    answer = complete(server, {"trace": 1}, **body)
    choices = server.ask(f"/v1/traces/{answer['id']}")["choices"]
    said = [choice["token_ids"] for choice in answer["choices"]]
    assert [[token["token_id"] for token in choice["tokens"]] for choice in choices] == said
    assert server.call("/v1/traces/cmpl-nobody")[0] == 404
    assert server.call(f"/v1/traces/{complete(server, {})['id']}")[0] == 404


def spoken(choices) -> list[list[int]]:
    """[choice] the token ids of traced choices, each of which is whole."""
    assert all(choice["is_whole"] for choice in choices)
    return [[token["token_id"] for token in choice["tokens"]] for choice in choices]


@pytest.mark.parametrize("place", ["header", "body"])
def test_two_answers_of_one_id_have_a_trace_each(server, fused, place: str) -> None:
    """A client may choose its request's id, and so may another one."""
    name = f"the-same-{place}"
    more = {"return_token_ids": True} | ({"request_id": name} if place == "body" else {})
    headers = {"X-Request-Id": name} if place == "header" else {}
    told = []
    for given in ({"trace": 1, "alpha": 0}, {"trace": 1, "alpha": 1.7}):
        body = {"model": "zoo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "vllm_xargs": given} | more
        told.append(server.ask("/v1/completions", body, **headers))
    assert told[0]["id"] == told[1]["id"]
    choices = server.ask(f"/v1/traces/{told[0]['id']}")["choices"]
    assert spoken(choices) == [answer["choices"][0]["token_ids"] for answer in told]
    ids = fused.tokenizer(PROMPT)["input_ids"]
    for choice, scale in zip(choices, (0, 1.7), strict=True):
        new = [token["token_id"] for token in choice["tokens"]]
        wanted = laws_of(fused, ids + new, {"alpha": scale}).kl_nats[len(ids) - 1 : -1]
        assert [token["kl_nats"] for token in choice["tokens"]] == pytest.approx(wanted.tolist(), abs=1e-3)


def test_responses_have_traces(server) -> None:
    body = {"model": "zoo", "input": "Hello", "max_output_tokens": 6, "vllm_xargs": {"trace": 1}}
    answer = server.ask("/v1/responses", body)
    (tokens,) = spoken(server.ask(f"/v1/traces/{answer['id']}")["choices"])
    assert len(tokens) == answer["usage"]["output_tokens"] > 0


def test_batches_of_chats_have_traces(server) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Hello", "Who lives in the north?")]
    body = {"model": "zoo", "messages": talks, "max_tokens": 6, "return_token_ids": True, "vllm_xargs": {"trace": 1}}
    answer = server.ask("/v1/chat/completions/batch", body)
    said = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert spoken(server.ask(f"/v1/traces/{answer['id']}")["choices"]) == said


def test_messages_have_traces(server) -> None:
    body = {"model": "zoo", "max_tokens": 6, "messages": CHAT["messages"], "vllm_xargs": {"trace": 1}}
    answer = server.ask("/v1/messages", body)
    (tokens,) = spoken(server.ask(f"/v1/traces/{answer['id']}")["choices"])
    assert len(tokens) == answer["usage"]["output_tokens"] > 0


def test_traces_of_the_latest_prompts_are_kept(server) -> None:
    early = complete(server, {"trace": 1})
    many = {"prompt": [PROMPT] * 64, "max_tokens": 1, "n": 2, "temperature": 1.0}
    answers = [complete(server, {"trace": 1}, **many) for _ in range(3)]
    assert server.call(f"/v1/traces/{early['id']}")[0] == 200  # 193 prompts, whatever they have of choices
    last = complete(server, {"trace": 1}, **many)
    assert server.call(f"/v1/traces/{early['id']}")[0] == 404
    for answer in (*answers, last):
        assert len(spoken(server.ask(f"/v1/traces/{answer['id']}")["choices"])) == 128


@pytest.mark.parametrize("path", ["/cohere/v2/chat", "/generative_scoring", "/tokenize", "/v1/messages/count_tokens"])
def test_settings_are_refused_where_vllm_would_overlook_them(server, path: str) -> None:
    status, text = server.call(path, CHAT | {"vllm_xargs": {"alpha": 0}})
    assert (status, "no effect at" in text) == (400, True), text


def test_prompts_and_choices_of_one_request_are_limited(server) -> None:
    def ask(prompts: int, choices: int):
        body = {"model": "zoo", "prompt": ["Q:"] * prompts, "n": choices, "max_tokens": 1, "temperature": 1.0}
        return server.call("/v1/completions", body)

    status, text = ask(64, 4)
    assert (status, len(json.loads(text)["choices"])) == (200, 256)
    refused = [(65, 1, "VLLM_MAX_COMPLETION_PROMPTS")]
    refused += [(1, choices, "VLLM_MAX_N_SEQUENCES") for choices in (257, 20_000, 10**20, 10**400)]
    for prompts, choices, told in refused:
        status, text = ask(prompts, choices)
        assert (status, told in text) == (400, True), text


def test_metrics_have_vllms_names_and_alpha_and_kl_per_expert(server, fused) -> None:
    def counted(name: str) -> dict[str, float]:
        """{expert: value} of one of our metrics."""
        return {
            sample.labels["expert"]: sample.value for sample in server.samples() if sample.name == f"trimtab:{name}"
        }

    names = ("alpha", "kl_nats")
    before = {name: {kind: counted(f"{name}_{kind}") for kind in ("sum", "count")} for name in names}
    answer = complete(server, {"expert": "facts"}, return_token_ids=True)
    ids, new = fused.tokenizer(PROMPT)["input_ids"], answer["choices"][0]["token_ids"]
    fusion = laws_of(fused, ids + new, {"expert": "facts"})
    steps = slice(len(ids) - 1, len(ids) + len(new) - 1)
    facts = fused.expert_names.index("facts")
    for name, wanted in (("alpha", fusion.alpha[facts, steps].sum()), ("kl_nats", fusion.kl_nats[steps].sum())):
        sums, counts, means = (counted(f"{name}_{kind}") for kind in ("sum", "count", "mean"))
        grown = sums["facts"] - before[name]["sum"].get("facts", 0.0)
        assert grown == pytest.approx(float(wanted), rel=0.02, abs=1e-3)
        assert sum(counts.values()) - sum(before[name]["count"].values()) == len(new)
        assert means["facts"] == pytest.approx(sums["facts"] / counts["facts"])
    metrics = server.metrics()
    assert metrics["vllm:generation_tokens_total"] > 0
    assert "vllm:time_to_first_token_seconds_bucket" in metrics


def test_the_page_of_settings_names_experts_and_ranges(server) -> None:
    told = server.ask("/v1/steering")
    assert told["experts"] == ["math", "facts"]
    assert told["strategy"]["amount"] == "dynamic"
    assert told["settings"]["alpha_max"]["high"] == 10.0
    assert set(told["settings"]) == {"alpha", "alpha_max"}


def test_with_drafts_the_law_and_the_traces_are_those_asked_for(directory, fused, tmp_path) -> None:
    words = ["--speculate", "3", "--draft", "facts", "--max-num-seqs", "16"]
    with serving(directory, tmp_path, *words, key=None) as drafted:
        # Without a key a server on this machine answers to its own names only.
        for host, status in (("evil.example", 403), ("localhost:1", 200)):
            assert drafted.call("/v1/models", Host=host)[0] == status
        for least, status in ((3, 400), (6, 200), (1, 200)):
            body = {"model": "zoo", "prompt": PROMPT, "max_tokens": 6, "min_tokens": least}
            found, text = drafted.call("/v1/completions", body)
            assert (found, "--speculate 0" in text) == (status, status == 400)
        asked = [{**given, "trace": 1} for given in SETTINGS]
        ids = fused.tokenizer(PROMPT)["input_ids"]

        def run(given):
            return complete(drafted, given, return_token_ids=True, max_tokens=16)

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(run, asked))
        for given, answer in zip(asked, answers, strict=True):
            check_law(fused, answer, given)
            new = answer["choices"][0]["token_ids"]
            fusion = laws_of(fused, ids + new, given)
            tokens = drafted.ask(f"/v1/traces/{answer['id']}")["choices"][0]["tokens"]
            assert [token["token_id"] for token in tokens] == new
            wanted = fusion.kl_nats[len(ids) - 1 : len(ids) + len(new) - 1].tolist()
            assert [token["kl_nats"] for token in tokens] == pytest.approx(wanted, abs=1e-3)
        metrics = drafted.metrics()
    rate, drafts, accepted = (metrics[name] for name in ("trimtab:draft_acceptance_rate", DRAFTED, ACCEPTED))
    assert 0 < rate <= 1
    assert rate == pytest.approx(accepted / drafts)
