"""Inflated models behave as before, to the last bit, and have as many parameters as asked."""

import copy

import pytest
import torch
from bench.inflation import SILENCED, count_parameters, inflate_, least_parameters
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, MemberMismatch
from trimtab.zoo import load_items, resolve


def zoo_model(name, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype).eval()


def prompt_ids(count=3):
    tokenizer = AutoTokenizer.from_pretrained(resolve("tokenizer"))
    return tokenizer([item.prompt for item in load_items("arithmetic", limit=count)], padding=True, return_tensors="pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["small/arithmetic", "medium", "strong"])
def test_logits_and_cached_generation_are_unchanged(name, dtype):
    model, inputs = zoo_model(name, dtype), prompt_ids()
    logits, answers = model(**inputs).logits, model.generate(**inputs, max_new_tokens=24, do_sample=False)
    layers = len(model.model.layers)
    inflate_(model, count_parameters(model) + 4_000_000, blocks=3)
    assert len(model.model.layers) == model.config.num_hidden_layers == layers + 3
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False), answers)
    cache = model(**inputs).past_key_values
    assert all(layer.get_seq_length() == inputs["input_ids"].shape[1] for layer in cache.layers)
    assert len(cache.layers) == layers + 3


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma", "gemma2"])
def test_other_architectures_of_llamas_kind(kind):
    model = tiny.make(kind)
    ids = torch.arange(5, 45).reshape(2, 20)
    logits = model(ids).logits
    answers = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    inflate_(model, count_parameters(model) + 100_000, blocks=2)
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None), answers)


@pytest.mark.parametrize(("parameters", "blocks"), [(1_000_000, 1), (5_000_000, 4), (20_000_000, 2)])
def test_parameter_count_is_as_asked(parameters, blocks):
    model = inflate_(zoo_model("small"), parameters, blocks)
    assert count_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
    assert abs(count_parameters(model) - parameters) <= 16 * 3 * model.config.hidden_size * blocks


def test_the_cost_is_real():
    """Every page of the new blocks is written, and all but the silenced matrices are random and finite."""
    model = inflate_(zoo_model("small"), 3_000_000, blocks=2)
    names = dict(model.model.layers[-1].named_parameters())
    for name, parameter in names.items():
        is_silenced = name.removesuffix(".weight") in SILENCED
        assert bool((parameter == 0).all()) == is_silenced, name
        assert bool(parameter.isfinite().all())
        if parameter.ndim > 1 and not is_silenced:
            assert parameter.std() > 0.005
    # The hidden state passes, but what the MLP computes inside is no zero.
    inside = []
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: inside.append(inputs[0]))
    model(**prompt_ids(1))
    assert inside[0].abs().max() > 1e-4


def test_inflation_is_repeatable_and_follows_the_seed():
    made = [inflate_(zoo_model("small"), 1_000_000, 1, seed=seed) for seed in (0, 0, 1)]
    gates = [model.model.layers[-1].mlp.gate_proj.weight for model in made]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_adapters_stay_valid(dtype):
    experts = {"math": "zoo:small/arithmetic-lora", "facts": "zoo:small/facts-lora"}
    fused = FusedCausalLM.from_members("zoo:medium", "zoo:small", experts, dtype=dtype)
    inputs = fused.encode([item.prompt for item in load_items("arithmetic", limit=2)])
    logits, answers = fused(**inputs).logits, fused.generate(**inputs, max_new_tokens=16, do_sample=False)
    base = fused.members.base.model
    inflate_(base, 2_000_000, blocks=2)
    assert torch.equal(fused(**inputs).logits, logits)
    for switch in fused.members.switches.values():
        switch.refresh()  # from now on the new blocks' adapters are switched, too
    assert torch.equal(fused(**inputs).logits, logits)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=16, do_sample=False), answers)
    adapters = [{name: part.weight for name, part in layer.mlp.up_proj.lora_A.items()} for layer in base.model.layers]
    assert adapters[-1].keys() == adapters[0].keys() != set()
    assert {part.dtype for part in adapters[-1].values()} == {part.dtype for part in adapters[0].values()}


def test_bad_sizes_are_refused_and_nothing_is_changed():
    model = zoo_model("small")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(BadSetting, match=r"cannot make 1,000 parameters") as caught:
        inflate_(model, 1_000)
    least = least_parameters(model)
    assert f"at least {least:,}." in caught.value.expected
    with pytest.raises(BadSetting, match="blocks is 0"):
        inflate_(model, 1_000_000, blocks=0)
    assert model.config.to_dict() == before
    assert len(model.model.layers) == before["num_hidden_layers"]
    assert count_parameters(inflate_(model, least)) == least  # the fix that the message proposes


def test_models_of_another_kind_are_refused():
    with pytest.raises(MemberMismatch, match="GPT2LMHeadModel cannot be inflated"):
        inflate_(tiny.make("gpt2"), 10_000_000)
