"""What requests ask for: every field that is taken changes something, every other one is refused or idle."""

import pytest

from trimtab.batch.requests import CHAT, COMPLETIONS, IDLE, NUMBERS, OWN, SHARED, TRANSFORMERS_LACKS, read_request
from trimtab.core.errors import BadSetting
from trimtab.models.conversations import ChatArguments

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
# A value for each shared field that differs from its default.
OTHER = {
    "n": 2,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 4,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "seed": 7,
    "max_tokens": 9,
    "model": "name",
    "stop": ["x"],
    "stop_token_ids": [3],
    "ignore_eos": True,
    "logprobs": 2,
    "response_format": SCHEMA,
}


def chat(**body):
    return read_request({"url": CHAT, "body": {"messages": MESSAGES} | body})


def completion(**body):
    return read_request({"url": COMPLETIONS, "body": {"prompt": "Hello"} | body})


@pytest.mark.parametrize("model", [7, ["fused"], False])
def test_a_model_is_called_by_a_name(model):
    with pytest.raises(BadSetting, match=r"model is .*\n  Expected: a name"):
        completion(model=model)


def test_the_table_of_other_values_names_every_field():
    assert set(OTHER) == set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_every_field_that_is_taken_changes_what_is_asked(name):
    assert completion(**{name: OTHER[name]}) != completion()
    assert completion(**{name: None}) == completion()
    assert chat(**{name: True if name == "logprobs" else OTHER[name]}) != chat()


@pytest.mark.parametrize("name", IDLE)
def test_idle_fields_pass_at_values_that_change_nothing_and_are_refused_at_others(name):
    for value in (None, *IDLE[name]):
        assert chat(**{name: value}) == chat()
    if name in OWN[CHAT]:  # idle in completions alone
        assert completion(**{name: IDLE[name][0]}) == completion()
    elif IDLE[name]:
        with pytest.raises(BadSetting, match=f"{name} is .*, which trimtab does not offer in batches"):
            chat(**{name: "x"})
    else:
        assert chat(**{name: "anything"}) == chat()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-10.5, "1", True, [1], 10**400, -(10**400)])
def test_numbers_out_of_range_or_of_another_kind_are_refused(name, value):
    if name in ("top_k", "min_tokens") and value == 10**400:
        assert completion(**{name: value}) != completion()
        return
    with pytest.raises(BadSetting, match=f"^{name} is .*\n  Expected: a"):
        completion(**{name: value})


@pytest.mark.parametrize("value", [5e-324, 1e-40, 9e-7])
def test_a_temperature_next_to_nothing_is_refused(value):
    with pytest.raises(BadSetting, match=r"^temperature is .*\n  Expected: 0, or at least 1e-06"):
        completion(temperature=value)
    assert completion(temperature=1e-6).sampling.temperature == 1e-6


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        (CHAT, {"messages": []}, r"messages is \[\]"),
        (CHAT, {"messages": ["x"]}, "a message is 'x'"),
        (CHAT, {"messages": [{"role": "user"}]}, "the content of a message is null"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "a tool call is {}"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "audio": {}}]}, "has audio"),
        (CHAT, {"messages": MESSAGES, "tools": {"name": "x"}}, "tools is"),
        (CHAT, {"messages": MESSAGES, "documents": ["x"]}, "documents is"),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": ["x"]}, "chat_template_kwargs is"),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": False}}, "tokenize is not for encode"),
        (CHAT, {"messages": MESSAGES, "continue_final_message": 1}, "continue_final_message is 1"),
        (CHAT, {"messages": MESSAGES, "continue_final_message": True}, "are both set"),
        (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice is"),
        (COMPLETIONS, {"prompt": "x", "tools": [{}]}, "tools is .*, which trimtab does not offer"),
        (CHAT, {"messages": MESSAGES, "prompt": "x"}, "knows no field 'prompt'"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs is 3 without logprobs"),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        (CHAT, {"messages": MESSAGES, "logprobs": 3}, "logprobs is 3"),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens is 0"),
        (CHAT, {"messages": MESSAGES, "temperature": 0, "n": 2}, "n is 2 at temperature 0"),
        (CHAT, {"messages": MESSAGES, "stop": [""]}, "stop is"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "grammar"}}, "response_format is"),
        (COMPLETIONS, {}, "prompt is null"),
        (COMPLETIONS, {"prompt": ""}, 'a prompt is ""'),
        (COMPLETIONS, {"prompt": []}, r"prompt is \[\]"),
        (COMPLETIONS, {"prompt": [1, -1]}, r"prompt is \[1,-1\]"),
        (COMPLETIONS, {"prompt": ["x", [1], 2]}, "a prompt is 2"),
        (COMPLETIONS, {"prompt": "x", "messages": MESSAGES}, "knows no field 'messages'"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [1.5]}, "stop_token_ids is"),
        (COMPLETIONS, {"prompt": "x", "ignore_eos": 1}, "ignore_eos is 1"),
    ],
)
def test_what_cannot_be_followed_is_refused(url, body, says):
    with pytest.raises(BadSetting, match=says):
        read_request({"url": url, "body": body})


def test_defaults_are_those_of_the_interface():
    assert completion().sampling.max_tokens == 16
    assert chat().sampling.max_tokens is None
    assert chat().sampling.temperature == 1
    assert chat(max_tokens=5, max_completion_tokens=6).sampling.max_tokens == 6
    assert completion(seed=-1, top_k=-1) == completion()
    assert completion(response_format={"type": "text"}) == completion()


def test_prompts_come_in_four_forms():
    assert completion(prompt="x").prompts == ("x",)
    assert completion(prompt=["x", "y"]).prompts == ("x", "y")
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).prompts == (({"role": "user", "content": parts},),)


def test_fields_of_conversations_are_taken_as_vllm_reads_them():
    assert chat().chat == ChatArguments(add_generation_prompt=True, continue_final_message=False)
    asked = chat(
        tools=[{"type": "function"}],
        documents=[{"text": "t"}],
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        continue_final_message=True,
        tool_choice="auto",
    ).chat
    values = {"tools": [{"type": "function"}], "documents": [{"text": "t"}], "enable_thinking": False}
    assert asked == ChatArguments(continue_final_message=True, add_generation_prompt=False, values=values)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
    ]
    (read,) = chat(messages=talk).prompts
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert read[2]["tool_call_id"] == "x"


def test_what_a_request_leaves_out_comes_from_the_directory():
    def asked(**body):
        content = {"url": CHAT, "body": {"messages": MESSAGES} | body}
        return read_request(content, defaults={"temperature": 0.6, "top_k": -1, "max_tokens": 7}).sampling

    assert (asked().temperature, asked().top_k) == (0.6, 0)
    assert asked(temperature=0).temperature == 0
    assert asked().max_tokens is None, "the worker knows how many there is room for"


@pytest.mark.parametrize("name", TRANSFORMERS_LACKS)
def test_what_an_engine_lacks_is_refused_for_it_alone_and_only_where_it_changes_something(name):
    asked = {"url": COMPLETIONS, "body": {"prompt": "x", name: OTHER[name]}}
    read_request(asked)
    with pytest.raises(BadSetting, match=f"{name} is .*, which the transformers engine cannot follow"):
        read_request(asked, TRANSFORMERS_LACKS, "transformers")
    idle = {"type": "text"} if name == "response_format" else 0 if "penalty" in name else False
    read_request({"url": COMPLETIONS, "body": {"prompt": "x", name: idle}}, TRANSFORMERS_LACKS, "transformers")
