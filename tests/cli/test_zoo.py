"""zoo info and zoo check."""

import json
import os
import shutil
from pathlib import Path

import pytest

from trimtab import zoo
from trimtab.studies.regime.criteria import TaskRegime, as_markdown


@pytest.fixture
def copied(tmp_path: Path, monkeypatch) -> Path:
    """The shipped zoo under another name, its files linked: replace them, never write into them."""
    home = tmp_path / "zoo"
    shutil.copytree(zoo.root(), home, copy_function=os.symlink)
    monkeypatch.setenv("TRIMTAB_ZOO", str(home))
    return home


def test_info_of_an_intact_zoo(run, copied: Path) -> None:
    ran = run("zoo", "info", "--json")
    assert ran.code == 0
    assert ran.json()["result"]["folder"] == str(copied)
    assert ran.json()["result"]["damaged"] == []
    assert ran.json()["result"]["items"]["truth"]["validation"] == 120
    assert "every checksum is right" in run("zoo", "info").out


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_info_fails_and_lists_what_is_damaged(run, copied: Path, words: list[str]) -> None:
    weights = copied / "models" / "small" / "facts" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (copied / "items" / "truth-test.jsonl").unlink()
    ran = run("zoo", "info", *words)
    assert ran.code == 1
    for name in ("models/small/facts/model.safetensors", "items/truth-test.jsonl"):
        assert name in ran.err
        assert name in ran.out.replace("\n", "")
    assert "2 file(s)" in ran.err
    if words:
        assert sorted(json.loads(ran.out)["result"]["damaged"]) == [
            "items/truth-test.jsonl",
            "models/small/facts/model.safetensors",
        ]


@pytest.mark.slow
def test_check_counts_the_items_of_each_task_and_judges_every_demand(run, tmp_path: Path, monkeypatch) -> None:
    """truth is cut to fewer items than are asked for, as the shipped one is below 240."""
    load = zoo.load_items

    def few(task: str, split: str = "test", *, limit: int | None = None, seed: int = 0) -> list:
        return load(task, split, limit=1 if task == "truth" and split == "validation" else limit)

    monkeypatch.setattr(zoo, "load_items", few)
    page = tmp_path / "zoo.md"
    ran = run("zoo", "check", "--items", "3", "-o", page, "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert found["settings"]["items"] == {"arithmetic": 3, "facts": 3, "truth": 1, "summary": 3, "domains": 3}
    for pair in ("far", "close"):
        tasks, demands = found["result"][pair]["tasks"], found["result"][pair]["criteria"]
        assert [task["items"] for task in tasks] == [3, 3, 1, 3, 3]
        assert all(task["forced"] is not None and task["base_forced"] is not None for task in tasks)
        assert [task["few_shot"] is None for task in tasks] == [False] * 4 + [True]
        assert [demand["name"] for demand in demands] == [
            "Room",
            "Knowledge",
            "Poor formats",
            "Latent skill",
            "Both kinds",
        ]
        regimes = [TaskRegime(**task) for task in tasks]
        lines = as_markdown({pair: regimes}).splitlines()
        assert set(lines) <= set(page.read_text().splitlines())
        assert sum("**met**" in line or "**NOT MET**" in line for line in lines) == 5
        assert any(line.startswith("| truth | 1 |") for line in lines)


def test_check_fails_where_no_room_is_left(run, monkeypatch) -> None:
    """Every model at the ceiling: nothing can be transferred, and the command says in which pair."""
    from trimtab.studies.regime import criteria

    def full(panel, task, items, is_tuned, few_shot=None, forced=None) -> TaskRegime:
        return TaskRegime(task.name, len(items), 0.0, 0.0, 0.0, 100.0, 100.0, 0.0, 0.0, 0.0, 100.0)

    monkeypatch.setattr(criteria, "task_regime", full)
    monkeypatch.setattr("trimtab.studies.models.load_alone", lambda name: FakeModel)
    ran = run("zoo", "check", "--items", "2")
    assert ran.code == 1
    assert "nothing to transfer in the far and the close pair" in ran.err
    assert ran.out.count("Room (") == 2
    assert ran.out.count("**NOT MET**") >= 2


class FakeModel:
    class config:
        max_position_embeddings = 256
