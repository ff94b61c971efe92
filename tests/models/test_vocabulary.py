"""The same id must mean the same token; other ids are cut, have delta 0, or are mapped by the user's word."""

import ast
import json
import re
import shlex

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import tiny
from fusing import PROMPTS, check_same_tokens, new_tokens
from trimtab import FusedCausalLM
from trimtab.cli.main import main
from trimtab.core.errors import BadSetting, TrimtabWarning, UnknownName, UnreadableModel, VocabularyMismatch
from trimtab.models.token_ids import FusedVocabulary
from trimtab.models.vocabulary import (
    MemberTokens,
    TokenSettings,
    fuse_vocabularies,
    load_tokenizer,
    read_pair,
    written_pair,
)

SPECIAL = ("<r0>", "<r1>")


def with_tokens(*tokens, characters=tiny.CHARACTERS):
    """The tiny tokenizer with special tokens added."""
    tokenizer = tiny.make_tokenizer(characters)
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


def fuse(tokenizers, rows=200, token_settings=None, **embedded):
    """The vocabulary of members that have these tokenizers."""
    members = {
        name: MemberTokens(rows if isinstance(rows, int) else rows[name], embedded.get(name, rows), tokenizer)
        for name, tokenizer in tokenizers.items()
    }
    return fuse_vocabularies(members, token_settings=token_settings)


def save(folder, name, model, tokenizer):
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def test_differing_ordinary_tokens_are_named():
    ours = tiny.make_tokenizer()
    swapped = tiny.make_tokenizer("ba" + tiny.CHARACTERS[2:])
    with pytest.raises(VocabularyMismatch, match=r"'strong' and 'math' differ in 2 tokens: id 4 is 'a' and 'b';"):
        fuse({"strong": ours, "math": swapped})
    with pytest.raises(VocabularyMismatch, match=f"differ in 1 tokens: id {tiny.VOCAB} is '%' and '<r0>'"):
        fuse({"strong": tiny.make_tokenizer(tiny.CHARACTERS + "%"), "math": with_tokens("<r0>")})
    assert fuse({"strong": ours, "math": tiny.make_tokenizer()}).to_dict() is None


def test_members_with_different_tokenizers_are_refused(members_dir, tmp_path):
    other = save(tmp_path, "other", tiny.tuned(tiny.make(seed=1), 10), tiny.make_tokenizer("ba" + tiny.CHARACTERS[2:]))
    with pytest.raises(VocabularyMismatch, match=r"the tokenizers of 'strong' and 'other' differ in 2 tokens"):
        FusedCausalLM.from_members(members_dir / "strong", members_dir / "base", {"other": other})
    with pytest.raises(VocabularyMismatch, match=r"'the tokenizer given' and 'strong' differ"):
        FusedCausalLM.from_members(
            members_dir / "strong", members_dir / "base", {}, "contrastive", tokenizer=load_tokenizer(other)
        )


@pytest.mark.parametrize(
    ("tokens", "cut", "strong_only", "remark"),
    [
        ({"strong": SPECIAL, "base": SPECIAL, "math": SPECIAL}, set(), set(), ""),
        ({"strong": (), "base": (), "math": ("[PAD]",)}, set(), set(), r"'\[PAD\]' \(84\) cut, missing in the strong"),
        (
            {"strong": SPECIAL, "base": SPECIAL[:1], "math": SPECIAL},
            set(),
            {85},
            "'<r1>' .85. with delta 0, missing in 'base'",
        ),
        ({"strong": SPECIAL, "base": (), "math": ()}, set(), {84, 85}, "with delta 0, missing in 'base', 'math'"),
        (
            {"strong": SPECIAL[:1], "base": (), "math": SPECIAL},
            set(),
            {84},
            "'<r1>' .85. cut.*; '<r0>' .84. with delta 0",
        ),
    ],
)
def test_ids_are_cut_or_have_delta_0_with_one_line(tokens, cut, strong_only, remark):
    found = fuse({name: with_tokens(*own) for name, own in tokens.items()})
    assert found.size == tiny.VOCAB + len(tokens["strong"])
    assert (found.cut, found.strong_only) == (cut, strong_only)
    assert re.search(remark, found.remark) if remark else found.remark == ""
    assert "\n" not in found.remark
    again = FusedVocabulary.from_dict(found.size, json.loads(json.dumps(found.to_dict())))
    assert (again.cut, again.strong_only) == (found.cut, found.strong_only)
    assert all(again.ids_of(name) == found.ids_of(name) for name in tokens)


def test_ids_beyond_a_members_rows_are_cut_or_have_delta_0():
    shared = dict.fromkeys(("strong", "base", "math"), with_tokens(*SPECIAL))
    found = fuse(shared, rows={"strong": 90, "base": 84, "math": 90}, base=84, strong=90, math=90)
    assert (found.size, found.strong_only) == (86, {84, 85})
    assert found.read("base", torch.tensor([5, 84, 85])).tolist() == [5, 3, 3]  # its <unk>
    assert found.read("math", torch.tensor([5, 84, 85])).tolist() == [5, 84, 85]
    found = fuse(shared, rows={"strong": 85, "base": 90, "math": 90}, base=90, strong=85, math=90)
    assert (found.size, found.strong_only, found.cut) == (85, set(), set())


def test_ids_without_a_token_are_cut_within_the_vocabulary():
    tokenizer = tiny.make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {t: i + (i > 50) for t, i in content["model"]["vocab"].items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>")
    base = tiny.make(seed=1, vocab=tiny.VOCAB + 1)
    fused = FusedCausalLM.from_members(base, base, {"math": tiny.tuned(base, 2)}, "static", tokenizer)
    law = fused(torch.tensor([[5, 6]])).logits[0]
    assert law[:, 51].eq(-torch.inf).all()
    assert law[:, :51].isfinite().all()
    torch.testing.assert_close(law.softmax(-1).sum(-1), torch.ones(2))


# ---- special tokens that were renamed


def test_renamed_tokens_need_a_word_and_the_printed_line_is_valid(tmp_path, capsys):
    strong, base = (tiny.make(seed=s, vocab=tiny.VOCAB + 2, width=w) for s, w in ((0, 48), (1, 32)))
    names = {"strong": SPECIAL, "base": SPECIAL, "expert": ("<|im=start|>", "it's \\ an end")}
    models = {"strong": strong, "base": base, "expert": tiny.tuned(base, 3)}
    paths = {name: str(save(tmp_path, name, models[name], with_tokens(*own))) for name, own in names.items()}
    words = ["fuse", "--strong", paths["strong"], "--base", paths["base"], "--expert", f"a={paths['expert']}"]
    assert main([*words, "-o", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    printed = [line.strip() for line in error.splitlines() if line.strip().startswith("--")]
    assert len(printed) == 2
    capsys.readouterr()
    laws = []
    for number, line in enumerate(printed):
        assert main([*words, *shlex.split(line), "-o", str(tmp_path / f"fused{number}")]) == 0, line
        fused = FusedCausalLM.from_pretrained(tmp_path / f"fused{number}")
        laws.append(fused(torch.tensor([[9, tiny.VOCAB, 12, tiny.VOCAB + 1]])).logits)
    assert f"vocabulary: {tiny.VOCAB + 2} tokens" in capsys.readouterr().out
    torch.testing.assert_close(laws[0], laws[1])
    said = re.search(r"token_map=(\{.*\}\}) or", error)
    by_python = FusedCausalLM.from_members(
        paths["strong"], paths["base"], {"a": paths["expert"]}, token_map=ast.literal_eval(said[1])
    )
    torch.testing.assert_close(by_python(torch.tensor([[9, tiny.VOCAB, 12, tiny.VOCAB + 1]])).logits, laws[0])
    assert fused.config.special_tokens == "strong"


def test_names_that_changed_places_are_mapped_by_name():
    tokenizers = {"strong": with_tokens(*SPECIAL), "base": with_tokens(*SPECIAL), "math": with_tokens(*SPECIAL[::-1])}
    with pytest.raises(VocabularyMismatch, match=r"--map-token 'math:<r0>=<r0>' --map-token 'math:<r1>=<r1>'"):
        fuse(tokenizers)
    found = fuse(tokenizers, token_settings=TokenSettings({"math": {"<r0>": "<r0>", "<r1>": "<r1>"}}))
    assert found.read("math", torch.tensor([7, 84, 85])).tolist() == [7, 85, 84]
    assert found.align("math", torch.arange(200.0))[83:].tolist() == [83, 85, 84]
    assert found.fused_id("math", 84) == 85
    by_ids = fuse(tokenizers, token_settings=TokenSettings(special_tokens="strong"))
    assert by_ids.read("math", torch.tensor([7, 84, 85])).tolist() == [7, 84, 85]


def test_a_mapped_token_stands_for_one_token_only():
    tokenizers = {"strong": with_tokens("<|end|>"), "base": tiny.make_tokenizer(), "math": tiny.make_tokenizer()}
    token_settings = TokenSettings({name: {"<eos>": "<|end|>"} for name in ("base", "math")})
    found = fuse(tokenizers, token_settings=token_settings)
    assert found.strong_only == {1}, "the strong model's own <eos>"
    assert found.read("base", torch.tensor([1, 84])).tolist() == [1, 1], "both are the same token to it"
    assert found.fused_id("math", 1) == 84
    assert found.align("math", torch.arange(100.0))[[1, 84]].tolist() == [-torch.inf, 1]


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        ({"mth": {"<r0>": "<r0>"}}, UnknownName, "(?s)'mth'.*did you mean 'math'"),
        ({"strong": {"<r0>": "<r0>"}}, UnknownName, "no member with tokens to be mapped 'strong'"),
        ({"math": {"<r9>": "<r0>"}}, VocabularyMismatch, "(?s)'math' has no token '<r9>'.*did you mean '<r"),
        ({"math": {"<r0>": "<s0>"}}, VocabularyMismatch, "the strong model has no token '<s0>'"),
        ({"math": {"<r0>": "<r1>", "<r1>": "<r1>"}}, VocabularyMismatch, "gives '<r1>' twice"),
    ],
)
def test_a_map_of_tokens_that_are_not_there_is_refused(pairs, kind, message):
    tokenizers = dict.fromkeys(("strong", "base", "math"), with_tokens(*SPECIAL))
    with pytest.raises(kind, match=message):
        fuse(tokenizers, token_settings=TokenSettings(pairs))


@pytest.mark.parametrize("pair", [("a", "<x>", "<y>"), ("a:b", "x=y", "p=q"), ("a\\", "=:\\", ":")])
def test_a_pair_is_read_as_it_was_written(pair):
    assert read_pair(written_pair(*pair)) == pair


@pytest.mark.parametrize("text", ["", "a", "a:b", "a=b", ":x=y", "a:=y", "a:x="])
def test_a_pair_that_cannot_be_read_is_refused(text):
    with pytest.raises(BadSetting, match="EXPERT:A=B"):
        read_pair(text)


def test_special_tokens_has_one_value():
    with pytest.raises(BadSetting, match=r"(?s)special_tokens is 'base'.*pass special_tokens='strong'"):
        TokenSettings(special_tokens="base")


def test_a_tokenizer_given_decides_which_tokens_are_fused(tmp_path):
    strong, base = tiny.make(seed=0, vocab=tiny.VOCAB + 4), tiny.make(seed=1)
    shared = with_tokens("<soft>")
    models = {"strong": strong, "base": base, "math": tiny.tuned(base, 2)}
    *paths, math = (save(tmp_path, name, model, shared) for name, model in models.items())
    with pytest.warns(TrimtabWarning, match="'<soft>' .84. cut"):
        fused = FusedCausalLM.from_members(*paths, {"math": math}, tokenizer=tiny.make_tokenizer())
    assert fused.config.vocab_size == tiny.VOCAB
    renamed = with_tokens("<other>")
    with pytest.raises(VocabularyMismatch, match=r"or special_tokens='strong', or leave tokenizer= out"):
        FusedCausalLM.from_members(*paths, {"math": math}, tokenizer=renamed)
    with pytest.warns(TrimtabWarning, match="'<other>' .84. with delta 0"):
        FusedCausalLM.from_members(*paths, {"math": math}, tokenizer=renamed, special_tokens="strong")


def test_the_text_ends_where_a_members_own_end_stands_for_a_token():
    base = tiny.make(seed=1)
    expert = tiny.tuned(base, 2)
    expert.generation_config.eos_token_id = [1, tiny.VOCAB + 3]
    fused = FusedCausalLM.from_members(tiny.make(seed=0), base, {"math": expert}, tokenizer=tiny.make_tokenizer())
    assert fused.config.eos_token_id == 1


# ---- padding rows


def test_padding_rows_are_cut():
    base = tiny.make(seed=1, vocab=tiny.VOCAB + 12)
    strong = tiny.make("gpt2", seed=0, vocab=tiny.VOCAB + 44)
    for model in (base, strong):  # rows that would win every time, were they not cut
        with torch.no_grad():
            model.lm_head.weight[tiny.VOCAB :] *= 20
    model = FusedCausalLM.from_members(strong, base, {"math": tiny.tuned(base, 2)}, "dynamic", tiny.make_tokenizer())
    inputs, ids = new_tokens(model, PROMPTS)
    assert model(**inputs).logits.shape[-1] == model.config.vocab_size == tiny.VOCAB
    assert ids.max() < tiny.VOCAB
    check_same_tokens(model, ids, new_tokens(model, PROMPTS, use_cache=False)[1], inputs)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}], ids=str)
def test_a_member_with_padding_rows_may_assist(options):
    base = tiny.make(seed=1, vocab=tiny.VOCAB + 12)
    with torch.no_grad():
        base.lm_head.weight[tiny.VOCAB :] *= 3  # drafted now and then
    strong, expert = tiny.make(seed=0), tiny.tuned(base, 2)
    model = FusedCausalLM.from_members(strong, base, {"math": expert}, "dynamic", tiny.make_tokenizer())
    inputs, greedy = new_tokens(model, PROMPTS[0])
    for assistant in (base, expert, strong):
        ids = new_tokens(model, PROMPTS[0], assistant_model=assistant, **options)[1]
        assert ids.max() < tiny.VOCAB
        if not options["do_sample"]:
            check_same_tokens(model, ids, greedy, inputs)


def test_a_member_that_lacks_much_of_the_vocabulary_is_refused():
    base = tiny.make(seed=1, vocab=tiny.VOCAB - 20)
    message = f"member 'base' scores {tiny.VOCAB - 20} tokens, the tokenizer has {tiny.VOCAB}: 20 are missing"
    with pytest.raises(VocabularyMismatch, match=message):
        FusedCausalLM.from_members(tiny.make(seed=0), base, {"x": base}, tokenizer=tiny.make_tokenizer())


def test_without_a_tokenizer_sizes_must_agree():
    base = tiny.make(seed=1)
    model = FusedCausalLM.from_members(tiny.make(seed=0), base, {"x": tiny.tuned(base, 1)})
    assert model.config.vocab_size == tiny.VOCAB
    padded = tiny.make(seed=0, vocab=tiny.VOCAB + 4)
    with pytest.raises(VocabularyMismatch, match=r"different numbers of tokens: 'strong' 88, 'base' 84") as caught:
        FusedCausalLM.from_members(padded, base, {"x": tiny.tuned(base, 1)})
    assert "pass tokenizer=" in str(caught.value)
    FusedCausalLM.from_members(padded, base, {"x": tiny.tuned(base, 1)}, tokenizer=tiny.make_tokenizer())  # the fix


def test_a_damaged_tokenizer_is_refused(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UnreadableModel, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_the_size_is_the_largest_id_plus_one():
    assert fuse({"strong": tiny.make_tokenizer()}).size == tiny.VOCAB
