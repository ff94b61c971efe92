"""Interleaving, ratios and documents of the benches."""

import json

import pytest
from bench.harness import WARM_UP, Case, Findings, Options, interleave, ratios, spread

from bench import harness, machine


def case_of(runs, **more):
    return Case("point", "ms", "ms", False, "A", settings={"batch": 1}, runs=runs, **more)


def records(*values):
    return [{"ms": value} for value in values]


def test_arms_take_turns_after_a_warm_up():
    seen = []
    arms = {name: lambda repeat, name=name: seen.append((name, repeat)) or {"ms": float(repeat)} for name in "ABC"}
    runs = interleave(arms, repeats=2)
    assert seen == [(name, repeat) for repeat in (WARM_UP, 0, 1) for name in "ABC"]
    assert {name: [record["ms"] for record in runs[name]] for name in runs} == {name: [0.0, 1.0] for name in "ABC"}
    assert all(record["seconds"] > 0 for record in runs["A"])
    with pytest.raises(ValueError, match="repeats is 0"):
        interleave(arms, repeats=0)


def test_an_arm_may_time_itself():
    assert interleave({"A": lambda repeat: {"seconds": 7.0}}, 1)["A"] == [{"seconds": 7.0}]


def test_spread_is_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == harness.Spread(3.0, 2.0, 4.0, 5)
    assert spread([4.0]) == harness.Spread(4.0, 4.0, 4.0, 1)
    assert spread([2.0, 2.1, 2.2, 2.3, 2.4]).text() == "2.20 (2.10 – 2.30)"
    assert spread([2.0]).text() == "2.00"


def test_a_few_repeats_show_the_least_and_the_largest():
    assert spread([1.0, 3.0, 2.0]) == harness.Spread(2.0, 1.0, 3.0, 3)
    assert spread([0.94, 1.24]).text() == "1.09 (0.94 – 1.24)"
    few, many = (case_of({"A": records(*values)}) for values in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0]))
    assert [harness.interval_of(case) for case in (few, many)] == ["least – largest", "quartiles"]


def test_a_slow_minute_moves_both_sides_of_a_ratio():
    case = case_of({"A": records(10.0, 20.0, 10.0), "B": records(30.0, 60.0, 30.0)})
    assert ratios(case, "B") == [3.0, 3.0, 3.0]
    assert ratios(case, "A", "B") == pytest.approx([1 / 3] * 3)


def test_a_document_says_what_where_when_and_keeps_every_repeat(tmp_path):
    case = case_of({"A": records(1.0, 2.0), "B": records(2.0, 6.0)}, beside=("ms",), left_out={"C": "too long"})
    findings = Findings("Title", {"seed": 1}, [case], ["a note"])
    file = tmp_path / "deep" / "name.json"
    harness.write_json(file, harness.document("name", findings, Options(machine="mine")))
    assert [path.name for path in file.parent.iterdir()] == ["name.json"]
    found = json.loads(file.read_text())
    assert found["machine"]["name"] == "mine"
    assert found["machine"]["versions"].keys() >= {"torch", "transformers"}
    assert found["machine"]["cpu"]
    assert found["machine"]["threads"] >= 1
    assert found["commit"] == machine.commit()
    assert (found["bench"], found["title"], found["settings"], found["is_quick"]) == (
        "name",
        "Title",
        {"seed": 1},
        True,
    )
    assert found["cases"][0]["runs"]["B"] == records(2.0, 6.0)
    assert found["cases"][0]["summary"]["B"]["ratio"]["median"] == 2.5
    assert harness.cases_of(harness.read_json(file)) == [case]


def test_quick_results_do_not_overwrite_long_ones(tmp_path):
    assert harness.file_of(tmp_path, "decode", True) != harness.file_of(tmp_path, "decode", False)


def test_tables_and_plots(tmp_path, capsys):
    runs = {"A": records(1.0, 2.0), "B": [{"ms": 2.0, "drafted": 5.0}, {"ms": 6.0, "drafted": 9.0}]}
    findings = Findings("Title", {}, [case_of(runs, beside=("drafted",), left_out={"C": "too long"})], ["a note"])
    harness.show(findings)
    shown = capsys.readouterr().out
    assert all(
        part in shown
        for part in ("batch 1", "2.50 (2.00 – 3.00)", "least – largest", " 7 ", "–", "C: too long", "a note")
    )


def test_every_case_with_a_reference_has_its_panel(tmp_path):
    from matplotlib.image import imread

    one = case_of({"A": records(1.0, 2.0), "B": records(2.0, 6.0)})
    apart = case_of({"B": records(2.0)})
    for cases, panels in (([one], 1), ([one, apart, one], 2)):
        harness.plot(Findings("Title", {}, cases), tmp_path / "plot.png")
        pixels = imread(tmp_path / "plot.png")[..., :3]
        assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
        for part in range(panels):
            width = pixels.shape[1] // panels
            shown = pixels[60:, part * width : (part + 1) * width]
            assert (shown < 0.9).any(axis=-1).mean() > 0.05  # bars, not an empty page
