"""Experts as adapters on the base: one copy of its weights, whatever their number."""

import json
import re
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fusing import PROMPTS, check_same_tokens, new_tokens
from trimtab import FusedCausalLM, zoo
from trimtab.core.errors import MemberMismatch, TrimtabWarning, UnreadableModel


def save_adapter(model, folder, seed, base_name="zoo:small", **settings):
    """A random LoRA adapter on a copy of the model, saved; with weights that matter, not the zeros of a fresh one."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 8} | settings
    copy = AutoModelForCausalLM.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(copy, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    adapted.eval().save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base_name
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted


# peft asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def home(tmp_path, members_dir, monkeypatch):
    """strong and base as directories, and four adapters on the base that name it as `zoo:small`."""
    for name in ("strong", "base"):
        shutil.copytree(members_dir / name, tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for seed, name in enumerate(["a", "b", "c", "d"]):
        save_adapter(base, tmp_path / name, seed)
    places = {"zoo:small": tmp_path / "base", "zoo:strong": tmp_path / "strong"}
    monkeypatch.setattr(zoo, "resolve", lambda name: places[name])
    return tmp_path


def build(home, names, **options):
    return FusedCausalLM.from_members(home / "strong", home / "base", {n: home / n for n in names}, **options)


def merged(home, name):
    """The expert as a model of its own."""
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    return peft.PeftModel.from_pretrained(base, home / name).merge_and_unload()


def storage_bytes(model):
    """Bytes of all parameters, shared storage counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_adapters_give_what_merged_models_give(home):
    model = build(home, "ab")
    apart = FusedCausalLM.from_members(home / "strong", home / "base", {n: merged(home, n) for n in "ab"})
    inputs, ids = new_tokens(model, PROMPTS)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], apart(**inputs).logits[real], atol=1e-3, rtol=1e-3)
    check_same_tokens(model, ids, new_tokens(apart, PROMPTS)[1], inputs)
    check_same_tokens(model, ids, new_tokens(model, PROMPTS, use_cache=False)[1], inputs)
    for row, prompt in enumerate(PROMPTS):
        single, alone = new_tokens(model, prompt)
        check_same_tokens(model, ids[row : row + 1], alone, single)


def test_the_base_stays_bare(home):
    model = build(home, "abcd")
    bare = AutoModelForCausalLM.from_pretrained(home / "base")
    ids = model.encode(PROMPTS[0])["input_ids"]
    model(ids)  # the last adapter was on
    torch.testing.assert_close(model.reader.read_alone(model.members.base, ids), bare(ids).logits.detach())


def test_adapters_cost_their_own_bytes_only(home):
    one, four = storage_bytes(build(home, "a")), storage_bytes(build(home, "abcd"))
    strong, base = (storage_bytes(AutoModelForCausalLM.from_pretrained(home / name)) for name in ("strong", "base"))
    adapter = one - strong - base
    assert 0 < adapter < base / 2
    assert four == strong + base + 4 * adapter


def test_beams_samples_and_assistants_work_on_adapters(home):
    model = build(home, "ab")
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(new_tokens(model, PROMPTS, max_new_tokens=10, use_cache=use_cache, **options)[1])
        torch.testing.assert_close(*found)
    inputs, greedy = new_tokens(model, "abcabcabc")
    check_same_tokens(model, new_tokens(model, "abcabcabc", prompt_lookup_num_tokens=3)[1], greedy, inputs)


def test_a_fused_directory_with_adapters_opens_again(home):
    made = build(home, "ab")
    made.save_pretrained(home / "fused")
    opened = AutoModelForCausalLM.from_pretrained(home / "fused")
    assert torch.equal(new_tokens(opened, PROMPTS)[1], new_tokens(made, PROMPTS)[1])
    shutil.rmtree(home / "b")
    shutil.copytree(home / "c", home / "b")
    with pytest.raises(MemberMismatch, match="member 'b' has changed"):
        FusedCausalLM.from_pretrained(home / "fused")


def test_an_adapter_on_the_strong_model_is_a_model(home):
    strong = AutoModelForCausalLM.from_pretrained(home / "strong")
    adapted = save_adapter(strong, home / "ceiling", 7, base_name="zoo:strong")
    base = home / "base"
    model = FusedCausalLM.from_members(home / "ceiling", base, {"a": home / "a"}, {"amount": "static"})
    model.strategy = {"amount": "static", "settings": {"alpha": 0.0}}
    inputs, ids = new_tokens(model, PROMPTS)
    expected = adapted.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    check_same_tokens(model, ids, expected, inputs)
    model.save_pretrained(home / "fused")
    FusedCausalLM.from_pretrained(home / "fused")


def test_the_strong_model_and_its_ceiling_share_their_weights(home):
    save_adapter(AutoModelForCausalLM.from_pretrained(home / "strong"), home / "ceiling", 7, base_name="../strong")
    model = FusedCausalLM.from_members(home / "ceiling", home / "strong", {"c": home / "ceiling"}, "static")
    assert len(model.reader.runs) == 2
    assert len({id(member.model) for member in model.members}) == 1


def test_loaded_peft_models_are_members(home):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    adapted = peft.PeftModel.from_pretrained(base, home / "a", adapter_name="one")
    model = FusedCausalLM.from_members(
        AutoModelForCausalLM.from_pretrained(home / "strong"), base, {"a": adapted}, tokenizer=tiny.make_tokenizer()
    )
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, new_tokens(build(home, "a"), PROMPTS)[1], inputs)


def test_names_that_peft_cannot_hold_are_fine(home):
    experts = {"facts.v2/é": home / "a", "facts v2": home / "b"}
    model = FusedCausalLM.from_members(home / "strong", home / "base", experts)
    assert model.expert_names == tuple(experts)
    inputs, ids = new_tokens(model, PROMPTS)
    check_same_tokens(model, ids, new_tokens(build(home, "ab"), PROMPTS)[1], inputs)


def test_other_kinds_of_adapters_work_too(home):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    kinds = {"dora": {"use_dora": True}, "rs": {"use_rslora": True}, "head": {"modules_to_save": ["lm_head"]}}
    for name, settings in kinds.items():
        save_adapter(base, home / name, 3, **settings)
        model = build(home, ["a", name])
        apart = FusedCausalLM.from_members(home / "strong", home / "base", {n: merged(home, n) for n in ("a", name)})
        ids = model.encode(PROMPTS[0])["input_ids"]
        torch.testing.assert_close(model(ids).logits, apart(ids).logits, atol=1e-3, rtol=1e-3)


def test_an_adapter_of_another_model_is_refused(home):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    save_adapter(base, home / "e", 3, base_name="zoo:strong")
    with pytest.raises(MemberMismatch, match=r"(?s)expert 'e' is an adapter of 'zoo:strong', but the base is .*pass"):
        build(home, "e")
    save_adapter(AutoModelForCausalLM.from_pretrained(home / "strong"), home / "e", 3, base_name="/gone/base")
    with pytest.raises(MemberMismatch, match=r"(?s)the adapter 'e' \(.*\) does not fit its base"):
        build(home, "e")
    shutil.copytree(home / "base", home / "twin")
    save_adapter(base, home / "e", 3, base_name=str(home / "twin"))
    build(home, "e")  # the same weights in another place


def printed_kl(caught):
    """The divergence in the one warning that was caught, in nats."""
    (warning,) = [w for w in caught if w.category is TrimtabWarning]
    return float(re.search(r"KL\(expert \|\| base\) is (\d+\.\d\d) nats per token", str(warning.message))[1])


def measured_kl(model, name):
    """KL(expert || base) on fixed token sequences, from its definition."""
    ids = torch.randint(tiny.VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    members = model.members
    laws = [model.reader.read_alone(m, ids).log_softmax(-1) for m in (members.experts[name], members.base)]
    return float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())


@pytest.mark.parametrize("recorded", ["/gone/base", "some/base", "", None])
def test_a_base_that_cannot_be_compared_is_warned_of_with_the_measured_divergence(home, recorded):
    """A hub id, a path that is gone, or no name at all: the shapes alone do not show that it is the same model."""
    save_adapter(AutoModelForCausalLM.from_pretrained(home / "base"), home / "e", 3, base_name=recorded)
    what = f"an adapter of '{recorded}', which is not here" if recorded else "the adapter names no base"
    with pytest.warns(
        TrimtabWarning, match=f"'e' may not descend from the base: .*{what} and cannot be comp"
    ) as caught:
        model = build(home, "e")
    assert printed_kl(caught) == pytest.approx(measured_kl(model, "e"), abs=0.006)
    assert measured_kl(model, "e") > 0.1


def test_a_loaded_base_is_compared_by_weights_or_by_name(home):
    save_adapter(AutoModelForCausalLM.from_pretrained(home / "base"), home / "e", 3, base_name="some/base")
    strong = AutoModelForCausalLM.from_pretrained(home / "strong")

    def fuse_on(base, *experts):
        members = {e: home / e for e in experts}
        return FusedCausalLM.from_members(strong, base, members, tokenizer=tiny.make_tokenizer())

    base = AutoModelForCausalLM.from_pretrained(home / "base")
    fuse_on(base, "a", "b")  # zoo:small is here, and its weights are those of the base, adapters on it or not
    base.config.name_or_path = "some/base"
    fuse_on(base, "e")  # the recorded name
    other = tiny.tuned(AutoModelForCausalLM.from_pretrained(home / "base"), 5)
    with pytest.warns(
        TrimtabWarning, match=r"'a' may not.* of 'zoo:small', whose weights are not those of the loaded b"
    ):
        fuse_on(other, "a")
    with pytest.warns(TrimtabWarning, match=r"'e' may not.* of 'some/base', which is not here and cannot be compared"):
        fuse_on(other, "e")


def test_a_loaded_adapter_is_held_against_the_base_that_it_records(home):
    save_adapter(AutoModelForCausalLM.from_pretrained(home / "base"), home / "e", 3, base_name="some/base")
    strong = AutoModelForCausalLM.from_pretrained(home / "strong")

    def fuse_on(base, adapted):
        return FusedCausalLM.from_members(strong, base, {"e": adapted}, tokenizer=tiny.make_tokenizer())

    base = AutoModelForCausalLM.from_pretrained(home / "base")
    adapted = peft.PeftModel.from_pretrained(base, home / "e")
    with pytest.warns(TrimtabWarning, match="'e' may not descend from the base: it is an adapter of 'some/base'"):
        fuse_on(base, adapted)
    fresh = tiny.make(seed=1)  # a base without a name, and an adapter that was made on it
    untrained = peft.get_peft_model(fresh, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.warns(TrimtabWarning, match="'e' adds nothing: every B of its LoRA adapter is zero"):
        fuse_on(fresh, untrained)


@pytest.mark.parametrize("size", ["small", "strong"])
def test_the_embedded_adapters_sit_on_their_base_without_a_doubt(size):
    adapters = [name for name in zoo.names() if (zoo.resolve(f"zoo:{name}") / "adapter_config.json").is_file()]
    names = [name for name in adapters if name.startswith(f"{size}/")]
    experts = {name.partition("/")[2]: f"zoo:{name}" for name in names}
    assert len(experts) >= 4
    model = FusedCausalLM.from_members("zoo:strong", f"zoo:{size}", experts, "static")
    assert not any(member.doubt for member in model.members)
    loaded = AutoModelForCausalLM.from_pretrained(zoo.resolve(f"zoo:{size}"), dtype=torch.float32)
    FusedCausalLM.from_members("zoo:strong", loaded, experts, "static")


def test_damaged_and_unusable_adapters_are_refused(home):
    from safetensors.torch import load_file, save_file

    file = home / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(list(weights.items())[1:]), file)
    with pytest.raises(UnreadableModel, match=r"the adapter 'a' .* does not fill its layers: 1 weights are missing"):
        build(home, "a")
    (home / "b" / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    with pytest.raises(UnreadableModel, match="cannot be read"):
        build(home, "b")
    with pytest.raises(UnreadableModel, match="does not say which model it sits on"):
        FusedCausalLM.from_members(home / "b", home / "base", {})
