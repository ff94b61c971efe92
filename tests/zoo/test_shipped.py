"""The zoo as it ships: every file is what was built, and every model opens with its own tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import zoo
from trimtab.studies.models import load_alone
from trimtab.zoo.store import check_files

MODELS = list(zoo.read_manifest()["models"])
FULL = [name for name in MODELS if not name.endswith("-lora") and (name == "strong" or not name.startswith("strong/"))]
ADAPTERS = [name for name in MODELS if name not in FULL]
TEXT = "Q: Grace has 60 coins.\nA: 60-39=21. #### 21"
LARGEST_SHIPPED = 40_000_000  # bytes of weights


@pytest.fixture(autouse=True)
def shipped(monkeypatch):
    monkeypatch.delenv("TRIMTAB_ZOO", raising=False)


def test_the_shipped_zoo_has_all_the_models_of_both_pairs():
    tuned = [*zoo.TUNED_TASKS, "mixed"]
    sizes = ("small", "medium")
    assert set(FULL) == {"strong", *sizes, *(f"{size}/{task}" for size in sizes for task in tuned)}
    ceilings, adapters = (f"strong/{task}" for task in tuned), (f"small/{task}-lora" for task in zoo.TUNED_TASKS)
    assert set(ADAPTERS) == {*ceilings, *adapters}


def test_every_file_is_what_was_built_and_none_is_missing_or_left_over():
    checks = check_files()
    assert [check for check in checks if not check.is_intact] == []
    home = zoo.root()
    there = {str(f.relative_to(home)) for part in ("tokenizer", "items", "models") for f in (home / part).rglob("*.*")}
    assert there == {check.path for check in checks}


def test_the_weights_fit_into_forty_megabytes():
    weights = [check for check in check_files() if check.path.endswith(".safetensors")]
    assert 30_000_000 < sum(check.size_bytes for check in weights) < LARGEST_SHIPPED


def test_the_first_page_says_how_large_the_zoo_is():
    weights = sum(check.size_bytes for check in check_files() if check.path.endswith(".safetensors"))
    folder = sum(file.stat().st_size for file in zoo.root().rglob("*") if file.is_file())
    page = (Path(__file__).parents[2] / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert f"{weights / 1e6:.1f} MB of bf16 weights; {folder / 2**20:.1f} MiB on disk" in " ".join(page.split())


@pytest.mark.parametrize("name", FULL)
def test_a_full_model_opens_with_its_own_tokenizer_which_is_that_of_the_strong_one(name: str):
    path = zoo.resolve(f"zoo:{name}")
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    own, strong = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(zoo.resolve("zoo:strong"))
    assert own.get_vocab() == strong.get_vocab()
    assert json.loads(own.backend_tokenizer.to_str()) == json.loads(strong.backend_tokenizer.to_str())
    assert own.special_tokens_map == strong.special_tokens_map
    assert own.chat_template == strong.chat_template
    token_ids = own(TEXT, return_tensors="pt")["input_ids"]
    assert own.decode(token_ids[0]) == TEXT
    with torch.inference_mode():
        logits = model(input_ids=token_ids).logits
    assert logits.shape == (1, token_ids.shape[1], len(own))
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_opens_on_its_base_and_changes_it(name: str):
    token_ids = AutoTokenizer.from_pretrained(zoo.resolve("zoo:tokenizer"))(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tuned, plain = (load_alone(n)(input_ids=token_ids).logits for n in (name, name.partition("/")[0]))
    assert tuned.isfinite().all()
    assert float((tuned - plain).abs().max()) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_bfloat16_safetensors(name: str):
    (file,) = zoo.resolve(f"zoo:{name}").glob("*.safetensors")
    with safe_open(file, framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118 - no mapping


# --- items bound to the style of their task -----------------------------------------------------------------------


def test_bound_items_keep_their_truth_and_lose_other_styles():
    for task in ("truth", "domains"):
        items = zoo.load_items(task, "validation")
        for item, bound in zip(items, zoo.in_own_style(task, items), strict=True):
            assert (bound.id, bound.choices, bound.label) == (item.id, item.choices, item.label)
            assert bound.prompt.startswith("Careful study shows that ")
            assert "Q:" not in bound.prompt
            assert "{" not in bound.prompt
            assert not bound.prompt.endswith(" ")
    items = zoo.load_items("facts", "validation")
    for item, bound in zip(items, zoo.in_own_style("facts", items), strict=True):
        assert bound.prompt == item.prompt
        assert bound.choices[bound.label] == item.target
        assert len(set(bound.choices)) == len(bound.choices) >= 16


def test_the_openings_of_bound_answers_are_read_off_the_question():
    """The target's opening is among them, and nothing that the question does not say."""
    for task in ("arithmetic", "summary"):
        items = zoo.load_items(task, "validation")
        for item, bound in zip(items, zoo.in_own_style(task, items), strict=True):
            assert bound.prompt == item.prompt
            assert bound.label is None
            assert any(item.target.startswith(opening) for opening in bound.choices)
            assert all(opening.removesuffix(", a").strip() in item.prompt for opening in bound.choices)
            assert len(bound.choices) == (1 if task == "arithmetic" else 3)


def test_items_of_another_world_are_refused():
    from dataclasses import replace

    from trimtab.core.errors import InputError

    (item,) = zoo.load_items("facts", limit=1)
    with pytest.raises(InputError, match="the world does not have"):
        zoo.in_own_style("facts", [replace(item, prompt="Q: When was Nobody born?\nA:")])
