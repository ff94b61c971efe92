"""A quick zoo from beginning to end: made, stopped, resumed, opened, damaged and found out."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import zoo
from trimtab.core.errors import UnknownName, UnreadableModel
from trimtab.zoo.build import QUICK_PLAN, build
from trimtab.zoo.store import check_files
from trimtab.zoo.tasks import read_items
from trimtab.zoo.training import Recipe, Size, make_model, pretrain

pytestmark = pytest.mark.thorough  # a build trains models
PLAN = replace(QUICK_PLAN, tokens=60_000)


@contextmanager
def silent(what, steps):
    yield lambda done, loss: None


@pytest.fixture(scope="module")
def quick_zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    build(folder, PLAN, silent)
    return folder


@pytest.fixture
def in_use(quick_zoo, monkeypatch):
    monkeypatch.setenv("TRIMTAB_ZOO", str(quick_zoo))
    return quick_zoo


def test_every_member_opens(in_use):
    for name in zoo.names():
        path = zoo.resolve(f"zoo:{name}")
        if (path / "config.json").exists():
            AutoModelForCausalLM.from_pretrained(path)
        elif name != "tokenizer":
            adapter = json.loads((path / "adapter_config.json").read_text())
            assert adapter["base_model_name_or_path"] == f"zoo:{name.partition('/')[0]}"
    assert {"small", "medium", "strong", "small/facts", "small/facts-lora", "strong/mixed"} <= set(zoo.names())


def test_a_finished_build_makes_nothing_again(quick_zoo):
    made = []

    @contextmanager
    def record(what, steps):
        made.append(what)
        yield lambda done, loss: None

    before = json.loads((quick_zoo / "manifest.json").read_text())
    assert before["models"]["strong"]["again"]["steps"] == PLAN.again.steps
    build(quick_zoo, PLAN, record)
    assert made == ["corpus"]
    assert json.loads((quick_zoo / "manifest.json").read_text()) == before


def test_another_recipe_is_made_anew(quick_zoo, tmp_path):
    made = []

    @contextmanager
    def record(what, steps):
        made.append(what)
        yield lambda done, loss: None

    import shutil

    copy = tmp_path / "zoo"
    shutil.copytree(quick_zoo, copy)
    tuning = tuple((task, replace(recipe, steps=3) if task == "facts" else recipe) for task, recipe in PLAN.tuning)
    build(copy, replace(PLAN, tuning=tuning), record)
    assert made == ["corpus", "strong/facts", "medium/facts", "small/facts", "small/facts-lora"]


def test_damage_is_found(quick_zoo, tmp_path):
    import shutil

    copy = tmp_path / "zoo"
    shutil.copytree(quick_zoo, copy)
    assert all(check.is_intact for check in check_files(copy))
    path = copy / "models" / "small" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (copy / "items" / "facts-test.jsonl").unlink()
    damaged = {check.path for check in check_files(copy) if not check.is_intact}
    assert damaged == {"models/small/base/model.safetensors", "items/facts-test.jsonl"}


def test_items_and_unknown_names(in_use):
    items = zoo.load_items("facts", "test")
    assert items == read_items(zoo.items_path("facts", "test"))
    assert zoo.load_items("facts", limit=3) == items[:3]
    shuffled = zoo.load_items("facts", seed=1)
    assert shuffled != items
    assert sorted(item.id for item in shuffled) == sorted(item.id for item in items)
    with pytest.raises(UnknownName, match="did you mean 'facts'"):
        zoo.items_path("fact")
    with pytest.raises(UnknownName, match="did you mean 'small/facts'"):
        zoo.resolve("zoo:small/fact")


def test_a_folder_without_a_zoo_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_ZOO", str(tmp_path))
    with pytest.raises(UnreadableModel, match="trimtab zoo build"):
        zoo.names()


def test_a_stopped_pretraining_goes_on_to_the_same_weights(quick_zoo, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(quick_zoo / "tokenizer")
    rows = torch.randint(2, len(tokenizer), (40, 16), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    recipe, checkpoint = Recipe(500, 1e-3, 2), tmp_path / "a.checkpoint"

    def stop_at_300(step, loss):
        if step == 300:
            raise KeyboardInterrupt

    whole, parts = (make_model(Size(16, 1), tokenizer, seed=0) for _ in range(2))
    pretrain(whole, rows, recipe, seed=0, progress=lambda step, loss: None)
    with pytest.raises(KeyboardInterrupt):
        pretrain(parts, rows, recipe, seed=0, progress=stop_at_300, checkpoint=checkpoint)
    resumed = make_model(Size(16, 1), tokenizer, seed=5)
    pretrain(resumed, rows, recipe, seed=0, progress=lambda step, loss: None, checkpoint=checkpoint)
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    assert not checkpoint.exists()


def test_the_chat_template_asks_like_the_tasks_do(quick_zoo):
    tokenizer = AutoTokenizer.from_pretrained(quick_zoo / "tokenizer")
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ben"},
        {"role": "user", "content": "Why?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "Q: Who?\nA: Ben\nQ: Why?\nA:"
    assert tokenizer.tokenize("12") == ["1", "2"]
