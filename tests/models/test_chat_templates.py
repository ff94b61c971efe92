"""The chat template of the member that has one serves; several are chosen by name."""

import warnings

import pytest
import torch
from transformers import AutoTokenizer

import tiny
from trimtab import FusedCausalLM
from trimtab.cli.main import main
from trimtab.core.errors import BadSetting, MemberMismatch, TrimtabWarning, UnknownName
from trimtab.models.chat_templates import with_chat_template

HI = [{"role": "user", "content": "Hi"}]
OTHER = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
NAMED = {"default": tiny.CHAT, "tool_use": tiny.CHAT + "TOOLS"}


def rendered(tokenizer, conversation=HI):
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def owners(strong=None, expert=None, base=None):
    """Tokenizers with these templates, in the order in which templates are taken."""
    templates = {"strong": strong, "math": expert, "base": base}
    return {name: tiny.make_tokenizer(chat_template=template) for name, template in templates.items()}


@pytest.mark.parametrize(
    ("templates", "taken"),
    [
        ({"strong": OTHER, "expert": tiny.CHAT, "base": tiny.CHAT}, OTHER),
        ({"expert": tiny.CHAT}, tiny.CHAT),
        ({"base": tiny.CHAT}, tiny.CHAT),
        ({"expert": tiny.CHAT, "base": tiny.CHAT}, tiny.CHAT),
        ({}, None),
    ],
)
def test_the_first_member_with_a_template_serves(templates, taken):
    members = owners(**templates)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_chat_template(members["strong"], members).chat_template == taken
    assert members["strong"].chat_template == templates.get("strong"), "the member's own is left as it was"


def test_differing_templates_are_told_and_the_proposed_choices_work():
    members = owners(expert=tiny.CHAT, base=OTHER)
    with pytest.warns(TrimtabWarning, match=r"chat template of 'math'; 'base' has another one.*--chat-template base"):
        assert with_chat_template(members["strong"], members).chat_template == tiny.CHAT
    assert with_chat_template(members["strong"], members, "base").chat_template == OTHER
    assert with_chat_template(members["strong"], members, "math").chat_template == tiny.CHAT


def test_a_template_keeps_its_own_members_special_tokens():
    expert = tiny.make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    strong, alike = tiny.make_tokenizer(), rendered(expert)
    strong.eos_token = "<bos>"
    found = with_chat_template(strong, {"strong": strong, "math": expert})
    assert rendered(found) == alike == "Hi<eos>"


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}", "\n\n ", ""])
def test_a_bound_template_renders_as_it_did(start):
    expert = tiny.make_tokenizer(chat_template=start + "{{ messages[0].content }}{{ eos_token }}")
    strong = tiny.make_tokenizer()
    strong.eos_token = "<bos>"
    assert rendered(with_chat_template(strong, {"math": expert})) == rendered(expert)


def test_a_template_is_chosen_by_member_name_file_or_text(tmp_path):
    members = owners(expert=NAMED, base=OTHER)
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0].content }}")
    for choice, text in {
        "math": "<user> Hi\n<bot> ",
        "tool_use": "<user> Hi\n<bot> TOOLS",
        "base": "[Hi]",
        str(tmp_path / "mine.jinja"): "mine Hi",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}!": "Hi!",
    }.items():
        assert rendered(with_chat_template(members["strong"], members, choice)) == text, choice


def test_a_choice_that_cannot_be_is_refused(tmp_path):
    members = owners(expert=NAMED)
    strong = members["strong"]
    with pytest.raises(UnknownName, match=r"(?s)no chat template .* 'tool_us'.*did you mean 'tool_use'"):
        with_chat_template(strong, members, "tool_us")
    with pytest.raises(MemberMismatch, match=r"(?s)'base' has no chat template.*Members with one: math"):
        with_chat_template(strong, members, "base")
    for text, message in (("{% for %}", "line 1"), (" ", "is empty")):
        (tmp_path / "mine.jinja").write_text(text)
        with pytest.raises(BadSetting, match=message):
            with_chat_template(strong, members, str(tmp_path / "mine.jinja"))
    with pytest.raises(BadSetting, match="no tokenizer"):
        with_chat_template(None, {}, "math")


def test_named_templates_without_a_default_are_chosen_by_name():
    base = tiny.make(seed=1)
    tokenizer = tiny.make_tokenizer(chat_template={"rag": tiny.CHAT, "tool_use": OTHER})
    fused = FusedCausalLM.from_members(base, base, {"math": tiny.tuned(base, 2)}, tokenizer=tokenizer)
    with pytest.raises(MemberMismatch, match=r"(?s)several chat templates.*rag, tool_use.*for example 'rag'"):
        fused.encode(HI)
    chosen = FusedCausalLM.from_members(
        base, base, {"math": tiny.tuned(base, 2)}, tokenizer=tokenizer, chat_template="rag"
    )
    assert chosen.encode(HI)["input_ids"][0].tolist() == tokenizer("<user> Hi\n<bot> ")["input_ids"]


@pytest.mark.parametrize("template", [tiny.CHAT, NAMED], ids=["one", "named"])
def test_a_chat_experts_template_serves_a_plain_strong_model_and_is_saved(members_dir, tmp_path, template):
    tiny.tuned(tiny.make(seed=1), 10).save_pretrained(tmp_path / "chat")
    tiny.make_tokenizer(chat_template=template).save_pretrained(tmp_path / "chat")
    made = FusedCausalLM.from_members(members_dir / "strong", members_dir / "base", {"a": tmp_path / "chat"})
    ids = made.encode(HI)["input_ids"]
    assert ids[0].tolist() == made.tokenizer("<user> Hi\n<bot> ")["input_ids"]
    own = FusedCausalLM.from_members(
        members_dir / "strong", members_dir / "base", {"a": tmp_path / "chat"}, prompts={"a": "chat"}
    )
    assert own.encode("Hi")["member_prompt_ids"][0, 2].tolist() == ids[0].tolist()
    made.save_pretrained(tmp_path / "fused")
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "fused")) == "<user> Hi\n<bot> "
    assert torch.equal(FusedCausalLM.from_pretrained(tmp_path / "fused").encode(HI)["input_ids"], ids)


def test_the_command_line_takes_a_template(members_dir, tmp_path, capsys):
    (tmp_path / "mine.jinja").write_text(OTHER)
    words = ["fuse", "--strong", members_dir / "strong", "--base", members_dir / "base"]
    words += ["--expert", f"a={members_dir / 'math'}", "--chat-template", tmp_path / "mine.jinja"]
    assert main([*map(str, words), "-o", str(tmp_path / "fused")]) == 0
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "fused")) == "[Hi]"
    words[-1] = "minee.jinja"
    assert main([*map(str, words), "-o", str(tmp_path / "none")]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["generate", str(tmp_path / "fused"), "--chat-template", "a", "Hi"]) == 2
