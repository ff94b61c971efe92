"""Conversations are rendered as transformers' apply_chat_template renders them, for every member."""

import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, MemberMismatch, TrimtabWarning

PLAIN = tiny.CHAT
THINKING = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if tools %}TOOLS {{ tools | length }}\n{% endif %}{% if documents %}DOCS {{ documents[0].text }}\n{% endif %}"
    "{% if add_generation_prompt %}<bot> {% if enable_thinking is defined and not enable_thinking %}# {% endif %}"
    "{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}({{ p.text }}){% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]
BEGUN = [*USER, {"role": "assistant", "content": "The answer is "}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def members():
    base = tiny.make(seed=1)
    return tiny.make(seed=0, width=48), base, {"math": tiny.tuned(base, 10)}


@pytest.fixture(scope="module")
def build(members):
    """A fused model whose tokenizer has this chat template."""

    def made(template, **options):
        return FusedCausalLM.from_members(*members, tokenizer=tiny.make_tokenizer(chat_template=template), **options)

    return made


def read(fused, conversation, **chat):
    return fused.tokenizer.decode(fused.encode(conversation, **chat)["input_ids"][0])


@pytest.mark.parametrize(
    ("conversation", "chat"),
    [
        (USER, {}),
        (USER, {"enable_thinking": False}),
        (USER, {"tools": [TOOL]}),
        (USER, {"documents": [{"title": "t", "text": "Known."}], "tools": [TOOL, TOOL]}),
        (USER, {"add_generation_prompt": False}),
        (USER, {"continue_final_message": True}),
        (BEGUN, {"continue_final_message": True}),
        (BEGUN, {"add_generation_prompt": True}),
        (BEGUN, {"continue_final_message": False, "enable_thinking": False}),
        (USER, {"chat_template": "{{ messages[0].content }}!"}),
    ],
    ids=repr,
)
def test_the_text_is_what_transformers_makes(build, conversation, chat):
    fused = build(THINKING)
    is_continued = chat.get("continue_final_message", False)
    usual = {"add_generation_prompt": not is_continued} | chat
    assert read(fused, conversation, **chat) == fused.tokenizer.apply_chat_template(
        conversation, tokenize=False, **usual
    )


def test_a_begun_answer_is_continued_as_pipelines_do(build):
    fused = build(THINKING)
    assert read(fused, BEGUN) == "<user> Hi\n<assistant> The answer is "
    assert read(fused, [*USER, {"role": "assistant", "content": ""}]) == "<user> Hi\n<bot> "
    options = {"max_new_tokens": 5, "do_sample": False}
    assert fused.generate_text(BEGUN, **options) == fused.generate_text(
        "<user> Hi\n<assistant> The answer is ", **options
    )


def test_every_member_continues_the_answer_and_gets_the_arguments(build):
    fused = build(THINKING, prompts={"math": "chat", "strong": "Question: {prompt}\nAnswer: "})
    rendered = {
        name: [
            fused.tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(row["member_prompt_ids"][:, at], row["member_prompt_mask"][:, at], strict=True)
        ]
        for row in [fused.encode([BEGUN, USER], enable_thinking=False)]
        for at, name in enumerate(fused.member_names)
    }
    assert rendered["math"] == rendered["base"] == ["<user> Hi\n<assistant> The answer is ", "<user> Hi\n<bot> # "]
    assert rendered["strong"] == ["Question: Hi\nAnswer: The answer is ", "Question: Hi\nAnswer: "]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [(PLAIN, "<user> one\ntwo\n<bot> "), (PARTS, "<user>(one)(two)<bot> ")],
    ids=["text", "parts"],
)
def test_text_parts_are_read_as_text(build, template, wanted):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert read(build(template), [{"role": "user", "content": parts}]) == wanted
    assert read(build(template), [{"role": "user", "content": ["one", "two"]}]) == wanted
    assert read(build(template), USER) == ("<user>(Hi)<bot> " if template == PARTS else "<user> Hi\n<bot> ")


def test_calls_of_tools_reach_the_template(build):
    fused = build("{% for m in messages %}{{ m.role }}{{ m.tool_calls[0].function.name if m.tool_calls }};{% endfor %}")
    talk = [*USER, {"role": "assistant", "content": None, "tool_calls": [TOOL]}, {"role": "tool", "content": "3"}]
    assert read(fused, talk) == "user;assistantadd;tool;"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a message of the user holds a part of type 'image_url'"),
        ([{"type": "text"}], "a part of type 'text'"),
        ([3], "a part of type 'int'"),
        (7, "the content of a message is 7"),
    ],
)
def test_content_that_is_no_text_is_refused(build, content, says):
    with pytest.raises(BadSetting, match=says):
        build(PLAIN).encode([{"role": "user", "content": content}])


def test_arguments_that_cannot_be_are_refused(build):
    fused = build(PLAIN)
    with pytest.raises(BadSetting, match="a message is"):
        fused.encode([{"content": "Hi"}])
    with pytest.raises(BadSetting, match="are both set"):
        fused.encode(USER, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(BadSetting, match="return_tensors is not for encode"):
        fused.encode(USER, return_tensors="pt")
    with pytest.raises(BadSetting, match="the prompt is a text"):
        fused.encode("Hi", enable_thinking=False)
    with pytest.warns(TrimtabWarning, match="no chat template reads enable_thinking, so nothing changes"):
        fused.encode(USER, enable_thinking=False)


def test_named_templates_are_taken_as_transformers_takes_them(members):
    named = {"default": PLAIN, "tool_use": "{{ tools | length }} TOOLS ", "rag": "RAG "}
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = named
    fused = FusedCausalLM.from_members(*members, tokenizer=tokenizer, prompts={"math": "chat"})
    assert read(fused, USER) == "<user> Hi\n<bot> "
    assert read(fused, USER, tools=[TOOL]) == "1 TOOLS "
    assert read(fused, USER, chat_template="rag") == "RAG "
    with pytest.raises(MemberMismatch, match=r"no chat template 'tools'.*\n.*default, rag, tool_use"):
        fused.encode(USER, chat_template="tools")
    math = fused.encode(USER, tools=[TOOL])["member_prompt_ids"][0, fused.member_names.index("math")]
    assert fused.tokenizer.decode(math) == "1 TOOLS "


def test_the_text_begins_once(members):
    """A template writes the beginning-of-text token, and the tokenizer would add it again."""
    tokenizer = tiny.make_tokenizer(chat_template="{{ bos_token }}" + PLAIN)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fused = FusedCausalLM.from_members(*members, tokenizer=tokenizer, prompts={"math": "chat"})
    assert tokenizer("Hi")["input_ids"][0] == 2
    talk = fused.encode(USER)
    rendered = fused.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    for ids in (talk["input_ids"][0], *talk["member_prompt_ids"][0], fused.encode(rendered)["input_ids"][0]):
        assert ids.tolist().count(2) == 1
        assert ids[0] == 2
    assert fused.encode("Hi")["input_ids"][0].tolist().count(2) == 1


def test_scores_and_traces_take_the_arguments(build):
    fused = build(THINKING)
    quiet = {"enable_thinking": False}
    assert fused.score([USER], ["yes"], quiet) == fused.score("<user> Hi\n<bot> # ", ["yes"])
    assert fused.trace(USER, quiet, max_new_tokens=3).prompt == "<user> Hi\n<bot> # "
    assert fused.generate_text(USER, quiet, max_new_tokens=3) == fused.generate_text(
        "<user> Hi\n<bot> # ", max_new_tokens=3
    )
