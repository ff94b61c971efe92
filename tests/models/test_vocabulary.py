"""The same id must mean the same token; padding rows are cut."""

import pytest
import torch

import tiny
from fusing import PROMPTS, check_same_tokens, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import UnreadableModel, VocabularyMismatch
from trimtab.models.vocabulary import check_tokenizers, fused_size, load_tokenizer


def test_differing_tokens_are_named():
    ours = tiny.make_tokenizer()
    swapped = tiny.make_tokenizer("ba" + tiny.CHARACTERS[2:])
    with pytest.raises(VocabularyMismatch, match=r"'strong' and 'math' differ in 2 tokens: id 4 is 'a' and 'b';"):
        check_tokenizers({"strong": ours, "math": swapped})
    longer = tiny.make_tokenizer(tiny.CHARACTERS + "%")
    with pytest.raises(VocabularyMismatch, match=f"differ in 1 tokens: id {tiny.VOCAB} is no token and '%'"):
        check_tokenizers({"strong": ours, "math": longer})
    check_tokenizers({"strong": ours, "math": tiny.make_tokenizer()})
    check_tokenizers({})


def test_members_with_different_tokenizers_are_refused(members_dir, tmp_path):
    tiny.tuned(tiny.make(seed=1), 10).save_pretrained(tmp_path)
    tiny.make_tokenizer("ba" + tiny.CHARACTERS[2:]).save_pretrained(tmp_path)
    with pytest.raises(VocabularyMismatch, match=r"the tokenizers of 'strong' and 'other' differ in 2 tokens"):
        FusedCausalLM.from_members(members_dir / "strong", members_dir / "base", {"other": tmp_path})
    with pytest.raises(VocabularyMismatch, match=r"'the tokenizer given' and 'strong' differ"):
        FusedCausalLM.from_members(
            members_dir / "strong", members_dir / "base", {}, "contrastive", tokenizer=load_tokenizer(tmp_path)
        )


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


def test_a_member_with_too_few_rows_is_refused():
    base = tiny.make(seed=1, vocab=tiny.VOCAB - 3)
    with pytest.raises(VocabularyMismatch, match=f"member 'base' scores {tiny.VOCAB - 3} tokens, the tokenizer has"):
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
    assert fused_size(tiny.make_tokenizer(), {"strong": 200}) == tiny.VOCAB
