"""Whatever adapter a member carries, it is read as the model computes by itself, or refused."""

import copy
import json
import re

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import MemberMismatch, TrimtabWarning, UnreadableModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
]

IDS = torch.randint(4, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
MODULES = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **MODULES, **settings})


# What changes the base when it is attached, and is told with the weights that it holds twice.
CHANGING = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "kasa": lambda: lora(kasa_config=peft.KasaConfig()),
}
KINDS = {
    "plain": lora,
    "replication": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva"),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True),
    "bias": lambda: lora(bias="all"),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=4, **MODULES),
    "lokr": lambda: peft.LoKrConfig(r=4, **MODULES),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **MODULES),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}
# Which of them sit on the base itself, so that they cost their own bytes only and may share its forward.
ON_THE_BASE = ("plain", "gaussian", "orthogonal", "eva", "rslora", "dora", "lora_bias", "head", "embedding")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def train(folder, name, config, seed=7):
    """Saves an adapter whose weights were moved at random; what its trainer's model computes on IDS."""
    model = peft.get_peft_model(load(folder), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(folder / name)
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folder(members_dir, tmp_path_factory):
    """A base, and adapters a and b on it; the same for all tests."""
    home = tmp_path_factory.mktemp("kinds")
    load_from = AutoModelForCausalLM.from_pretrained(members_dir / "base")
    load_from.save_pretrained(home / "base")
    tiny.make_tokenizer().save_pretrained(home / "base")
    for seed, name in enumerate("ab"):
        train(home, name, lora(), seed)
    return home


@pytest.fixture(scope="module")
def strong():
    return tiny.make(seed=0, width=48, layers=3)


def fuse(strong, base, experts):
    return FusedCausalLM.from_members(strong, base, experts, "static", tiny.make_tokenizer())


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_reading(fused, expected):
    """Each member is read as expected, {member: logits on IDS}."""
    for member in fused.members:
        if member.name in expected:
            found = fused.reader.read_alone(member, IDS)
            torch.testing.assert_close(found, expected[member.name], atol=2e-5, rtol=1e-5, msg=lambda text: text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_what_its_trainer_had(folder, strong, kind):
    expected = {"e": train(folder, kind, KINDS[kind]()), "base": logits_of(load(folder))}
    expected["a"] = logits_of(peft.PeftModel.from_pretrained(load(folder), folder / "a"))
    fused = fuse(strong, folder / "base", {"e": folder / kind, "a": folder / "a"})
    check_reading(fused, expected)
    assert float((expected["e"] - expected["base"]).abs().max()) > 0.1
    members = fused.members
    assert (members.experts["e"].model is members.base.model) == (kind in ON_THE_BASE)
    shared = {id(parameter) for parameter in members.base.model.parameters()}
    own = [p for p in members.experts["e"].model.parameters() if id(p) not in shared]
    assert sum(p.numel() for p in own) < sum(p.numel() for p in members.base.model.parameters()) / 2


@pytest.mark.parametrize("kind", CHANGING)
def test_an_adapter_that_changes_its_base_leaves_the_base_alone(folder, strong, kind):
    expected = {"e": train(folder, kind, CHANGING[kind]()), "base": logits_of(load(folder))}
    expected["a"] = logits_of(peft.PeftModel.from_pretrained(load(folder), folder / "a"))
    for order in ("ea", "ae"):
        experts = {name: folder / (kind if name == "e" else name) for name in order}
        with pytest.warns(TrimtabWarning, match="the adapter 'e' changes its base .*a copy of the weights") as caught:
            fused = fuse(strong, folder / "base", experts)
        check_reading(fused, expected)
    model, base = fused.members.experts["e"].model, fused.members.base.model
    twins, originals = (
        {name.replace(".base_layer", ""): p for name, p in part.named_parameters() if "lora_" not in name}
        for part in (model, base)
    )
    twice = sum(p.numel() * 4 for name, p in originals.items() if twins[name] is not p)
    assert f"{twice / 2**20:.1f} MiB" in str(caught[0].message)
    assert twins["model.embed_tokens.weight"] is base.model.embed_tokens.weight


def test_a_changed_base_has_no_part_in_what_is_trained_or_moved_later(folder, strong):
    """Parameters that a copy shares are the same objects, so moving or changing them once is enough."""
    train(folder, "pissa", lora(init_lora_weights="pissa"))
    with pytest.warns(TrimtabWarning, match="changes its base"):
        fused = fuse(strong, folder / "base", {"e": folder / "pissa"})
    before = fused.reader.read_alone(fused.members.base, IDS)
    with torch.no_grad():
        fused.members.base.model.model.norm.weight.mul_(2)
    assert fused.members.experts["e"].model.model.norm.weight is fused.members.base.model.model.norm.weight
    assert not torch.equal(fused.reader.read_alone(fused.members.base, IDS), before)


def test_a_saved_pissa_expert_opens_again(folder, strong, tmp_path):
    train(folder, "pissa", lora(init_lora_weights="pissa"))
    strong.save_pretrained(tmp_path / "strong")
    with pytest.warns(TrimtabWarning, match="changes its base"):
        made = fuse(tmp_path / "strong", folder / "base", {"e": folder / "pissa"})
    made.save_pretrained(tmp_path / "fused")
    with pytest.warns(TrimtabWarning, match="changes its base"):
        opened = FusedCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(opened(IDS).logits, made(IDS).logits)


def with_start(folder, name, start):
    """Adapter a, with another start in its configuration."""
    target = folder / name
    train(folder, name, lora())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    return target


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_that_was_not_saved_is_refused(folder, strong, start):
    with pytest.raises(MemberMismatch, match=rf"(?s)'e' was made with .*'{start}'.*path_initial_model_for_weight_conv"):
        fuse(strong, folder / "base", {"e": with_start(folder, start, start)})


def test_a_start_that_is_drawn_anew_is_refused_with_how_much_it_moves(folder, strong):
    train(folder, "niter", lora(init_lora_weights="pissa_niter_2"))
    with pytest.raises(MemberMismatch, match=r"'e' .* is another one at each loading: its logits move by \d"):
        fuse(strong, folder / "base", {"e": folder / "niter"})


def test_the_cure_for_a_changed_base_makes_a_plain_adapter(folder, strong, tmp_path):
    model = peft.get_peft_model(load(folder), lora(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # as peft's documentation has it
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = {"e": logits_of(model), "base": logits_of(load(folder))}
    model.save_pretrained(tmp_path / "e", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    fused = fuse(strong, folder / "base", {"e": tmp_path / "e"})
    check_reading(fused, expected)
    assert fused.members.experts["e"].model is fused.members.base.model


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "activated": lambda: lora(alora_invocation_tokens=[5, 6]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_adapters_that_are_no_change_of_weights_are_refused(folder, strong, kind):
    model = peft.get_peft_model(load(folder), PROMPTS[kind]())
    model.save_pretrained(folder / kind)
    why = "activated LoRA: it works only after tokens" if kind == "activated" else "lives in the prompt"
    for members in (
        (strong, folder / "base", {"x": folder / kind}),
        (strong, folder / "base", {"x": model}),
        (model, folder / "base", {}),
    ):
        with pytest.raises(MemberMismatch, match=why):
            fuse(*members)


# ---- models that are handed in loaded


def wrapped(folder):
    model = peft.PeftModel.from_pretrained(load(folder), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    return model


def wrapped_both(folder):
    model = wrapped(folder)
    model.base_model.set_adapter(["a", "b"])
    return model


def wrapped_off(folder):
    model = wrapped(folder)
    model.base_model.disable_adapter_layers()
    return model


def wrapped_merged(folder):
    model = wrapped_both(folder)
    model.merge_adapter(["a", "b"])
    return model


def mixed(folder):
    model = peft.PeftMixedModel.from_pretrained(load(folder), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    model.set_adapter(["a", "b"])
    return model


def by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "a")


def by_transformers_both(folder):
    model = load(folder)
    model.load_adapter(folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    model.set_adapter(["a", "b"])
    return model


def by_transformers_off(folder):
    model = by_transformers(folder)
    model.disable_adapters()
    return model


def inside_a_wrapper(folder):
    return wrapped(folder).get_base_model()


def pissa_in_memory(folder):
    return peft.get_peft_model(load(folder), lora(init_lora_weights="pissa"))


HANDED = (
    *(wrapped, wrapped_both, wrapped_off, wrapped_merged, mixed, inside_a_wrapper, pissa_in_memory),
    *(by_transformers, by_transformers_both, by_transformers_off),
)


@pytest.mark.filterwarnings("ignore:expert 'e' adds nothing")
@pytest.mark.parametrize("make", HANDED, ids=lambda make: make.__name__)
def test_a_loaded_model_is_read_as_it_computes_by_itself(folder, strong, make):
    base = load(folder)
    for role in ("strong", "base", "e"):
        model = make(folder)
        expected = logits_of(model)
        parts = {"strong": strong, "base": base, "e": tiny.tuned(base, 3)} | {role: model}
        fused = fuse(parts["strong"], parts["base"], {"e": parts["e"]})
        check_reading(fused, {role: expected})
        fused(IDS)
        check_reading(fused, {role: expected})


def test_a_base_and_the_wrappers_around_it_are_three_members(folder, strong):
    base = load(folder)
    experts = {name: peft.PeftModel.from_pretrained(base, folder / name, adapter_name=name) for name in "ab"}
    expected = {n: logits_of(peft.PeftModel.from_pretrained(load(folder), folder / n)) for n in "ab"}
    expected["base"] = logits_of(load(folder))
    for _ in range(2):  # a second fused model finds the adapters as the first has left them
        check_reading(fuse(strong, base, experts), expected)


def test_a_base_is_bare_for_the_next_fused_model(folder, strong):
    base = load(folder)
    first = fuse(strong, base, {"a": folder / "a"})
    first(IDS)
    second = fuse(strong, base, {"b": folder / "b"})
    expected = {n: logits_of(peft.PeftModel.from_pretrained(load(folder), folder / n)) for n in "ab"}
    check_reading(second, {"base": logits_of(load(folder)), "b": expected["b"]})
    check_reading(first, {"a": expected["a"]})


def test_a_base_that_another_members_adapter_has_changed_is_refused(folder, strong):
    base = load(folder)
    expert = peft.get_peft_model(base, lora(init_lora_weights="pissa"))
    with pytest.raises(MemberMismatch, match=r"(?s)'base' is not the model that it was.*load 'base' once more"):
        fuse(strong, base, {"e": expert})
    fuse(strong, load(folder), {"e": expert})


def test_an_adapter_on_a_base_that_has_another_one_on_is_refused(folder, strong):
    base = by_transformers(folder)
    with pytest.raises(MemberMismatch, match=r"(?s)the base is read with another one on .*disable_adapters\(\)"):
        fuse(strong, base, {"b": folder / "b"})
    base.disable_adapters()
    fuse(strong, base, {"b": folder / "b"})


def test_a_state_that_cannot_be_had_again_is_an_error_with_its_figure(folder, strong):
    """Adapters that are off in one layer only: no selection for the whole model gives that."""
    model = by_transformers(folder)
    layer = model.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    away = float((logits_of(model) - logits_of(by_transformers(folder))).abs().max())
    with pytest.raises(MemberMismatch, match="member 'e' is read as another model: its logits differ by") as error:
        fuse(strong, load(folder), {"e": model})
    figure = float(re.search(r"differ by (\d+\.?\d*)", str(error.value))[1])
    assert 0.1 < figure < 3 * away
    whole = by_transformers(folder)
    whole.disable_adapters()
    fuse(strong, load(folder), {"e": whole})


def test_missing_packages_of_a_kind_are_named(folder, strong):
    with pytest.raises((UnreadableModel, MemberMismatch), match=r"scipy|bitsandbytes|loftq_config"):
        fuse(strong, folder / "base", {"e": with_start(folder, "loftq", "loftq")})


def test_a_copied_model_has_a_switch_of_its_own(folder, strong):
    fused = fuse(strong, folder / "base", {"a": folder / "a"})
    twin = copy.deepcopy(fused)
    torch.testing.assert_close(twin(IDS).logits, fused(IDS).logits)
