"""Each bench in a tiny form, the command line, and the page."""

import json
import re
from pathlib import Path

import pytest
import torch
from bench.__main__ import main
from bench.decode import Point
from bench.harness import Case, Findings, Options
from bench.members import MemberFactory, Spec
from bench.memory import FUSED, Load

from bench import decode, harness, memory, report, targets, time_breakdown
from trimtab.core.errors import TrimtabError

ROOT = Path(__file__).parent.parent.parent
SPEC = Spec(12_000_000, 6, ("facts",), small_parameters=1_000_000, dtype="float32")


def quiet(_):
    """No progress."""


# ---- decode


@pytest.fixture(scope="module")
def decoded():
    points = [
        Point(decode.CENTRE, SPEC, ("facts",), repeats=2, drafts=(3,), output=8),
        Point("batch 2", SPEC, ("facts",), batch=2, repeats=1, output=6, prompt=12, is_brief=True),
    ]
    return decode.run(points, MemberFactory(), Options(repeats=2), quiet)


@pytest.mark.thorough
def test_decode_measures_all_arms_on_the_same_work(decoded):
    centre, step, lora_step, small_part, batch = decoded.cases
    fixed = f"{decode.SPECULATED}, 3 drafted"
    arms = [decode.STRONG, decode.ASSISTED, decode.STATIC, decode.GRID, decode.OURS, decode.SPECULATED, fixed]
    assert list(centre.runs) == arms
    assert all(len(runs) == 2 for runs in centre.runs.values())
    for runs in centre.runs.values():
        for record in runs:
            assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
            assert record["strong_seconds"] + record["other_seconds"] <= record["seconds"]
    for ours, fast in zip(centre.runs[decode.OURS], centre.runs[fixed], strict=True):
        assert ours["strong_calls"] == ours["tokens"] == fast["tokens"] == 8
        assert ours["tokens_per_strong_call"] == 1.0
        assert fast["strong_calls"] < ours["strong_calls"]
        assert 0 < fast["acceptance"] == fast["accepted"] / fast["drafted"] <= 1
    assert [case.name for case in (step, lora_step, small_part)] == [
        decode.STEP,
        f"{decode.STEP}, 4 LoRA experts",
        decode.SMALL_PART,
    ]
    assert all(record["ms"] < record["whole_step_ms"] for runs in small_part.runs.values() for record in runs)
    assert batch.left_out == {decode.ASSISTED: decode.ONE_ROW_ONLY, decode.GRID: decode.TOO_LONG}
    assert {record["tokens"] for runs in batch.runs.values() for record in runs} == {12.0}


def test_tokens_are_counted_up_to_the_end_of_each_row():
    ids = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [1, 0, 0, 0], [5, 1, 1, 1]])
    assert decode.count_new(ids, eos_id=1) == 2 + 4 + 1 + 2


def test_a_cost_that_cannot_be_had_leaves_its_point_out_with_the_reason():
    spec = Spec(12_000_000, 1e6, dtype="float32")
    found = decode.run([Point("ratio 1000000", spec)], MemberFactory(), Options(), quiet)
    assert found.cases == []
    assert re.search(r"Left out, ratio 1000000: a small member of .* takes .* ms a step", found.notes[-1])


@pytest.mark.parametrize("is_quick", [True, False])
def test_points_begin_with_the_centre_and_have_names_of_their_own(is_quick):
    points = decode.points(is_quick)
    assert points[0].name == decode.CENTRE
    assert len({point.name for point in points}) == len(points)
    assert points[0].spec.ratio == 20


# ---- memory


@pytest.mark.slow
def test_a_process_of_its_own_finds_weights_and_peak():
    load = Load(FUSED, strong=24_000_000, small=4_000_000, prompt=6, output=6, speculate=2)
    found = memory.in_own_process(load)
    parameters = 24_000_000 + 2 * 4_000_000
    assert found["weights_mib"] == pytest.approx(parameters * 2 / 2**20, rel=0.15)
    assert found["weights_mib"] <= found["mib"] < 1.5 * found["weights_mib"]


def test_a_process_that_fails_says_why():
    with pytest.raises(TrimtabError, match=r"the process for nobody failed: .*nobody") as caught:
        memory.in_own_process(Load("nobody"))
    assert "python -m bench.memory" in caught.value.fix


class MeasuredPeaks(memory.Peaks):
    """Peaks as if processes had found them: strong 100, base 10 (9 of it weights), an adapter's 1 more, fused 115."""

    def of(self, load, repeat):
        mib = {"strong": 100.0, "base": 10.0, "fused": 115.0}.get(load.who, 11.0)
        return {"mib": mib, "weights_mib": {"strong": 90.0, "base": 9.0, "fused": 100.0}.get(load.who, 10.0)}


def test_sums_count_shared_weights_once():
    lora, full = (Load(FUSED, experts=("arithmetic", "facts"), is_lora=is_lora) for is_lora in (True, False))
    peaks, who = MeasuredPeaks(), ["strong", "base", "arithmetic", "facts"]
    assert memory.total(who, full, peaks, 0) == {"mib": 132.0, "weights_mib": 119.0}
    assert memory.total(who, lora, peaks, 0) == {"mib": 114.0, "weights_mib": 101.0}
    assert memory.base_and_adapters(lora, peaks, 0) == {"mib": 12.0, "weights_mib": 11.0}
    assert memory.beyond_strong(lora, peaks, 0) == {"mib": 15.0, "weights_mib": 10.0}
    cases = memory.cases_of("2 LoRA experts", lora, peaks, 1, quiet)
    assert [case.name for case in cases] == ["2 LoRA experts", memory.small_part_of("2 LoRA experts")]
    assert harness.ratios(cases[0], memory.OURS) == [115 / 114]


def test_equal_work_is_measured_once_per_repeat(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "in_own_process", lambda load: asked.append(load) or {"mib": 1.0, "weights_mib": 1.0})
    peaks, base = memory.Peaks(), Load(FUSED, experts=("arithmetic", "facts"))
    for load in (base, Load("strong", experts=("facts",)), Load("strong", is_lora=True, speculate=4)):
        peaks.of(load, 0)
    peaks.of(Load("strong"), 1)
    assert [load.who for load in asked] == ["fused", "strong", "strong"]


# ---- command line and page


def write_results(folder, findings, bench="decode", **options):
    options = Options(output=folder, machine="mine", **options)
    file = harness.file_of(folder, f"{bench}-{options.only}" if options.only else bench, options.is_quick)
    harness.write_json(file, harness.document(bench, findings, options))


def rates(**arms):
    """A decoding case of these tokens per second."""
    runs = {name.replace("_", " "): [{"tokens_per_second": rate} for rate in found] for name, found in arms.items()}
    settings = {"batch": 1, "ratio": 20, "prompt": decode.AS_IT_IS}
    return Case(decode.CENTRE, "tokens_per_second", "tokens/s", True, decode.STRONG, settings=settings, runs=runs)


def test_the_page_holds_every_target_and_judges_by_the_figures(tmp_path):
    found = rates(strong_alone=[10.0, 20.0], ours_speculated=[25.0, 50.0], strong_assisted=[30.0, 60.0])
    write_results(tmp_path, Findings("Decoding", {}, [found], ["a note"]), is_quick=False)
    page = tmp_path / "docs" / "page.md"
    assert main(["report", "--output", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    first, second, *others = targets.TARGETS
    assert f"| {first.claim} | ≥ 2.00 | 2.50 (2.50 – 2.50) | met | centre |" in text
    assert f"| {second.claim} | ≥ 1.00 | 0.83 (0.83 – 0.83) | **missed** | centre |" in text
    for target in others:
        assert f"| {target.claim} | {target.demand} | – | not measured | |" in text
    assert report.INTERVALS in text
    assert "[Decoding](page-points.md#decoding)" in text
    points = (page.parent / "page-points.md").read_text()
    assert "| strong assisted | 45.00 (30.00 – 60.00) | 3.00 (3.00 – 3.00) |" in points
    assert "- a note" in points
    assert "![Decoding](../decode.png)" in points


def test_long_runs_go_before_quick_ones_and_parts_are_left_out(tmp_path):
    def findings(name):
        case = Case(name, "ms", "ms", False, "A", runs={"A": [{"ms": 1.0}]})
        return Findings(name, {}, [case])

    write_results(tmp_path, findings("quick"), is_quick=True)
    write_results(tmp_path, findings("part"), is_quick=False, only="part")
    assert "### quick" in report.points(tmp_path, tmp_path / "page.md")
    write_results(tmp_path, findings("long"), is_quick=False)
    text = report.points(tmp_path, tmp_path / "page.md")
    assert "### long" in text
    assert "### quick" not in text
    assert "### part" not in text


def test_the_worst_place_counts():
    runs = {memory.SUM: [{"mib": 100.0}], memory.OURS: [{"mib": 105.0}], memory.SPECULATED: [{"mib": 120.0}]}
    case = Case("2 LoRA experts", "mib", "MiB", False, memory.SUM, runs=runs)
    target = targets.TARGETS[-1]
    name, ratio = target.worst({"cases": [vars(case)]})
    assert (name, ratio.median, target.verdict(ratio)) == ("2 LoRA experts, ours speculated", 1.2, targets.MISSED)
    assert target.worst({"cases": []}) is None
    fast, slow = (vars(rates(strong_alone=[10.0], ours_speculated=[rate])) for rate in (30.0, 15.0))
    name, ratio = targets.TARGETS[0].worst({"cases": [fast, slow]})
    assert (ratio.median, targets.TARGETS[0].verdict(ratio)) == (1.5, targets.MISSED)


def test_a_promise_is_met_where_the_whole_interval_keeps_it():
    fast, small = targets.TARGETS[0], targets.TARGETS[-1]  # at least 2, at most 1.1
    found = [fast.verdict(harness.spread(values)) for values in ([2.0, 2.5], [1.9, 2.5], [1.5, 2.3])]
    assert found == [targets.MET, targets.IN_THE_MEDIAN, targets.MISSED]
    found = [small.verdict(harness.spread(values)) for values in ([1.0, 1.1], [0.9, 1.2], [1.0, 1.3])]
    assert found == [targets.MET, targets.IN_THE_MEDIAN, targets.MISSED]
    # The worst place is the one whose verdict is the worst, though another's median be nearer to the limit.
    safe, shaky = (rates(strong_alone=[10.0, 10.0], ours_speculated=own) for own in ([21.0, 21.0], [19.0, 30.0]))
    assert fast.worst({"cases": [vars(safe), vars(shaky)]})[1].median == pytest.approx(2.45)
    assert [report._verdict(fast, harness.spread(values)) for values in ([1.9, 2.5], [1.0])] == [
        "met in the median",
        "**missed**",
    ]


@pytest.mark.parametrize("other", [{"batch": 4}, {"ratio": 10}, {"prompt": 512}])
def test_targets_judge_the_promised_places_only(other):
    promised = rates(strong_alone=[10.0], ours_speculated=[25.0])
    elsewhere = rates(strong_alone=[10.0], ours_speculated=[5.0])
    elsewhere.settings |= other
    assert targets.TARGETS[0].worst({"cases": [vars(promised), vars(elsewhere)]})[1].median == 2.5


def test_cases_of_the_same_arms_share_a_table(tmp_path):
    found = [rates(strong_alone=[10.0, 20.0], ours_speculated=[rate, 2 * rate]) for rate in (25.0, 30.0)]
    write_results(tmp_path, Findings("Decoding", {}, found), is_quick=False)
    text = report.points(tmp_path, tmp_path / "page.md")
    assert "| | strong alone, tokens/s | × ours speculated |" in text
    for ratio in ("2.50 (2.50 – 2.50)", "3.00 (3.00 – 3.00)"):
        assert f"| centre | 15.00 (10.00 – 20.00) | {ratio} |" in text


SCREEN = 60  # lines


def test_the_pages_in_the_repository_are_those_of_the_results():
    results, page, readme = ROOT / "bench" / "results", ROOT / "docs" / "performance.md", ROOT / "README.md"
    command = "run `python -m bench report --readme README.md`"
    summary = page.read_text(encoding="utf-8")
    assert summary == report.markdown(results, page), command
    assert len(summary.splitlines()) <= SCREEN
    assert report.points_page(page).read_text(encoding="utf-8") == report.points(results, page), command
    assert readme.read_text(encoding="utf-8") == report.with_targets(readme, results), command


def test_a_readme_keeps_its_own_words_around_the_promises(tmp_path):
    write_results(tmp_path, Findings("Decoding", {}, [rates(strong_alone=[10.0], ours_speculated=[25.0])]))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    words = ["report", "--output", str(tmp_path), "--page", str(tmp_path / "page.md"), "--readme", str(readme)]
    for _ in range(2):
        assert main(words) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.START}\n")
        assert text.endswith(f"\n{report.END}\nafter\n")
        assert "old" not in text
        assert text.count("2.50 (2.50") == 0
        assert text.count("| 2.50 | met |") == 1


def test_a_readme_without_marks_is_left_alone(tmp_path, capsys):
    write_results(tmp_path, Findings("Decoding", {}, [rates(strong_alone=[10.0], ours_speculated=[25.0])]))
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text("nothing")
    assert main(["report", "--output", str(tmp_path), "--page", str(page), "--readme", str(readme)]) == 2
    assert "has no place for the measured speed" in capsys.readouterr().err
    assert readme.read_text() == "nothing"
    assert not page.exists()


@pytest.mark.slow
def test_a_bench_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "points", lambda is_quick: [Point("one", SPEC, output=4, prompt=6, is_brief=True)])
    words = ["decode", "--quick", "--output", str(tmp_path), "--repeats", "1", "--threads", "1", "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == harness.read_json(tmp_path / "decode-quick.json")
    assert (tmp_path / "decode-quick.png").exists()
    assert "bench decode: one" in captured.err
    assert main([*words[:-1], "--only", "on"]) == 0
    assert "x strong alone" in capsys.readouterr().out
    assert (tmp_path / "decode-on-quick.json").exists()


def test_wrong_words_and_missing_results_end_with_code_2(tmp_path, capsys):
    assert main(["decode", "--only", "nothing like it", "--output", str(tmp_path)]) == 2
    assert "no case of bench 'decode' is called 'nothing like it'" in capsys.readouterr().err
    assert main(["report", "--output", str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err
    for words in (["nosuch"], ["decode", "--repeats", "0"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "is no count" in capsys.readouterr().err


def test_shares_of_the_seconds_add_up_over_repeats():
    case = rates(strong_alone=[1.0, 1.0], ours_speculated=[1.0, 1.0])
    alone = {"seconds": 4.0, "strong_seconds": 4.0, "small_seconds": 0.0, "other_seconds": 0.0, "strong_calls": 40.0}
    drafted = {"seconds": 2.0, "strong_seconds": 1.0, "small_seconds": 0.5, "other_seconds": 0.5, "strong_calls": 10.0}
    slow = drafted | {"seconds": 6.0, "strong_seconds": 5.0}
    case.runs = {
        decode.STRONG: [alone | {"tokens": 40.0}],
        decode.SPECULATED: [d | {"tokens": 40.0} for d in (drafted, slow)],
    }
    case.settings["batch"] = 2
    *_, row, end = time_breakdown.seconds_rows([case])
    assert (row, end) == (f"| {decode.CENTRE} | 0.75 | 0.12 | 0.12 | 2.0 | 100 | 300 |", "")
    assert list(time_breakdown.seconds_rows([rates(strong_alone=[1.0])])) == []


def test_costs_are_told_of_the_promised_places_alone():
    cases = [rates(strong_alone=[1.0]) for _ in range(3)]
    for case, ratio, batch in zip(cases, (14.6, 23.2, 90.0), (1, 1, 4), strict=True):
        case.facts, case.settings["batch"] = {time_breakdown.RATIO: ratio}, batch
    documents = {"decode": {"cases": [vars(case) for case in cases]}}
    assert "it costs 15 to 23 times as much" in " ".join(time_breakdown.costs(documents))
    assert list(time_breakdown.costs({})) == []
