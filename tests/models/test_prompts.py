"""Members that read a prompt of their own; only the generated tokens are shared."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import tiny
from fusing import check_same_tokens, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, EmptyPrompt, MemberMismatch
from trimtab.models.prompts import PromptForm, read_form

PROMPTS = ["Where is it?", "12+7", "A longer prompt, for the padding."]
ROUND = "Question: {prompt}\nAnswer:"
FORMS = {"math": ROUND, "base": "{prompt} "}


def build(prompts, kinds=("llama", "llama"), strategy="dynamic", chat_template=None):
    base = tiny.make(kinds[1], seed=1)
    experts = {"math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    tokenizer = tiny.make_tokenizer(chat_template=chat_template)
    return FusedCausalLM.from_members(
        tiny.make(kinds[0], seed=0, width=48), base, experts, strategy, tokenizer, prompts=prompts
    )


@torch.no_grad()
def by_hand(model, prompt, count):
    """Greedy fusion without cache, batch or padding: each member reads its own rendering and what was generated."""
    rendered = [model.forms.get(name, PromptForm()).render(model.tokenizer, prompt) for name in model.member_names]
    generated = []
    for _ in range(count):
        laws = [
            member.model(torch.tensor([ids + generated])).logits[:, -1].float().log_softmax(-1)
            for member, ids in zip(model.members, rendered, strict=True)
        ]
        generated.append(int(model.strategy(laws[0], laws[1], torch.stack(laws[2:])).log_probs.argmax()))
        if generated[-1] == model.config.eos_token_id:
            break
    return torch.tensor([generated])


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("gpt2", "mistral")], ids="-".join)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_is_what_each_prompt_gives_by_hand(kinds, options):
    model = build(FORMS, kinds)
    inputs, batch = new_tokens(model, PROMPTS, max_new_tokens=12, **options)
    for row, prompt in enumerate(PROMPTS):
        ours = by_hand(model, prompt, 12)
        single = {name: part[row : row + 1] if torch.is_tensor(part) else part for name, part in inputs.items()}
        check_same_tokens(model, batch[row : row + 1], ours, single)


def test_the_prompt_form_matters():
    plain, formed = build({}), build(FORMS)
    assert not torch.equal(new_tokens(plain, PROMPTS)[1], new_tokens(formed, PROMPTS)[1])
    assert "member_prompt_ids" not in plain.encode(PROMPTS)


def test_forms_that_change_nothing_change_nothing():
    plain, formed = build({}), build({"math": "{prompt}", "facts": "plain"})
    inputs, ids = new_tokens(plain, PROMPTS)
    check_same_tokens(plain, new_tokens(formed, PROMPTS)[1], ids, inputs)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 10}],
    ids=str,
)
def test_beams_and_samples_do_not_need_the_cache(options):
    model = build(FORMS, ("llama", "gpt2"))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(new_tokens(model, PROMPTS, max_new_tokens=10, use_cache=use_cache, **options)[1])
    torch.testing.assert_close(*found)


def test_assistants_give_the_same_tokens():
    model = build(FORMS, ("llama", "mistral"))
    inputs, greedy = new_tokens(model, "abcabcabc and abcabc")
    for options in ({"assistant_model": model.members.strong.model}, {"prompt_lookup_num_tokens": 3}):
        check_same_tokens(model, new_tokens(model, "abcabcabc and abcabc", **options)[1], greedy, inputs)


@torch.no_grad()
def test_scores_follow_each_members_own_prompt():
    model = build(FORMS)
    answers = [" there", " 19", " or so"]
    scores = model.score(PROMPTS, answers)
    for prompt, answer, score in zip(PROMPTS, answers, scores, strict=True):
        rendered = [model.forms.get(name, PromptForm()).render(model.tokenizer, prompt) for name in model.member_names]
        after = model.tokenizer(answer)["input_ids"]
        laws = [
            member.model(torch.tensor([ids + after])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            for member, ids in zip(model.members, rendered, strict=True)
        ]
        fused = model.strategy(laws[0], laws[1], torch.stack(laws[2:])).log_probs
        expected = fused.gather(-1, torch.tensor(after)[:, None]).sum()
        torch.testing.assert_close(score, expected, atol=1e-3, rtol=1e-4)


def test_labels_after_the_prompt_give_the_loss():
    model = build(FORMS)
    inputs = model.encode(PROMPTS[0])
    after = torch.tensor([model.tokenizer(" there")["input_ids"]])
    ids = torch.cat([inputs["input_ids"], after], dim=-1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), after], dim=-1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(-loss * after.shape[1], model.score(PROMPTS[0], [" there"])[0], atol=1e-4, rtol=1e-4)


def test_a_chat_expert_stands_next_to_a_plain_base():
    model = build({"math": "chat", "strong": {"chat": True, "system": "Be brief."}}, chat_template=tiny.CHAT)
    texts = {name: model.tokenizer.decode(form.render(model.tokenizer, "Why?")) for name, form in model.forms.items()}
    assert texts == {"math": "<user> Why?\n<bot> ", "strong": "<system> Be brief.\n<user> Why?\n<bot> "}
    ours = by_hand(model, "Why?", 10)
    inputs, ids = new_tokens(model, "Why?", max_new_tokens=10)
    check_same_tokens(model, ids, ours, inputs)


def test_conversations_are_rendered_for_each_member():
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "bot", "content": "Yes?"},
        {"role": "user", "content": "Why?"},
    ]
    model = build({"math": ROUND, "facts": "chat"}, chat_template=tiny.CHAT)
    inputs = model.encode(talk)
    assert inputs["input_ids"].shape[0] == 1
    math = model.forms["math"].render(model.tokenizer, talk)
    assert model.tokenizer.decode(math) == "Question: Hello\nYes?\nWhy?\nAnswer:"
    assert inputs["input_ids"][0].tolist() == model.forms["facts"].render(model.tokenizer, talk)
    assert model.encode([talk, talk])["input_ids"].shape[0] == 2
    with pytest.raises(BadSetting, match="the prompt is a conversation, but the tokenizer has no chat template"):
        build({}).encode(talk)


def test_forms_are_saved_and_pipelines_render_them(members_dir, tmp_path):
    for name in ("strong", "base", "math"):
        shutil.copytree(members_dir / name, tmp_path / name)
    tiny.make_tokenizer(chat_template=tiny.CHAT).save_pretrained(tmp_path / "math")  # the expert's own template
    made = FusedCausalLM.from_members(
        tmp_path / "strong", tmp_path / "base", {"math": tmp_path / "math"}, prompts={"math": "chat", "base": ROUND}
    )
    assert made.forms == {"math": PromptForm(chat=tiny.CHAT), "base": PromptForm(template=ROUND)}
    made.save_pretrained(tmp_path / "fused")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert opened.forms == made.forms
    expected = made.generate_text(PROMPTS, max_new_tokens=8, do_sample=False)
    assert opened.generate_text(PROMPTS, max_new_tokens=8, do_sample=False) == expected
    texts = pipeline("text-generation", model=str(tmp_path / "fused"))(PROMPTS, max_new_tokens=8, do_sample=False)
    assert [text[0]["generated_text"] for text in texts] == [p + e for p, e in zip(PROMPTS, expected, strict=True)]


def test_bare_tokens_are_refused_where_nobody_knows_the_prompt():
    model = build(FORMS)
    ids = model.encode("Where?")["input_ids"]
    with pytest.raises(
        BadSetting, match=r"'math', 'base' read prompts of their own, but only the shared tokens came in"
    ):
        model(ids)
    with pytest.raises(BadSetting, match="not what the tokenizer makes of their text"):
        model.generate(torch.tensor([[1, 10, 1, 11]]), max_new_tokens=3)
    with pytest.raises(BadSetting, match="logits inside the prompt are asked for"):
        model(**model.encode("Where?"))
    with pytest.raises(BadSetting, match="tokens came in, but the prompt has"):
        model(**model.encode("Where?") | {"input_ids": ids[:, :2], "attention_mask": torch.ones(1, 2)})
    with pytest.raises(BadSetting, match="prefill_chunk_size is set"):
        model.generate(**model.encode("Where?"), max_new_tokens=3, prefill_chunk_size=2)


@pytest.mark.parametrize("empty", ["", [], [""], ["a", ""], [[]], [{"role": "user", "content": ""}]], ids=str)
def test_empty_prompts_are_refused(empty):
    with pytest.raises(EmptyPrompt):
        build({}).encode(empty)


def test_wrong_forms_are_refused():
    for spec, message in (
        ("no place", r"holds \{prompt\} 0 times"),
        ("{prompt}{prompt}", r"holds \{prompt\} 2 times"),
        ({"templat": "{prompt}"}, "unknown parts: templat"),
        ({"template": "{prompt}", "system": "x"}, "a system message needs a chat template"),
        ({"template": "{prompt}", "chat": "x"}, "both a template and a chat template"),
    ):
        with pytest.raises(BadSetting, match=message):
            read_form("math", spec, None)
    with pytest.raises(MemberMismatch, match="member 'math' has no chat template"):
        build({"math": "chat"})
    with pytest.raises(BadSetting, match="there is a prompt for 'maths', but no such member"):
        build({"maths": "plain"})
