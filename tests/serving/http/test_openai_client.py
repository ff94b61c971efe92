"""The `openai` client against `trimtab serve`: chat, completions, streams with usage, logprobs, n, stop, seed."""

import openai
import pytest
import torch

QUESTION = [{"role": "user", "content": "Which pet does Jakob Brulman keep?"}]
FREE = {"ignore_eos": True}
PROMPT = "Q: Who lives in the north?\nA:"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


def continued(fused, prompt, tokens: int) -> str:
    """The transformers engine's greedy continuation."""
    inputs = fused.encode([prompt])
    ids = fused.generate(**inputs, max_new_tokens=tokens, do_sample=False, speculate=0)
    return fused.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_model_is_listed_under_its_directorys_name(client) -> None:
    assert [model.id for model in client.models.list()] == ["zoo"]


def test_completions_are_the_transformers_engines(client, fused) -> None:
    answer = client.completions.create(model="zoo", prompt=PROMPT, max_tokens=16, temperature=0)
    assert answer.choices[0].text == continued(fused, PROMPT, 16)
    assert answer.usage.prompt_tokens == len(fused.tokenizer(PROMPT)["input_ids"])


def test_chats_are_the_transformers_engines(client, fused) -> None:
    answer = client.chat.completions.create(model="zoo", messages=QUESTION, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == continued(fused, QUESTION, 16)
    assert answer.choices[0].message.content.strip()


def test_streams_say_the_same_and_end_with_usage(client) -> None:
    asked = {"model": "zoo", "messages": QUESTION, "max_tokens": 16, "temperature": 0, "extra_body": FREE}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 8
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    pieces = client.completions.create(model="zoo", prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
    joined = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert joined == client.completions.create(model="zoo", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text


def test_log_probabilities_are_the_fused_ones(client, fused) -> None:
    answer = client.completions.create(model="zoo", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=5)
    said = answer.choices[0].logprobs
    ids = fused.tokenizer(PROMPT)["input_ids"]
    new = fused.tokenizer(answer.choices[0].text, add_special_tokens=False)["input_ids"]
    laws = fused(torch.tensor([ids + new]), use_cache=False).logits[0, len(ids) - 1 :].log_softmax(-1)
    assert len(said.token_logprobs) >= len(new) > 2
    for place, token in enumerate(new):
        assert said.token_logprobs[place] == pytest.approx(float(laws[place, token]), abs=1e-3)
        assert len(said.top_logprobs[place]) >= 5
    chat = client.chat.completions.create(
        model="zoo", messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    law = fused(**fused.encode([QUESTION]), use_cache=False).logits[0, -1].log_softmax(-1)
    first = chat.choices[0].logprobs.content[0]
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(law.topk(3).values.tolist(), abs=1e-3)


def test_several_choices_and_seeds(client) -> None:
    asked = {"model": "zoo", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "n": 4}
    first = client.completions.create(**asked, seed=7)
    texts = [choice.text for choice in first.choices]
    assert sorted(choice.index for choice in first.choices) == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [choice.text for choice in client.completions.create(**asked, seed=7).choices] == texts
    assert [choice.text for choice in client.completions.create(**asked, seed=8).choices] != texts


def test_stop_strings_end_an_answer(client) -> None:
    asked = {"model": "zoo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    free = client.completions.create(**asked, extra_body=FREE).choices[0].text
    word = free.split()[2]
    stopped = client.completions.create(**asked, stop=[word], extra_body=FREE).choices[0]
    assert stopped.text == free[: free.index(word)]
    assert stopped.finish_reason == "stop"


def test_mistakes_come_as_the_clients_own_errors(client, server) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="../../etc/passwd", prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="maths"):
        client.completions.create(model="zoo", prompt="a", max_tokens=1, extra_body={"vllm_xargs": {"expert": "maths"}})
    stranger = openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
