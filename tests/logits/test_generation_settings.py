"""The strong model's generation_config.json is the fused model's, is saved and read; a call's own come first."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import UnreadableModel

MAKERS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [10, 11],
    "max_new_tokens": 5,
}
IDS = torch.tensor([[5, 6, 7, 5, 6]])
ALPHA0 = {"amount": "static", "chooser": "sum", "settings": {"alpha": 0.0}}


@pytest.fixture(scope="module")
def members():
    base = tiny.make(seed=1)
    strong = tiny.make(seed=0, width=48)
    strong.generation_config.update(**MAKERS)
    return strong, base, {"math": tiny.tuned(base, 10)}


@pytest.fixture(scope="module")
def directories(members, tmp_path_factory):
    """strong, base, math with their files, and the fused directory beside them."""
    folder = tmp_path_factory.mktemp("settings")
    strong, base, experts = members
    for name, model in {"strong": strong, "base": base, **experts}.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    fused = FusedCausalLM.from_members(folder / "strong", folder / "base", {"math": folder / "math"}, ALPHA0)
    fused.save_pretrained(folder / "fused")
    return folder


def held(model):
    return {name: getattr(model.generation_config, name) for name in MAKERS}


def drawn(model, **options):
    torch.manual_seed(3)
    return model.generate(IDS, **options).tolist()


@pytest.mark.parametrize("options", [{}, {"speculate": 0}, {"speculate": 3, "do_sample": False}])
def test_without_arguments_the_strong_models_settings_rule(members, options):
    fused = FusedCausalLM.from_members(*members, ALPHA0, tiny.make_tokenizer())
    assert held(fused) == MAKERS
    alone = {name: value for name, value in options.items() if name == "do_sample"}
    assert drawn(fused, **options) == drawn(members[0], **alone)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0, "max_new_tokens": 7},
        {"do_sample": False},
        {"generation_config": GenerationConfig(max_new_tokens=9, top_k=3)},
        {"repetition_penalty": 1.0, "suppress_tokens": None, "top_k": 0, "min_p": 0.0, "temperature": 1.5},
    ],
    ids=["temperature", "greedy", "configuration", "off"],
)
def test_what_a_call_says_comes_first_as_in_transformers(members, options):
    fused = FusedCausalLM.from_members(*members, ALPHA0, tiny.make_tokenizer())
    assert drawn(fused, speculate=0, **options) == drawn(members[0], **options)
    assert drawn(fused, speculate=0, **options) != drawn(fused, speculate=0)


def test_the_settings_are_saved_and_read(directories, tmp_path):
    fused = FusedCausalLM.from_pretrained(directories / "fused")
    assert held(fused) == MAKERS
    fused.generation_config.update(temperature=0.9, top_k=None)
    fused.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert held(again) == MAKERS | {"temperature": 0.9, "top_k": None}
    assert GenerationConfig.from_pretrained(tmp_path / "again").temperature == 0.9


def test_a_file_that_its_user_changed_is_followed(directories, tmp_path):
    FusedCausalLM.from_pretrained(directories / "fused").save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "generation_config.json"
    file.write_text(json.dumps({"max_new_tokens": 2, "eos_token_id": [1, 9]}))
    fused = FusedCausalLM.from_pretrained(tmp_path / "mine")
    assert len(drawn(fused)[0]) == IDS.shape[1] + 2
    assert fused.generation_config.eos_token_id == [1, 9]
    assert fused.generation_config.pad_token_id == 0, "what the file leaves out follows from the members"
    given = FusedCausalLM.from_pretrained(tmp_path / "mine", generation_config=GenerationConfig(max_new_tokens=4))
    assert (given.generation_config.max_new_tokens, given.generation_config.eos_token_id) == (4, 1)
    file.unlink()
    assert held(FusedCausalLM.from_pretrained(tmp_path / "mine")) == MAKERS, "an older directory has no such file"
    file.write_text("{no")
    with pytest.raises(UnreadableModel, match=r"generation_config\.json' cannot be read.*\n.*\n.*delete it"):
        FusedCausalLM.from_pretrained(tmp_path / "mine")


def test_settings_that_contradict_one_another_are_saved_all_the_same(members, tmp_path, directories):
    """As of Llama 2: a temperature, and nothing is sampled."""
    fused = FusedCausalLM.from_pretrained(directories / "fused")
    fused.generation_config.update(do_sample=False, temperature=0.6)
    fused.save_pretrained(tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "generation_config.json").read_text())["temperature"] == 0.6


def test_settings_of_one_models_memory_are_not_taken_over(members):
    strong, base, experts = members
    settings = GenerationConfig(cache_implementation="offloaded", output_attentions=True, prefill_chunk_size=4)
    before, strong.generation_config = strong.generation_config, settings
    try:
        fused = FusedCausalLM.from_members(strong, base, experts, ALPHA0, tiny.make_tokenizer())
    finally:
        strong.generation_config = before
    assert len(drawn(fused, max_new_tokens=3)[0]) == IDS.shape[1] + 3
    assert settings.cache_implementation == "offloaded", "the member's own settings stay as they are"


def test_lines_of_the_readme_give_what_generate_text_gives(directories):
    """A tokenizer pads on the right unless told: generation would go on behind the padding."""
    from transformers import AutoTokenizer

    fused, tokenizer = (kind.from_pretrained(directories / "fused") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.padding_side == fused.tokenizer.padding_side == "left"
    prompts = ["Where does Ada live?", "Q: 12+7", "Hm"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = fused.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == fused.generate_text(prompts, **options)


def test_a_directory_from_before_is_padded_on_the_left_and_a_given_tokenizer_stays_as_it_is(directories, tmp_path):
    fused = FusedCausalLM.from_pretrained(directories / "fused")
    fused.save_pretrained(tmp_path / "old")
    given = tiny.make_tokenizer()
    given.padding_side = "right"
    given.save_pretrained(tmp_path / "old")
    assert FusedCausalLM.from_pretrained(tmp_path / "old").tokenizer.padding_side == "left"
    members = (fused.members.strong.model, fused.members.base.model, {"math": fused.members.experts["math"].model})
    assert FusedCausalLM.from_members(*members, tokenizer=given).tokenizer.padding_side == "left"
    assert given.padding_side == "right"
