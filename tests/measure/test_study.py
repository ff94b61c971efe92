"""A study on tiny real models: its columns against the fused model itself, its document, its page."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tiny_models import make_model, make_tokenizer, tune
from trimtab.logits.model import FusedCausalLM
from trimtab.logits.strategy import make_strategy
from trimtab.measure import evaluation, report, summary, tables, verdict
from trimtab.measure.study import MULTI_STRATEGIES, SINGLE_STRATEGIES, Panel, Spec, run_study


@dataclass(frozen=True)
class Asked:
    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] | None = None
    label: int | None = None


@dataclass(frozen=True)
class Kind:
    name: str
    kind: Literal["generate", "choose"]
    metric: str
    max_new_tokens: int


TASKS = {
    "facts": Kind("facts", "generate", "exact_match", 5),
    "truth": Kind("truth", "choose", "accuracy", 0),
    "domains": Kind("domains", "choose", "accuracy", 0),
}
TUNED = ("facts", "truth")
WORDS = ["Ada", "Moss", "cat", "city", "job", "food", "pet", "year", "Port", "Elm", "Ben", "Reed"]


def draw_items(task: str, count: int = 12) -> list[Asked]:
    made = []
    for place in range(count):
        prompt = f"Q: {WORDS[place % 12]} {WORDS[(place * 5 + 1) % 12]} {place}?\nA:"
        choices = tuple(f" {WORDS[(place + step) % 12]} {step}" for step in range(3))
        label = place % 3
        is_open = TASKS[task].kind == "generate"
        made.append(
            Asked(f"{task}-{place}", prompt, choices[label], None if is_open else choices, None if is_open else label)
        )
    return made


@pytest.fixture(scope="module")
def panel() -> Panel:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    base, strong = make_model(1, size), make_model(2, size, hidden=48)
    models = {
        "base": base,
        "strong": strong,
        "expert/facts": tune(base, 3),
        "expert/truth": tune(base, 4),
        "mixed": tune(base, 5),
        "ceiling/facts": tune(strong, 6),
        "ceiling/truth": tune(strong, 7),
        "ceiling/mixed": tune(strong, 8),
    }

    def fuse(experts: tuple[str, ...]) -> FusedCausalLM:
        return FusedCausalLM.from_members(
            strong, base, {name: models[f"expert/{name}"] for name in experts}, tokenizer=tokenizer
        )

    def strategy(spec: Spec, experts: tuple[str, ...]):
        return make_strategy(spec.amount, chooser=spec.chooser, expert_names=experts, **spec.settings)

    return Panel(models, tokenizer, fuse, strategy)


@pytest.fixture(scope="module")
def items() -> dict[str, list[Asked]]:
    return {task: draw_items(task) for task in TASKS}


@pytest.fixture(scope="module")
def scores(panel, items):
    return run_study(panel, TASKS, items, TUNED, {"facts": "Q: 1?\nA: one\n"})


@pytest.fixture(scope="module")
def document(scores) -> dict:
    made = summary.summarise(scores, TUNED, num_draws=200)
    return {**made, "pair": "far", "seconds": 1.0, "seed": 0, "versions": {"trimtab": "0"}}


@pytest.mark.parametrize("column", SINGLE_STRATEGIES)
def test_written_answers_are_those_of_the_fused_model(panel, items, scores, column: str) -> None:
    fused = panel.fuse(("facts",))
    fused.strategy = panel.strategy(SINGLE_STRATEGIES[column], ("facts",))
    stop = sorted(evaluation.stop_ids_of(panel.tokenizer))
    for item, answer in list(zip(items["facts"], scores.answers["single"][column]["facts"], strict=True))[:4]:
        inputs = fused.encode(item.prompt)
        out = fused.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=stop, pad_token_id=0)
        written = [i for i in out[0, inputs["input_ids"].shape[1] :].tolist() if i not in stop]
        assert panel.tokenizer.decode(written, skip_special_tokens=True) == answer


@pytest.mark.parametrize("column", MULTI_STRATEGIES)
def test_choices_are_those_of_the_fused_models_own_scores(panel, items, scores, column: str) -> None:
    fused = panel.fuse(TUNED)
    fused.strategy = panel.strategy(MULTI_STRATEGIES[column], TUNED)
    for item, chosen in zip(items["domains"], scores.answers["multi"][column]["domains"], strict=True):
        sums = fused.score([item.prompt] * len(item.choices), list(item.choices))
        top = float(sums.max())
        # Rounding may decide between choices that are equally likely to a hair, and only between those.
        assert float(sums[item.choices.index(chosen)]) >= top - 1e-3


def test_every_column_has_every_task_it_should(scores) -> None:
    single, multi = scores.points["single"], scores.points["multi"]
    assert set(single) == {"base", "expert", "strong", "latent", "ceiling", *SINGLE_STRATEGIES}
    assert set(single["latent"]) == {"facts"}
    assert all(set(tasks) == set(TUNED) for column, tasks in single.items() if column != "latent")
    assert all(set(multi[column]) == set(TASKS) for column in (*MULTI_STRATEGIES, "mixed", "ceiling"))
    assert all(set(multi[column]) == {"domains"} for column in ("base", "strong", "expert/facts", "expert/truth"))
    assert all(len(points) == 12 for tasks in single.values() for points in tasks.values())


def test_scores_of_a_subset_are_the_same_scores(scores, items) -> None:
    chosen = {task: [found[7], found[2]] for task, found in items.items()}
    part = scores.only(chosen)
    for table, columns in scores.points.items():
        for column, tasks in columns.items():
            for task, points in tasks.items():
                assert part.points[table][column][task].tolist() == [points[7], points[2]]


def test_jobs_are_announced_before_they_run(panel, items) -> None:
    seen = []
    few = {"truth": items["truth"][:2]}
    run_study(panel, TASKS, few, TUNED, on_job=lambda job, done, total: seen.append((job.column, done, total)))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert {total for _, _, total in seen} == {len(seen)}


def test_the_document_has_the_promised_shape(document) -> None:
    text = json.dumps(document, allow_nan=False)
    assert {"single", "multi", "unseen", "ratio", "pgr", "pair", "items", "seconds"} <= set(json.loads(text))
    columns = {"base", "expert", "strong", "ceiling", "static_0.5", "static_1.0", "static_1.5", "grid", "dynamic"}
    assert all(columns <= set(document["single"][task]) for task in TUNED)
    assert set(document["multi"]["dynamic"]) == set(TASKS)
    assert {"base", "strong", "mixed", "ceiling", "expert/facts", "dynamic"} <= set(document["unseen"]["domains"])
    assert set(document["ratio"]) == set(document["pgr"]) == {"single", "multi"}
    assert document["items"] == 12


def test_averages_ratios_and_gaps_follow_from_the_means(document) -> None:
    average = document["average"]["single"]
    for column in ("dynamic", "expert", "ceiling"):
        means = [document["single"][task][column] for task in TUNED]
        assert average[column] == pytest.approx(sum(means) / 2, abs=1e-3)
    if average["ceiling"]:
        assert (
            document["ratio"]["single"]["dynamic"] == pytest.approx(average["dynamic"] / average["ceiling"], abs=1e-3)
            or document["ratio"]["single"]["dynamic"] is None
        )
    multi = document["multi"]["dynamic"]
    seen = (multi["facts"] + multi["truth"]) / 2
    assert document["average"]["multi"]["dynamic"] == pytest.approx((seen + multi["domains"]) / 2, abs=1e-3)


def test_every_mean_lies_in_its_interval(document) -> None:
    for task, columns in document["single"].items():
        for column, value in columns.items():
            low, high = document["intervals"]["single"][task][column]
            assert low - 1e-9 <= value <= high + 1e-9


def test_paired_differences_are_those_of_the_tables(document) -> None:
    for row in document["paired"]:
        average = document["average"][row["table"]]
        if row["tasks"] == "average":
            assert row["difference"] == pytest.approx(average["dynamic"] - average[row["second"]], abs=2e-3)


def with_scores(scores, changes: dict[str, float]):
    """The same study with whole columns set to one score, to see what the sentences make of it."""
    points = {table: {c: dict(t) for c, t in columns.items()} for table, columns in scores.points.items()}
    for column, value in changes.items():
        points["single"][column] = {task: torch.full((12,), value) for task in TUNED}
    return replace(scores, points=points)


def test_the_findings_say_so_when_the_rule_loses(scores) -> None:
    lost = with_scores(scores, {"dynamic": 20.0, "expert": 60.0, "static_1.0": 90.0, "ceiling": 95.0, "strong": 0.0})
    found = verdict.sentences({**summary.summarise(lost, TUNED, num_draws=100), "pair": "far"})
    assert any(
        "DLF loses to static, alpha 1 (proxy-tuning), the best static alpha in hindsight: -70.0" in sentence
        for sentence in found
    )
    assert any("DLF loses to small expert alone" in sentence for sentence in found)
    assert any("the best average is that of static, alpha 1" in sentence for sentence in found)
    assert any("recovers -114% of the gap" in sentence for sentence in found)


def test_the_findings_claim_nothing_without_a_difference(scores) -> None:
    same = with_scores(scores, {"dynamic": 50.0, "static_1.0": 50.0, "ceiling": 50.2, "expert": 50.0})
    found = verdict.sentences({**summary.summarise(same, TUNED, num_draws=100), "pair": "far"})
    assert any(
        "static, alpha 1 (proxy-tuning), the best static alpha in hindsight: +0.0 points" in s
        and "No difference is shown" in s
        for s in found
    )
    assert any("no gap to recover" in sentence for sentence in found)


def test_the_report_folder_holds_page_plots_and_document(tmp_path: Path, panel, document, scores, items) -> None:
    fused = panel.fuse(("facts",))
    trace = fused.trace(items["facts"][0].prompt, max_new_tokens=4).to_dict()
    page = report.write_report(tmp_path, document, scores, [report.Shown("facts", " Moss", trace)])
    written = {file.name for file in tmp_path.iterdir()}
    assert written >= {
        "index.html",
        "single.png",
        "multi.png",
        "results.json",
        "explain-facts.html",
        "explain-facts.png",
    }
    assert (tmp_path / "single.png").read_bytes()[:4] == b"\x89PNG"
    html = page.read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    assert f"{document['average']['single']['dynamic']:.1f}" in html
    assert json.loads((tmp_path / "results.json").read_text())["items"] == 12


def test_the_report_page_shows_the_figures_in_a_browser(tmp_path: Path, browser, document, scores) -> None:
    file = report.write_report(tmp_path, document, scores, [])
    page = browser.new_page()
    troubles: list[str] = []
    page.on("request", lambda request: None if request.url.startswith("file:") else troubles.append(request.url))
    page.goto(file.as_uri())
    table = page.locator("table").first
    shown = table.locator("tr[data-column=dynamic] td[data-head=average]").inner_text().split()
    low, high = document["intervals"]["average"]["single"]["dynamic"]
    assert float(shown[0]) == pytest.approx(document["average"]["single"]["dynamic"], abs=0.051)
    assert (float(shown[-3]), float(shown[-1])) == pytest.approx((low, high), abs=0.051)
    assert page.locator("img").count() == 2
    assert page.locator("img").first.evaluate("image => image.naturalWidth") > 500
    page.close()
    assert [url for url in troubles if not url.startswith("data:")] == []


def test_the_star_marks_the_best_strategy_and_never_a_model_alone(scores) -> None:
    best = with_scores(scores, {"ceiling": 100.0, "mixture": 99.0})
    document = {**summary.summarise(best, TUNED, num_draws=50), "pair": "far"}
    grid = tables.single_grid(document)
    stars = {row.column for row in grid.rows for cell in row.cells if cell.is_best}
    assert stars == {"mixture"}
