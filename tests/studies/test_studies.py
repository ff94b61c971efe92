"""The table of studies: each runs by its name, a new one costs one file, the second one stays small."""

import copy
import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

import tiny
from trimtab import studies, zoo
from trimtab.cli.main import main
from trimtab.core.errors import UnknownName
from trimtab.measure.comparison import Comparison, Parts
from trimtab.studies import STUDIES, comparing, find_study
from trimtab.studies.models import distinct, draw_items
from trimtab.studies.task_arithmetic.study import HEAD, LOOKS, merge

FOLDER = Path(studies.__file__).parent


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_promises_and_its_example_can_be_read(name: str) -> None:
    study = find_study(name)
    assert study.__doc__
    parser = ArgumentParser()
    study.add_arguments(parser)
    words = study.EXAMPLE.split()
    assert words[:3] == ["trimtab", "study", name]
    assert parser.parse_args(words[3:]).force is False


def test_an_unknown_study_has_a_nearest_spelling() -> None:
    with pytest.raises(UnknownName, match="regmie") as caught:
        find_study("regmie")
    assert "did you mean 'regime'?" in caught.value.fix


STUDY = '''"""Counts what it is told to count."""
from trimtab.measure.tables import Cell, Grid, Row
from trimtab.studies import Outcome
EXAMPLE = "trimtab study counting --up-to 2"
def add_arguments(parser):
    parser.add_argument("--up-to", type=int, default=2)
    parser.add_argument("--force", action="store_true")
def run(args, tools):
    rows = tuple(Row(str(n), f"line {n}", (Cell(str(n * n)),)) for n in range(args.up_to))
    failure = "three is too many" if args.up_to == 3 else ""
    return Outcome({"result": args.up_to}, [Grid("Squares", ("square",), rows)], failure)
'''


def test_a_study_of_another_package_runs_by_its_name(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "counting_study.py").write_text(STUDY)
    about = tmp_path / "counting-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[trimtab.studies]\ncounting = counting_study\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["study", "counting", "--up-to", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Squares" in shown
    assert "line 1" in shown
    assert main(["study", "counting", "--up-to", "3", "--json"]) == 1
    captured = capsys.readouterr()
    assert "three is too many" in captured.err
    assert '"result": 3' in captured.out
    assert main(["study", "--help"]) == 0
    assert "Counts what it is told to count." in capsys.readouterr().out
    sys.modules.pop("counting_study")


def test_the_second_study_costs_less_than_150_lines() -> None:
    lines = [
        line
        for file in (FOLDER / "task_arithmetic").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert 50 < len(lines) < 150


def test_items_of_several_draws_stand_once_and_know_their_first_draw() -> None:
    draws = draw_items(["facts"], 300, [3, 4])
    items, seeds = distinct(draws)
    ids = [item.id for item in items["facts"]]
    assert len(set(ids)) == len(ids) < 600
    assert set(ids) == {item.id for drawn in draws.values() for item in drawn["facts"]}
    assert [seeds[item.id] for item in draws[3]["facts"]] == [3] * 300
    assert {seeds[item] for item in ids} == {3, 4}


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_models():
    base = tiny.make("llama")
    experts = [copy.deepcopy(base) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return base, experts


def test_merging_adds_scaled_task_vectors_to_every_parameter(small_models) -> None:
    base, experts = small_models
    merged, untouched = merge(base, experts, 0.5), merge(base, experts, 0.0)
    for name, parameter in merged.named_parameters():
        own = base.get_parameter(name)
        expected = own + 0.5 * sum(expert.get_parameter(name) - own for expert in experts)
        torch.testing.assert_close(parameter, expected)
        assert torch.equal(untouched.get_parameter(name), own)
    torch.testing.assert_close(merge(base, experts[:1], 1.0).lm_head.weight, experts[0].lm_head.weight)


def test_the_control_has_the_norm_of_the_task_vector_and_another_direction(small_models) -> None:
    base, experts = small_models
    merged, control = merge(base, experts, 1.0), merge(base, experts, 1.0, seed=0)
    for name, parameter in control.named_parameters():
        own = base.get_parameter(name)
        vector, noise = merged.get_parameter(name) - own, parameter - own
        torch.testing.assert_close(noise.norm(), vector.norm(), rtol=1e-3, atol=1e-5)
        assert torch.nn.functional.cosine_similarity(noise.flatten(), vector.flatten(), dim=0) < 0.9


def test_findings_follow_from_the_paired_tests() -> None:
    rows = [
        {"first": "dlf_merged", "second": name, "tasks": "average", "difference": lead, "p_value": p}
        for name, lead, p in (("strong", 9.5, 0.001), ("dlf_experts", -5.9, 0.01), ("static_merged", 1.0, 0.2))
    ]
    told = comparing.findings({"paired": rows, "average": {"dlf_merged": 55.1}}, LOOKS)
    assert told == [
        "DLF, merged expert scores 55.1 on average.",
        "It beats strong model, untuned (+9.5).",
        "It loses to DLF, all experts (-5.9).",
        "No difference is shown to static alpha 1, merged expert (+1.0).",
    ]


def test_the_page_in_the_repository_is_that_of_its_data() -> None:
    docs = Path(__file__).parents[2] / "docs"
    found = json.loads((docs / "task-arithmetic.json").read_text(encoding="utf-8"))
    expected = comparing.page_text(found, LOOKS, HEAD, "task-arithmetic")
    assert (docs / "task-arithmetic.md").read_text(encoding="utf-8") == expected


def test_a_page_holds_every_condition_with_interval_and_test(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    points = {name: {task: 100 * torch.rand(8, generator=generator) for task in zoo.TASKS} for name in LOOKS}
    rivals = [name for name in LOOKS if name not in ("dlf_merged", "ceiling/mixed")]
    parts = Parts("dlf_merged", "mixed", "ceiling/mixed", rivals)
    compared = Comparison(points, [list(zoo.TASKS)], parts, generator, 50)
    counts = dict.fromkeys(zoo.TASKS, 8)
    found = {"far": {"num_items": counts, "notes": "Scale 0.3.", **compared.describe()}}
    found["far"]["paired"] = compared.paired(generator)
    comparing.write_page(tmp_path / "page.md", found, LOOKS, HEAD)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    for name, look in LOOKS.items():
        low, high = found["far"]["intervals"]["average"][name]
        average = f"{found['far']['average'][name]:.1f}"
        assert any(look.label in x and average in x and f"({low:.1f}–{high:.1f})" in x for x in text.splitlines())
        assert text.count(f"| {look.label} |") == 1 + (name in rivals)
    assert (tmp_path / "page-far.png").read_bytes().startswith(b"\x89PNG")
    assert "](page-far.png)" in text
    assert (tmp_path / "page.json").exists()
