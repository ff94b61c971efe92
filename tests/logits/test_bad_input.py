"""What cannot be used is refused with its cause and a fix, and the fix works."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from fusing import fuse
from trimtab import FusedCausalLM
from trimtab.core.errors import (
    BadSetting,
    ContextTooLong,
    EmptyPrompt,
    MemberMismatch,
    NumericalError,
    OfflineError,
    TrimtabWarning,
    UnknownName,
    UnreadableModel,
)


def build(strong, base, experts, **options):
    return FusedCausalLM.from_members(strong, base, experts, tokenizer=tiny.make_tokenizer(), **options)


@pytest.fixture
def home(tmp_path, members_dir):
    for name in ("strong", "base", "math"):
        shutil.copytree(members_dir / name, tmp_path / name)
    return tmp_path


def test_a_missing_base_or_strong_model_is_named():
    model = tiny.make(seed=1)
    for strong, base, missing in ((model, None, "base"), (None, model, "strong")):
        with pytest.raises(MemberMismatch, match=f"there is no {missing} model"):
            build(strong, base, {"math": model})


@pytest.mark.parametrize("name", ["strong", "base", "fused", ""])
def test_an_expert_cannot_take_a_members_name(name):
    model = tiny.make(seed=1)
    with pytest.raises(MemberMismatch, match=f"an expert cannot be called '{name}'"):
        build(model, model, {name: model})


def test_a_stranger_among_the_experts_is_warned_of_with_the_measured_divergence():
    base, strong = tiny.make(seed=1), tiny.make(seed=0)
    with pytest.warns(
        TrimtabWarning, match=r"'math' does not descend from the base: the cosine .* 0.0\d.* (\d+\.\d\d) na"
    ):
        build(strong, base, {"math": tiny.make(seed=9)})
    with pytest.warns(TrimtabWarning, match=r"'math' does not descend from the base: its weights have other shapes"):
        build(strong, base, {"math": tiny.make("gpt2", seed=9)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(strong, base, {"math": tiny.tuned(base, 3, strength=1.0)})


def test_the_measured_divergence_is_that_of_the_two_laws():
    base, stranger = tiny.make(seed=1), tiny.make(seed=9)
    with pytest.warns(TrimtabWarning) as caught:
        model = build(base, base, {"x": stranger})
    ids = torch.randint(tiny.VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    laws = [m.model(ids).logits.detach().log_softmax(-1) for m in (model.members.experts["x"], model.members.base)]
    kl = float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())
    assert f"is {kl:.2f} nats per token" in str(caught[0].message)


def test_nan_logits_name_the_member_and_the_step():
    for at, name in enumerate(("strong", "base", "math", "facts")):
        model = fuse(("gpt2", "gpt2"))
        member = list(model.members)[at].model
        with torch.no_grad():
            member.transformer.wpe.weight[10:] = torch.nan  # from the eleventh position on
        inputs = model.encode("five.")
        with pytest.raises(NumericalError, match=f"member '{name}' gave logits that are NaN .* at step 7 of the gener"):
            model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with pytest.raises(NumericalError, match=f"member '{name}' .* after token 0, in row 0"):
            model(torch.full((2, 14), 9))  # read at once, NaN spreads: attention multiplies what it masks by zero


def test_a_law_of_nothing_is_as_bad_as_nan():
    model = fuse(one_pass=False)
    model.members.base.model.lm_head.register_forward_hook(lambda *args: torch.full_like(args[2], -torch.inf))
    with pytest.raises(NumericalError, match="member 'base' gave logits that are NaN or make no distribution"):
        model(torch.tensor([[7, 8]]))


def test_garbage_on_padding_is_not_looked_at():
    model = fuse(one_pass=False)
    inputs = model.encode(["short", "a much longer prompt"])
    padding = ~inputs["attention_mask"].bool()
    head = model.members.base.model.lm_head
    hook = head.register_forward_hook(lambda *args: args[2].masked_fill(padding[..., None], torch.nan))
    assert model(**inputs, use_cache=False).logits.isfinite().all()
    hook.remove()
    head.register_forward_hook(lambda *args: args[2].masked_fill(~padding[..., None], torch.nan))
    with pytest.raises(NumericalError, match=r"member 'base' gave logits that are NaN .* after token 15, in row 0"):
        model(**inputs, use_cache=False)


def test_a_text_longer_than_a_members_context_names_it():
    base = tiny.make("gpt2", seed=1)
    config = tiny.config_of("gpt2")
    config.n_positions = 20
    short = tiny.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(TrimtabWarning, match="other shapes"):
        model = build(tiny.make(seed=0), base, {"short": short})
    assert model.config.max_position_embeddings == 20
    long = model.encode("x" * 21)
    message = "(?s)the text has 21 tokens, member 'short' can read 20.*leave 'short' out"
    with pytest.raises(ContextTooLong, match=message):
        model(**long)
    with pytest.raises(ContextTooLong, match=message):
        model.generate(**long, max_new_tokens=5)
    padded = {"input_ids": torch.cat([torch.zeros(1, 10, dtype=torch.long), long["input_ids"][:, :15]], dim=-1)}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    assert model(**padded).logits.isfinite().all(), "padding does not count"


def test_a_generation_ends_where_a_context_is_full_and_says_so():
    model = fuse()
    inputs = model.encode("x" * 120)
    with pytest.warns(
        TrimtabWarning, match=r"1 of 1 texts were cut after 9 new tokens: the context of member 'strong' is"
    ):
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False, eos_token_id=83)
    assert ids.shape[1] == 129, "128 tokens are read, and one more is guessed"
    for options in ({"max_length": 129}, {"max_new_tokens": 9}):
        assert model.generate(**inputs, do_sample=False, eos_token_id=83, **options).shape[1] == 129
    with pytest.warns(TrimtabWarning, match="were cut after 9"):
        model.generate(**inputs, max_length=300, num_beams=2, do_sample=False, eos_token_id=83)
    with pytest.warns(TrimtabWarning, match="were cut after 9"):
        model.generate(**inputs, max_new_tokens=50, prompt_lookup_num_tokens=5, do_sample=False, eos_token_id=83)


def test_texts_that_ended_in_time_are_no_cause_for_a_warning():
    model = fuse()
    inputs = model.encode("x" * 120)
    first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
    assert model.generate(**inputs, max_new_tokens=50, do_sample=False, eos_token_id=first).shape[1] == 121
    with pytest.warns(TrimtabWarning, match="were cut after 1 new tokens"):
        assert model.generate(**model.encode("x" * 128), do_sample=False).shape[1] == 129


def test_a_members_own_longer_prompt_counts():
    model = fuse(prompts={"math": "x" * 100 + "{prompt}"})
    with pytest.warns(TrimtabWarning, match=r"cut after 19 new tokens: the context of member 'math' is full"):
        ids = model.generate(**model.encode("y" * 10), max_new_tokens=50, do_sample=False, eos_token_id=83)
    assert ids.shape[1] == 10 + 19
    with pytest.raises(ContextTooLong, match="the text has 140 tokens, member 'math' can read 128"):
        model.generate_text("y" * 40, max_new_tokens=3)


def test_empty_prompts_are_refused(fused):
    nothing = torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(EmptyPrompt, match="there are no tokens to continue"):
        fused.generate(nothing, max_new_tokens=3)
    with pytest.raises(EmptyPrompt, match="there are no tokens to continue"):
        fused.generate(max_new_tokens=3)
    with pytest.raises(EmptyPrompt, match="there are no tokens to read"):
        fused(nothing)
    with pytest.raises(EmptyPrompt, match="a row of the batch is all padding"):
        fused.generate(torch.tensor([[5], [0]]), attention_mask=torch.tensor([[1], [0]]), max_new_tokens=3)
    with pytest.raises(EmptyPrompt, match=r"(?s)prompt 1 of 2 is empty.*beginning-of-text token"):
        fused.generate_text(["a", ""])
    assert fused.generate(torch.tensor([[2]]), max_new_tokens=3).shape[0] == 1  # the fix: the beginning-of-text token


def test_scores_need_a_continuation_per_prompt(fused):
    with pytest.raises(BadSetting, match="there are 2 prompts and 1 continuations"):
        fused.score(["a", "b"], ["c"])
    with pytest.raises(EmptyPrompt, match="continuation 1 has no tokens"):
        fused.score(["a", "b"], ["c", ""])


def test_without_a_tokenizer_texts_are_refused():
    base = tiny.make(seed=1)
    model = FusedCausalLM.from_members(base, base, {"x": tiny.tuned(base, 2)})
    with pytest.raises(BadSetting, match="this fused model has no tokenizer"):
        model.encode("a")
    assert model.trace(torch.tensor([5, 6]), max_new_tokens=2).steps[0].token.isdigit()


def test_unknown_strategies_are_refused():
    base = tiny.make(seed=1)
    with pytest.raises(UnknownName, match=r"(?s)there is no amount 'dynamik'.*did you mean 'dynamic'"):
        build(base, base, {"x": base}, strategy="dynamik")


def test_unreadable_directories_are_refused(home, members_dir):
    empty = home / "empty"
    empty.mkdir()
    with pytest.raises(UnreadableModel, match=r"holds no config.json"):
        build(empty, home / "base", {})
    (home / "math" / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(UnreadableModel, match=r"member 'math' .* is a \"nobody-knows\", which transformers"):
        build(home / "strong", home / "base", {"math": home / "math"})
    (home / "strong" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UnreadableModel, match=r"member 'strong' cannot be loaded: .*the file is damaged"):
        build(home / "strong", home / "base", {})
    with pytest.raises(OfflineError, match="the hub cannot be asked"):
        build("nobody/nothing", home / "base", {})


def test_missing_weights_are_never_made_up(home):
    file = home / "math" / "model.safetensors"
    weights = load_file(file)
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(UnreadableModel, match=f"(?s)member 'math' .* lacks 1 of its weights, such as {gone}.*random"):
        build(home / "strong", home / "base", {"math": home / "math"})


def test_foreign_code_is_not_run(home):
    file = home / "math" / "config.json"
    content = json.loads(file.read_text())
    content |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    file.write_text(json.dumps(content))
    (home / "math" / "code.py").write_text("raise SystemExit('foreign code was run')")
    with pytest.raises(UnreadableModel, match=r"(?s)member 'math' .* code of its own .*Code of others is never run"):
        build(home / "strong", home / "base", {"math": home / "math"})


def test_what_is_no_plain_language_model_is_refused(fused):
    base = tiny.make(seed=1)
    with pytest.raises(MemberMismatch, match="member 'strong' is a fused model"):
        build(fused, base, {})
    with pytest.raises(MemberMismatch, match="member 'strong' is a Linear"):
        build(torch.nn.Linear(2, 2), base, {})
    from transformers import T5Config, T5ForConditionalGeneration

    tiny_t5 = T5Config(vocab_size=tiny.VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(MemberMismatch, match="member 'base' is an encoder-decoder model"):
        build(base, T5ForConditionalGeneration(tiny_t5), {})
