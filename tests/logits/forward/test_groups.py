"""Several small members in one forward: the same logits, tokens and errors as each member by itself."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from fusing import PROMPTS, check_same_tokens, fuse, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, NumericalError
from trimtab.logits.forward import grouping, linears, mixed_adapters, stacking
from trimtab.models.references import digest

# peft asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = {"gpt2": ["c_attn", "c_proj"]}
RANKS = {"a": 4, "b": 4, "c": 7, "d": 2}
NEAR = 0.02


def save_adapters(model, kind, folder, ranks=RANKS, **settings):
    """Random LoRA adapters on copies of a model, saved; {name: directory}."""
    for seed, (name, rank) in enumerate(ranks.items()):
        # Adapters of several ranks and strengths, of which not all sit on the same layers.
        targets = TARGETS.get(kind, ["q_proj", "down_proj"] + (["v_proj"] if rank > 2 else []))
        own = {"r": rank, "lora_alpha": 3 + seed, "target_modules": targets, "use_rslora": name == "b"} | settings
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(
                copy.deepcopy(model),
                peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", init_lora_weights=False, **own),
            )
            for part, parameter in adapted.named_parameters():
                if "lora_" in part:
                    torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
        config = json.loads((folder / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(folder / "base")
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return {name: folder / name for name in ranks}


def with_adapters(folder, kind="llama", ranks=RANKS, settings=None, **options):
    """A fused model whose experts are adapters on its base."""
    base = tiny.make(kind, seed=1)
    base.save_pretrained(folder / "base")
    experts = save_adapters(base, kind, folder, ranks, **settings or {})
    strong = tiny.make("llama", seed=0, width=48, layers=3)
    return FusedCausalLM.from_members(strong, folder / "base", experts, tokenizer=tiny.make_tokenizer(), **options)


def kinds_of(model):
    """What each group is, and which runs it reads."""
    return [(group.kind, group.runs) for group in model.reader.groups]


def apart_and_joint(model, work):
    """What some work gives with each member by itself, and in one forward."""
    found = []
    for setting in (False, True):
        model.one_pass = setting
        found.append(work(model))
    return found


def read_in_steps(model):
    """Logits of a left-padded batch: the prompt, then token by token with a cache."""
    inputs = model.encode(PROMPTS)
    more = torch.arange(12, 12 + 36).view(3, 12)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=-1)
    width = inputs["input_ids"].shape[1]
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    parts = [output.logits]
    for at in range(more.shape[1]):
        output = model(
            more[:, at : at + 1], attention_mask=mask[:, : width + at + 1], past_key_values=output.past_key_values
        )
        parts.append(output.logits)
    whole = model(torch.cat([inputs["input_ids"], more], dim=-1), attention_mask=mask, use_cache=False).logits
    cached = torch.cat(parts, dim=1)
    torch.testing.assert_close(cached, whole[:, width - 1 :], atol=2e-3, rtol=1e-3)
    return cached


def check_generations(model):
    """The same greedy tokens, beams, samples, and tokens from static caches, apart and joint."""
    for options in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8},
    ):
        inputs, _ = new_tokens(model, PROMPTS, max_new_tokens=1)
        apart, joint = apart_and_joint(model, lambda model, options=options: new_tokens(model, PROMPTS, **options)[1])
        if "num_beams" in options:
            assert torch.equal(apart, joint)
        else:
            check_same_tokens(model, joint, apart, inputs)
    torch.manual_seed(3)
    sampled = new_tokens(model, PROMPTS, do_sample=True, num_return_sequences=2, max_new_tokens=8, speculate=0)[1]
    model.one_pass = False
    torch.manual_seed(3)
    again = new_tokens(model, PROMPTS, do_sample=True, num_return_sequences=2, max_new_tokens=8, speculate=0)[1]
    assert torch.equal(sampled, again)


# ---- stacked models


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_stacked_models_give_what_each_gives_alone(kind):
    model = fuse(("llama", kind), one_pass=True)
    assert kinds_of(model) == [("alone", (0,)), ("stacked", (1, 2, 3))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms and biases differ, too
        for parameter in model.bodies.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    apart, joint = apart_and_joint(model, read_in_steps)
    torch.testing.assert_close(joint, apart, atol=1e-3, rtol=1e-3)
    check_generations(model)


@pytest.mark.parametrize("prompts", [{"math": "Sum: {prompt}\n="}, {"base": "{prompt}!", "facts": "Q: {prompt}\nA:"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_stacked_models_read_prompts_of_their_own(kind, prompts):
    model = fuse(("gpt2", kind), prompts=prompts)
    check_generations(model)
    scores = apart_and_joint(model, lambda model: model.score(PROMPTS, [" in a house", " 19", " and wakes"]))
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


def test_stacked_models_work_alone_and_keep_their_memory(tmp_path):
    base = tiny.make("qwen2", seed=1)  # its head is tied to its embedding
    members = {"base": base, "math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    ids = torch.tensor([[7, 8, 9]])
    logits = {name: member(ids).logits for name, member in members.items()}
    for name, member in members.items():
        member.save_pretrained(tmp_path / name)
    experts = {name: members[name] for name in ("math", "facts")}
    model = FusedCausalLM.from_members(
        tiny.make(seed=0, width=48), base, experts, tokenizer=tiny.make_tokenizer(), one_pass=True
    )
    model(ids)
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in members.values() for p in m.parameters()
    }
    bytes_apart = sum(p.numel() * p.element_size() for m in members.values() for p in m.parameters())
    assert sum(storages.values()) == bytes_apart, "the weights are in memory once"
    for name, member in members.items():
        torch.testing.assert_close(member(ids).logits, logits[name])
        member.save_pretrained(tmp_path / "again" / name)
        assert digest(tmp_path / "again" / name) == digest(tmp_path / name)
        assert torch.equal(copy.deepcopy(member)(ids).logits, member(ids).logits)


def test_what_happens_to_a_stacked_model_is_seen():
    model = fuse(one_pass=True)
    ids = torch.tensor([[7, 8, 9]])
    before = model(ids).logits
    expert = model.members.experts["facts"].model
    with torch.no_grad():
        expert.lm_head.weight.mul_(-1.0)  # in place, as an optimiser does
    changed = model(ids).logits
    assert not torch.allclose(changed, before, atol=1e-2)
    for body in model.bodies:
        body.double()  # gives the parameters memory of their own
    joint = model(ids).logits
    torch.testing.assert_close(joint, changed, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        expert.lm_head.weight.mul_(-1.0)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_any_weight_that_is_replaced_is_seen():
    model = fuse(one_pass=True)
    math, facts = (model.members.experts[name].model for name in ("math", "facts"))
    ids = torch.tensor([[7, 8, 9]])

    def set_data():
        facts.lm_head.weight.data = -facts.lm_head.weight.data

    def set_parameter():
        math.model.norm.weight = torch.nn.Parameter(3 * math.model.norm.weight)

    def set_module():
        new = torch.nn.Linear(32, tiny.VOCAB, bias=False)
        new.weight.data = facts.lm_head.weight.data.flip(0).clone()
        facts.lm_head = new

    def set_module_of_the_frame():
        new = torch.nn.Embedding(tiny.VOCAB, 32)
        new.weight.data = -2 * model.members.base.model.get_input_embeddings().weight.data
        model.members.base.model.set_input_embeddings(new)

    def load():
        facts.load_state_dict({name: part * 0.7 for name, part in facts.state_dict().items()}, assign=True)

    def in_place():
        facts.model.layers[-1].mlp.down_proj.weight.data.mul_(-1.0)

    before = model(ids).logits
    for change in (set_data, set_parameter, set_module, set_module_of_the_frame, load, in_place):
        change()
        joint = model(ids).logits
        assert not torch.allclose(joint, before, atol=1e-2), change
        apart = torch.stack([member.model(ids).logits.log_softmax(-1) for member in model.members])
        expected = model.strategy(apart[0, 0], apart[1, 0], apart[2:, 0]).log_probs
        torch.testing.assert_close(joint[0].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
        before = joint
    assert kinds_of(model)[1] == ("stacked", (1, 2, 3))


@torch.no_grad()
def test_members_that_are_no_longer_alike_are_refused_until_they_are_sorted_anew():
    for change in (
        lambda facts: facts.to(torch.float64),
        lambda facts: setattr(facts, "lm_head", torch.nn.Linear(32, tiny.VOCAB, bias=True)),
    ):
        model = fuse(one_pass=True)
        change(model.members.experts["facts"].model)
        with pytest.raises(
            BadSetting, match=r"(?s)no longer of one architecture, number type.*set fused.one_pass again"
        ):
            model(torch.tensor([[7, 8]]))
        model.one_pass = "auto"  # the fix
        assert kinds_of(model)[1:] == [("stacked", (1, 2)), ("alone", (3,))]
        model(torch.tensor([[7, 8]]))


def test_the_member_with_broken_logits_is_named():
    model = fuse(one_pass=True)
    with torch.no_grad():
        model.members.experts["facts"].model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"member .facts. gave logits that are NaN .* in row 1"):
        model(torch.tensor([[7, 8], [9, 8]]), attention_mask=torch.tensor([[0, 0], [1, 1]]))


def test_modules_are_as_they_were_also_after_an_error():
    model = fuse(("llama", "gpt2"), one_pass=True)
    body = model.members.base.model
    with pytest.raises(IndexError):
        model.reader.logits(torch.tensor([[10**6]]))
    assert not any("forward" in vars(module) for module in body.modules())
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(model.reader.read_alone(model.members.base, ids), body(ids).logits.detach())


def test_products_of_all_sizes_are_those_of_each_copy(monkeypatch):
    for small, few, many in ((0, 2, 0), (0, 10**9, 10**9), (10**9, 0, 10**9), (2**18, 2, 2**20)):
        monkeypatch.setattr(stacking, "SMALL_MATRIX", small)
        monkeypatch.setattr(stacking, "FEW_ROWS", few)
        monkeypatch.setattr(stacking, "MANY_MULTIPLICATIONS", many)
        for rows in (1, 3):
            generator = torch.Generator().manual_seed(rows)
            x, weights, bias = (
                torch.randn(shape, generator=generator) for shape in ((4, rows, 6), (4, 5, 6), (4, 1, 5))
            )
            for shift in (bias, None):
                found = stacking._products(x, weights, shift)
                expected = torch.einsum("cri,coi->cro", x, weights) + (0 if shift is None else shift)
                torch.testing.assert_close(found, expected)
                assert found.is_contiguous()


# ---- adapters


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
def test_adapters_give_in_one_forward_what_each_gives_alone(tmp_path, kind):
    model = with_adapters(tmp_path, kind, one_pass=True)
    assert kinds_of(model) == [("alone", (0,)), ("adapters", (1, 2, 3, 4, 5))]
    apart, joint = apart_and_joint(model, read_in_steps)
    torch.testing.assert_close(joint, apart, atol=1e-3, rtol=1e-3)
    check_generations(model)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_adapters(tmp_path, count):
    model = with_adapters(tmp_path, ranks=dict(list(RANKS.items())[:count]), one_pass=True)
    assert kinds_of(model)[1] == ("adapters", tuple(range(1, count + 2)))
    apart, joint = apart_and_joint(model, read_in_steps)
    torch.testing.assert_close(joint, apart, atol=1e-3, rtol=1e-3)


def test_adapters_read_prompts_of_their_own(tmp_path):
    model = with_adapters(tmp_path, prompts={"c": "Sum: {prompt}\n=", "base": "{prompt}?"})
    check_generations(model)


def test_one_model_with_two_prompts_is_read_once():
    base = tiny.make(seed=1)
    model = FusedCausalLM.from_members(
        tiny.make(seed=0),
        base,
        {"shy": base},
        {"amount": "static", "settings": {"alpha": 1.5}},
        tiny.make_tokenizer(),
        prompts={"shy": "Maybe {prompt}"},
    )
    assert kinds_of(model) == [("alone", (0,)), ("adapters", (1, 2))]
    check_generations(model)


def test_adapters_share_memory_and_can_be_saved(tmp_path):
    base = tiny.make(seed=1)
    save_adapters(base, "llama", tmp_path, {"a": 4, "b": 4})
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", adapter_name="b")
    adapted.set_adapter("a")
    sizes = sum(p.numel() * p.element_size() for p in base.parameters())
    strong = tiny.make(seed=0)
    with pytest.warns(match="may not descend"):
        model = FusedCausalLM.from_members(strong, base, {"a": adapted}, tokenizer=tiny.make_tokenizer(), one_pass=True)
    switch = model.members.switch(model.members.base)
    body = mixed_adapters.AdapterRows(base, [None, "a", "b"])
    ids = torch.tensor([[7, 8, 9]] * 3)
    joint = body(input_ids=ids).logits
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    assert sum(storages.values()) == sizes
    for place, name in enumerate([None, "a", "b"]):
        switch.select(name)
        torch.testing.assert_close(joint[place], base(ids[:1]).logits[0], atol=1e-4, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "again", selected_adapters=["a"], save_embedding_layers=False)
    again = load_file(tmp_path / "again" / "a" / "adapter_model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)


def test_what_happens_to_adapters_is_seen(tmp_path):
    model = with_adapters(tmp_path, one_pass=True)
    ids = torch.tensor([[7, 8, 9]])
    before = model(ids).logits
    layer = next(layer for layer in model.members.switch(model.members.base).layers if len(layer.lora_A) == 4)
    for name in layer.scaling:
        layer.scaling[name] *= 3
    changed = model(ids).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    model.one_pass = False
    torch.testing.assert_close(model(ids).logits, changed, atol=1e-3, rtol=1e-3)
    model.one_pass = True
    for body in model.bodies:
        body.to(torch.float64)
    joint = model(ids).logits
    torch.testing.assert_close(joint, changed, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        next(iter(layer.lora_B.values())).weight.zero_()
    after = model(ids).logits
    assert not torch.allclose(after, joint, atol=1e-3)
    model.one_pass = False
    torch.testing.assert_close(after, model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_any_adapter_weight_that_is_replaced_is_seen(tmp_path):
    model = with_adapters(tmp_path, one_pass=True)
    switch, adapter = model.members.switch(model.members.base), model.members.experts["c"].adapter
    ids = torch.tensor([[7, 8, 9]])
    last = switch.layers[-1]

    def set_data():
        last.lora_B[adapter].weight.data = -2 * last.lora_B[adapter].weight.data

    def set_parameter():
        last.lora_A[adapter].weight = torch.nn.Parameter(3 * last.lora_A[adapter].weight)

    def load_again():
        switch._peft.load_adapter(str(tmp_path / "c"), adapter_name=adapter)  # as it was before

    def of_the_base():
        last.base_layer.weight.data = 2 * last.base_layer.weight.data

    def in_place():
        last.lora_B[adapter].weight.data.mul_(-3.0)

    before = model(ids).logits
    for change in (set_data, set_parameter, load_again, of_the_base, in_place):
        change()
        joint = model(ids).logits
        assert not torch.allclose(joint, before, atol=1e-3), change
        model.one_pass = False
        torch.testing.assert_close(joint, model(ids).logits, atol=1e-4, rtol=1e-4)
        model.one_pass, before = True, joint


def test_an_adapter_that_is_taken_away_is_missed(tmp_path):
    model = with_adapters(tmp_path, one_pass=True)
    name = model.members.experts["c"].adapter
    model.members.switch(model.members.base)._peft.delete_adapter(name)
    with pytest.raises(BadSetting, match=f"adapter '{name}' is not on the model"):
        model(torch.tensor([[7, 8]]))


def test_adapters_in_another_number_type_than_their_base(tmp_path):
    model = with_adapters(tmp_path, one_pass=True)
    for name, parameter in model.members.base.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    ids = torch.tensor([[7, 8, 9], [9, 10, 11]])
    apart, joint = apart_and_joint(model, lambda model: model(ids).logits)
    torch.testing.assert_close(joint, apart, atol=0.3, rtol=0.1)


# ---- what is joined


def test_the_setting_decides_and_the_lanes_say_why(tmp_path, monkeypatch):
    model = fuse()
    assert model.one_pass == "auto"
    assert kinds_of(model)[1] == ("stacked", (1, 2, 3))
    model.one_pass = False
    assert kinds_of(model) == [("alone", (place,)) for place in range(4)]
    assert [group.reason for group in model.reader.groups] == ["", *["one_pass is off"] * 3]
    monkeypatch.setattr(grouping, "STACKING_PAYS_BYTES", 1)
    model.one_pass = "auto"
    assert len(model.reader.groups) == 4
    assert "longer to read than operations to start" in model.reader.groups[1].reason
    monkeypatch.setattr(grouping, "MANY", 3)  # members, from which on larger ones are joined, too
    model.one_pass = "auto"
    assert len(model.reader.groups) == 2
    model.one_pass = True
    assert len(model.reader.groups) == 2
    with pytest.raises(BadSetting, match=r"(?s)one_pass is 'yes'.*Known: \"auto\", True, False"):
        model.one_pass = "yes"
    assert model.one_pass is True


def test_the_setting_is_saved(tmp_path, members_dir):
    experts = {name: members_dir / name for name in ("math", "facts")}
    made = FusedCausalLM.from_members(members_dir / "strong", members_dir / "base", experts, one_pass=False)
    made.save_pretrained(tmp_path / "fused")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert opened.one_pass is False
    assert len(opened.reader.groups) == 4
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", one_pass=True)
    assert (opened.one_pass, len(opened.reader.groups)) == (True, 2)


def test_unlike_members_stay_apart():
    base = tiny.make(seed=1)
    experts = {"math": tiny.tuned(base, 10), "wide": tiny.make(seed=2, width=64)}
    with pytest.warns(match="does not descend"):
        model = FusedCausalLM.from_members(tiny.make(seed=0), base, experts, tokenizer=tiny.make_tokenizer())
    assert kinds_of(model) == [("alone", (0,)), ("stacked", (1, 2)), ("alone", (3,))]
    assert model.reader.groups[2].reason == "no other small run has its architecture"
    with pytest.raises(BadSetting, match=r"(?s)'wide': no other small run has its architecture.*one_pass=\"auto\""):
        model.one_pass = True
    model.one_pass = "auto"  # the fix
    check_same_tokens(model, *(new_tokens(model, PROMPTS)[1] for _ in range(2)), model.encode(PROMPTS))


def test_adapters_and_full_experts_have_a_lane_each(tmp_path):
    base = tiny.make(seed=1)
    base.save_pretrained(tmp_path / "base")
    experts = save_adapters(base, "llama", tmp_path, {"a": 4, "b": 3})
    experts |= {"math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    model = FusedCausalLM.from_members(
        tiny.make(seed=0), tmp_path / "base", experts, tokenizer=tiny.make_tokenizer(), one_pass=True
    )
    assert kinds_of(model) == [("alone", (0,)), ("adapters", (1, 2, 3)), ("stacked", (4, 5))]
    apart, joint = apart_and_joint(model, read_in_steps)
    torch.testing.assert_close(joint, apart, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .default.")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "of another kind than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "brings whole layers of its own"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "on a layer of type Embedding"),
        ({"lora_bias": True}, "has biases"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_adapters_of_other_kinds_stay_apart(tmp_path, settings, reason):
    model = with_adapters(tmp_path, ranks={"a": 4, "b": 3}, settings=settings)
    assert kinds_of(model) == [("alone", (place,)) for place in range(4)]
    assert all(reason in group.reason for group in model.reader.groups[1:])
    with pytest.raises(BadSetting, match=reason):
        model.one_pass = True


def test_hooks_keep_members_apart_or_are_refused():
    base, seen = tiny.make(seed=1), []
    expert = tiny.tuned(base, 3)
    hook = base.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    model = FusedCausalLM.from_members(tiny.make(seed=0), base, {"m": expert}, tokenizer=tiny.make_tokenizer())
    assert model.reader.groups[1].reason == "it has forward hooks"
    hook.remove()
    model.one_pass = True
    model.members.experts["m"].model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    seen.clear()
    with pytest.raises(BadSetting, match=r"(?s)has forward hooks.*one_pass=False"):
        model(torch.tensor([[7, 8]]))
    model.one_pass = False  # the fix
    seen.clear()
    model(torch.tensor([[7, 8]]))
    assert seen == [1]


def patch(module):
    """Puts a forward into a module, as accelerate does; returns it and how often it was called."""
    calls, honest = [], module.forward

    def forward(*args, **kwargs):
        calls.append(args)
        found = honest(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    module.forward = forward
    return forward, calls


def test_a_forward_put_into_a_large_layer_is_called_and_stays():
    base = tiny.make(seed=1, width=128)
    model = FusedCausalLM.from_members(
        tiny.make(seed=0), base, {"m": tiny.tuned(base, 3)}, tokenizer=tiny.make_tokenizer(), one_pass=False
    )
    layer, ids = base.model.layers[0].self_attn.q_proj, torch.tensor([[7, 8, 9]])
    assert layer in model.reader.groups[1]._forward_fn._forwards  # one of ours would stand in for it
    before = model(ids).logits
    forward, calls = patch(layer)
    found = model(ids).logits
    assert len(calls) == 1
    assert vars(layer)["forward"] is forward
    assert not torch.allclose(found, before, atol=1e-3)
    del layer.forward
    torch.testing.assert_close(model(ids).logits, before)


def test_a_forward_that_is_put_there_while_a_lane_reads_stays():
    layer = torch.nn.Linear(3, 3)
    with linears.patched({layer: linears.FewRows(layer)}):
        layer.forward = forward = lambda x: x
    assert vars(layer)["forward"] is forward


@pytest.mark.parametrize("place", ["lm_head", "model.layers.0.self_attn"], ids=["with weights", "without"])
@pytest.mark.parametrize("kind", ["stacked", "adapters"])
def test_forwards_put_into_modules_keep_members_apart_or_are_refused(tmp_path, kind, place):
    model = fuse(one_pass=True) if kind == "stacked" else with_adapters(tmp_path, one_pass=True)
    assert model.reader.groups[1].kind == kind
    ids, body = torch.tensor([[7, 8]]), model.members.base.model
    before = model(ids).logits
    forward, _ = patch(body.get_submodule(place))
    with pytest.raises(BadSetting, match=r"(?s)has forwards that another library replaced.*one_pass=False"):
        model(ids)
    assert vars(body.get_submodule(place))["forward"] is forward
    model.one_pass = "auto"
    assert "it has forwards that another library replaced" in model.reader.groups[1].reason
    with pytest.raises(BadSetting, match="forwards that another library replaced"):
        model.one_pass = True
    del body.get_submodule(place).forward
    model.one_pass = True
    torch.testing.assert_close(model(ids).logits, before)


def test_a_joint_forward_that_differs_is_not_used(monkeypatch):
    right = stacking.StackedNorm.__call__
    monkeypatch.setattr(stacking.StackedNorm, "__call__", lambda self, x: right(self, x) * 1.1)
    assert fuse().reader.groups[1].reason == "a joint forward gives other logits"
    monkeypatch.setattr(stacking.StackedNorm, "__call__", lambda self, x: x.view(-1))
    assert "a joint forward fails" in fuse().reader.groups[1].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ["stacked", "adapters"])
def test_copies_that_get_one_anothers_weights_are_not_used(tmp_path, monkeypatch, kind, dtype):
    """Also where one run differs from another by less than a joint forward may differ, as young adapters do."""
    model = fuse(one_pass=False) if kind == "stacked" else with_adapters(tmp_path, one_pass=False)
    math, facts = ("math", "facts") if kind == "stacked" else ("a", "b")
    with torch.no_grad():
        bring_near(model, math, facts, kind)
    for body in model.bodies:
        body.to(dtype)
    model.one_pass = True  # an honest forward is used
    assert model.reader.groups[1].kind == kind
    swap_the_first_two_experts(monkeypatch, kind)
    monkeypatch.setattr(grouping, "MOST_DIFFERENCE", dict.fromkeys(grouping.MOST_DIFFERENCE, 10.0))
    model.one_pass = "auto"
    assert model.reader.groups[1].reason == "a joint forward mixes its runs up"


def bring_near(model, first, second, kind):
    """The second expert becomes the first but for a few per cent of what that has learned."""
    if kind == "stacked":
        ours, theirs = (dict(model.members.experts[name].model.named_parameters()) for name in (first, second))
        pairs = [(ours[name], theirs[name]) for name in ours]
    else:
        named = dict(model.members.base.model.named_parameters())
        pairs = [(part, named[name.replace(f".{first}.", f".{second}.")]) for name, part in named.items()]
    for ours, theirs in pairs:
        theirs.copy_(ours + NEAR * (theirs - ours))


def swap_the_first_two_experts(monkeypatch, kind):
    """Each of the two gets the other's weights in a joint forward: runs 1 and 2 of the group, behind the base."""
    right = grouping.ForwardGroup.read

    def read(self, feeds, *rest):
        found = right(self, feeds, *rest)
        return found if self.kind != kind else [found[0], found[2], found[1], *found[3:]]

    monkeypatch.setattr(grouping.ForwardGroup, "read", read)


def test_modules_of_unknown_kinds_keep_models_apart(monkeypatch):
    class Odd(torch.nn.Linear):
        """A linear layer that may do anything."""

    base = tiny.make(seed=1)
    base.lm_head.__class__ = Odd
    model = FusedCausalLM.from_members(
        tiny.make(seed=0), base, {"m": tiny.tuned(base, 3)}, tokenizer=tiny.make_tokenizer()
    )
    assert model.reader.groups[1].reason == "there is no stacked form of Odd"


# ---- products on few rows


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_quick_products_are_torchs(rows, with_bias, monkeypatch):
    monkeypatch.setattr(linears, "ONEDNN_PAYS", 0)
    monkeypatch.setattr(linears, "PARTS_PAY", 0)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, rows, 96), (200, 96), (200,)))
    shift = bias if with_bias else None
    for inputs in (x, x[:1], x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2), x[0, 0], x.bfloat16()):
        table = weight.to(inputs.dtype)
        one = None if shift is None else shift.to(inputs.dtype)
        found = linears.linear(inputs, table, one)
        torch.testing.assert_close(found, torch.nn.functional.linear(inputs, table, one), atol=1e-3, rtol=1e-3)


def test_large_linear_layers_take_quick_products_while_a_lane_reads(monkeypatch):
    model = fuse(one_pass=False)
    ids = model.encode(PROMPTS)
    plain = model(**ids).logits
    calls = []
    monkeypatch.setattr(linears, "ONEDNN_PAYS", 64)
    quick = linears.linear
    monkeypatch.setattr(linears, "linear", lambda *args: calls.append(args) or quick(*args))
    model.one_pass = False  # looks at the sizes again, and at the members
    calls.clear()
    torch.testing.assert_close(model(**ids).logits, plain, atol=1e-3, rtol=1e-3)
    assert len(calls) == 3 * 7 + 1 + 3 * (2 * 7 + 1)


@torch.no_grad()
def test_the_number_of_rows_and_the_size_choose_the_product(monkeypatch):
    taken = []
    monkeypatch.setattr(linears, "_in_parts", lambda x, *rest: taken.append("parts") or x)
    monkeypatch.setattr(linears, "has_onednn", lambda: taken.append("onednn?") and False)
    for rows, height, width in (
        (1, 512, 512),
        (2, 512, 512),
        (3, 512, 512),
        (1, 64, 64),
        (1, 513, 1024),
        (1, 64, 8192),
    ):
        taken.append((rows, height, width))
        linears.linear(torch.ones(rows, width), torch.ones(height, width))
    assert taken == [
        *((1, 512, 512), "parts"),
        *((2, 512, 512), "parts"),
        (3, 512, 512),
        (1, 64, 64),
        (1, 513, 1024),
        (1, 64, 8192),
    ]
    linears.linear(torch.ones(4, 512), torch.ones(512, 512))
    assert taken[-1] == "onednn?"


def test_gradients_take_torchs_own_products(monkeypatch):
    monkeypatch.setattr(linears, "ONEDNN_PAYS", 0)
    monkeypatch.setattr(linears, "PARTS_PAY", 0)
    weight = torch.randn(8, 3, requires_grad=True)
    linears.linear(torch.ones(2, 3), weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((8, 3), 2.0))


# ---- memory


def test_two_fused_models_share_stacked_members():
    """Each reading by another of them copies the stack: the price of one memory for members that lie in two stacks."""
    base = tiny.make(seed=1)
    math, facts, strong = tiny.tuned(base, 10), tiny.tuned(base, 11), tiny.make(seed=0)
    options = {"tokenizer": tiny.make_tokenizer(), "one_pass": True}
    both = FusedCausalLM.from_members(strong, base, {"math": math, "facts": facts}, **options)
    one = FusedCausalLM.from_members(strong, base, {"math": math}, **options)
    other = FusedCausalLM.from_members(strong, base, {"facts": facts}, **options)  # lies apart from the base
    ids = torch.tensor([[7, 8, 9]])
    found, sizes = [], []
    for model in (both, one, other, both):
        found.append(model(ids).logits)
        sizes.append(facts.lm_head.weight.untyped_storage().nbytes() // facts.lm_head.weight.nbytes)
    assert sizes == [3, 3, 2, 3], "the last model that was read holds the stack"
    torch.testing.assert_close(found[0], found[3])
    for model, logits in zip((both, one, other), found[:3], strict=True):
        model.one_pass = False
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_two_prompts_lies_in_memory_once(tmp_path):
    base = tiny.make(seed=1)
    base.save_pretrained(tmp_path / "base")
    places = save_adapters(base, "llama", tmp_path, {"a": 4, "b": 4})
    experts = {"a": places["a"], "again": places["a"], "b": places["b"]}
    model = FusedCausalLM.from_members(
        tiny.make(seed=0),
        tmp_path / "base",
        experts,
        tokenizer=tiny.make_tokenizer(),
        prompts={"again": "Q: {prompt}", "b": "{prompt}?"},
        one_pass=True,
    )
    assert kinds_of(model)[1] == ("adapters", (1, 2, 3, 4))
    body = model.members.base.model
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in body.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in body.parameters())
    check_generations(model)
