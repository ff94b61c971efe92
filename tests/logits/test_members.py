"""References become members: each directory is loaded once, each model is read once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fusing import PROMPTS, check_same_tokens, new_tokens
from trimtab import FusedCausalLM, zoo
from trimtab.core.errors import UnknownName
from trimtab.models.loading import Placement, remaining_memory


def test_a_directory_in_two_roles_is_loaded_and_read_once(members_dir):
    strategy = {"amount": "static", "settings": {"alpha": 1.0}}
    model = FusedCausalLM.from_members(
        members_dir / "base", members_dir / "base", {"math": members_dir / "math"}, strategy
    )
    assert model.members.strong.model is model.members.base.model
    assert len(model.reader.runs) == 2
    assert len(model.bodies) == 2
    inputs, ids = new_tokens(model, PROMPTS)
    expert = AutoModelForCausalLM.from_pretrained(members_dir / "math")
    expected = expert.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    check_same_tokens(model, ids, expected, inputs)


def test_the_tokenizer_beside_a_member_is_used(members_dir):
    model = FusedCausalLM.from_members(members_dir / "strong", members_dir / "base", {"math": members_dir / "math"})
    assert model.tokenizer.get_vocab() == tiny.make_tokenizer().get_vocab()
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (2, 1, 0)


def test_number_types_per_member(members_dir):
    model = FusedCausalLM.from_members(
        members_dir / "strong", members_dir / "base", {"math": members_dir / "math"}, dtype={"strong": torch.bfloat16}
    )
    assert [member.model.dtype for member in model.members] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_a_placement_of_a_member_that_is_not_there_is_refused(members_dir, setting):
    members = members_dir / "strong", members_dir / "base", {"math": members_dir / "math"}
    value = torch.bfloat16 if setting == "dtype" else "cpu"
    message = rf"(?s)no member \(in {setting}\) 'stron'.*Known: base, math, strong\..*did you mean 'strong'"
    with pytest.raises(UnknownName, match=message):
        FusedCausalLM.from_members(*members, **{setting: {"base": value, "stron": value}})
    FusedCausalLM.from_members(*members, **{setting: {"base": value, "strong": value, "math": value}})


def test_a_device_for_all_may_be_given_as_transformers_writes_it():
    placement = Placement(device={"": "meta"})
    placement.check_names(("strong", "base", "math"))
    assert {placement.device_of(name) for name in ("strong", "base", "math")} == {"meta"}
    with pytest.raises(UnknownName, match=r"no member \(in dtype\) ''"):
        Placement(dtype={"": torch.float32}).check_names(("strong", "base"))


def test_a_text_ends_where_any_member_ends_it():
    base = tiny.make(seed=1)
    expert = tiny.tuned(base, 2)
    expert.generation_config.eos_token_id = [1, 40]
    model = FusedCausalLM.from_members(base, base, {"chat": expert}, "static", tiny.make_tokenizer())
    assert model.config.eos_token_id == [1, 40]
    _, ids = new_tokens(model, "Q", max_new_tokens=60)
    ends = [at for at, token in enumerate(ids[0].tolist()) if token in (1, 40)]
    assert not ends or ends[0] == ids.shape[1] - 1


def test_embedded_models_are_computed_in_float32():
    members = ("zoo:medium", "zoo:small", {"facts": "zoo:small/facts-lora"})
    model = FusedCausalLM.from_members(*members)
    assert {member.model.dtype for member in model.members} == {torch.float32}
    prompts = [item.prompt for item in zoo.load_items("facts", limit=8)]
    inputs, ids = new_tokens(model, prompts)
    check_same_tokens(model, ids, new_tokens(model, prompts, use_cache=False)[1], inputs)
    for row, prompt in enumerate(prompts[:3]):
        single, alone = new_tokens(model, prompt)
        check_same_tokens(model, ids[row : row + 1], alone, single)
    narrow = FusedCausalLM.from_members(*members, dtype=torch.bfloat16)
    assert {member.model.dtype for member in narrow.members} == {torch.bfloat16}


def test_an_adapter_on_the_embedded_strong_model_is_a_member():
    model = FusedCausalLM.from_members("zoo:strong/facts", "zoo:strong", {"facts": "zoo:strong/facts"}, "static")
    assert len(model.bodies) == 1
    assert len(model.reader.runs) == 2
    assert model.generate_text(zoo.load_items("facts", limit=1)[0].prompt, max_new_tokens=4)


def test_members_that_are_spread_share_one_limit_of_memory():
    model = tiny.make(seed=1)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert remaining_memory({"cpu": "1MB", 0: 100}, [model, model]) == {"cpu": 1_000_000 - 2 * size, 0: 100}
    assert remaining_memory({"cpu": 10}, [model]) == {"cpu": 0}
