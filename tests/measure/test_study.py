"""A study on tiny real models: its columns against the fused model itself, its document, its page."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tiny_models import make_model, make_tokenizer, tune
from trimtab.logits.model import FusedCausalLM
from trimtab.logits.strategy.fusion import make_strategy
from trimtab.measure import evaluation, report, summary, tables, verdict
from trimtab.measure.results import headline_table, markdown
from trimtab.measure.study import (
    DEMO_MULTI,
    MULTI_STRATEGIES,
    SINGLE_STRATEGIES,
    Panel,
    Spec,
    alone_scores,
    forced_scores,
    run_study,
)


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


def spread(start: float) -> torch.Tensor:
    """Scores of twelve items around `start`, all different, so that no mean is a round number."""
    return start + torch.arange(12.0) ** 1.5 / 4


def test_averages_ratios_and_gaps_follow_from_the_means(scores) -> None:
    """Known scores in every column that the figures need: none of them may be missing then."""
    points = {table: {c: dict(t) for c, t in columns.items()} for table, columns in scores.points.items()}
    points["single"] |= {
        column: {"facts": spread(start), "truth": spread(start + 7)}
        for column, start in {"dynamic": 60.0, "expert": 40.0, "ceiling": 80.0}.items()
    }
    points["multi"] |= {
        column: {"facts": spread(start), "truth": spread(start + 3), "domains": spread(start - 11)}
        for column, start in {"dynamic": 50.0, "mixed": 30.0, "ceiling": 85.0}.items()
    }
    document = summary.summarise(replace(scores, points=points), TUNED, num_draws=100)
    mean = float(spread(0.0).mean())
    single, multi = (60 + mean + 3.5, 40 + mean + 3.5, 80 + mean + 3.5), [mean + 1.5 / 2 - 11 / 2] * 3
    multi = [start + shift for start, shift in zip((50, 30, 85), multi, strict=True)]
    for table, weak, (fused, expert, ceiling) in (("single", "expert", single), ("multi", "mixed", multi)):
        average = document["average"][table]
        found = (average["dynamic"], average[weak], average["ceiling"])
        assert found == pytest.approx((fused, expert, ceiling), abs=1e-3)
        assert document["ratio"][table]["dynamic"] == pytest.approx(fused / ceiling, abs=1e-3)
        assert document["pgr"][table]["dynamic"] == pytest.approx((fused - expert) / (ceiling - expert), abs=1e-3)


def test_dlf_is_paired_with_every_other_strategy_and_the_models_alone(document) -> None:
    averages = {table: set() for table in ("single", "multi")}
    for row in document["paired"]:
        if row["tasks"] == "average":
            averages[row["table"]].add(row["second"])
    assert averages["single"] == {*SINGLE_STRATEGIES, "expert", "strong"} - {"dynamic"}
    assert averages["multi"] == {*MULTI_STRATEGIES, "mixed"} - {"dynamic"} | {"strong"}


@pytest.mark.parametrize(("table", "column"), [("single", "static_1.5"), ("multi", "static_mean")])
def test_the_best_static_alpha_is_found_in_both_tables(scores, table: str, column: str) -> None:
    points = {name: {c: dict(t) for c, t in columns.items()} for name, columns in scores.points.items()}
    points[table][column] = {task: torch.full((12,), 99.0) for task in points[table][column]}
    document = summary.summarise(replace(scores, points=points), TUNED, num_draws=20)
    assert document["best_static"][table] == column
    told = verdict.sentences({**document, "pair": "far"})
    assert any(f"{verdict.name_of(column)}, the best static alpha in hindsight" in sentence for sentence in told)


def test_the_table_of_all_experts_has_every_rival_with_the_papers_chooser() -> None:
    by_paper = {"static_0.5", "static_1.0", "static_1.5", "grid", "dynamic", "cautious", "filter"}
    assert {name for name, spec in MULTI_STRATEGIES.items() if spec.chooser == "paper"} == by_paper
    assert MULTI_STRATEGIES["filter_sum"] == Spec("filter", "sum")
    assert set(DEMO_MULTI) < set(MULTI_STRATEGIES)


def test_every_column_has_a_name_and_a_colour_of_its_own() -> None:
    from trimtab.measure.plots import COLUMN_COLOURS

    for columns in (SINGLE_STRATEGIES, MULTI_STRATEGIES):
        assert len({verdict.NAMES[column] for column in columns}) == len(columns)
        assert len({COLUMN_COLOURS[column] for column in columns}) == len(columns)


def test_the_headline_names_the_strongest_rivals_and_the_page_groups_losses_by_task(scores, tmp_path: Path) -> None:
    points = {table: {c: dict(t) for c, t in columns.items()} for table, columns in scores.points.items()}
    points["multi"] |= {
        "dynamic": {task: torch.full((12,), 40.0) for task in TASKS},
        "static_0.5": {task: torch.full((12,), 77.0) for task in TASKS},
        "cautious": {task: torch.full((12,), 66.0) for task in TASKS},
        "filter": {task: torch.full((12,), 55.0) for task in TASKS},
    }
    document = summary.summarise(replace(scores, points=points), TUNED, num_draws=50)
    document |= {"pair": "far", "versions": {}}
    found = {"far": {"pooled": document, "draws": [{"seed": 0, "items": 12}], "spread": {}}}
    lines = headline_table(found).splitlines()
    best, cautious, filtered = (next(x for x in lines if f"| {name} |" in x) for name in HEADLINES)
    assert best.endswith("| 77.0 (77.0–77.0), alpha 0.5 |")
    assert cautious.endswith("| 66.0 (66.0–66.0) |")
    assert filtered.endswith("| 55.0 (55.0–55.0) |")
    page = markdown(found, tmp_path / "results.md")
    assert page.count("On facts (all experts) DLF is below") == 1
    assert "static, alpha 0.5 by 37.0" in page
    assert page.count("the paper's rule picks one expert per token") == 1


HEADLINES = ("best static alpha, known in hindsight", "smaller root", "posterior filter")


@torch.inference_mode()
def test_an_answer_bound_to_the_style_opens_with_the_likeliest_opening(panel, items) -> None:
    """Against the model itself: the opening it likes best, and what it writes after it."""
    asked = [replace(item, choices=(" Moss", " cat")) for item in items["facts"][:4]]
    kind, seen = TASKS["facts"], []
    for item in asked:
        sums = []
        for choice in item.choices:
            ids = panel.tokenizer(item.prompt + choice, return_tensors="pt")["input_ids"]
            start = len(panel.tokenizer(item.prompt)["input_ids"])
            laws = panel.models["strong"](input_ids=ids).logits.float().log_softmax(dim=-1)[0]
            sums.append(float(sum(laws[place - 1, ids[0, place]] for place in range(start, ids.shape[1]))))
        opening = item.choices[sums.index(max(sums))]
        prefixes = evaluation.read_prompts(panel.models["strong"], panel.tokenizer, [item.prompt + opening], 5)
        seen.append(opening + evaluation.answer_prompts(panel.models["strong"], panel.tokenizer, prefixes, 5)[0])
    right = [replace(item, target=answer) for item, answer in zip(asked, seen, strict=True)]
    assert forced_scores(panel, kind, right, "strong").tolist() == [100.0] * 4
    wrong = [replace(item, target=answer + "x") for item, answer in zip(asked, seen, strict=True)]
    assert forced_scores(panel, kind, wrong, "strong").tolist() == [0.0] * 4


def test_items_with_a_label_are_answered_by_choosing_even_where_the_task_writes(panel, items) -> None:
    asked = [
        replace(item, choices=(" Moss", " cat", " Elm"), label=place % 3) for place, item in enumerate(items["facts"])
    ]
    as_choice = alone_scores(panel, TASKS["truth"], asked, "strong")
    assert 0.0 < float(as_choice.mean()) < 100.0
    assert torch.equal(forced_scores(panel, TASKS["facts"], asked, "strong"), as_choice)


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
        "DLF loses to static, alpha 1, the best static alpha in hindsight: -70.0" in sentence for sentence in found
    )
    assert any("DLF loses to small expert alone" in sentence for sentence in found)
    assert any("the best average is that of static, alpha 1" in sentence for sentence in found)
    assert any("recovers -114% of the gap" in sentence for sentence in found)


def test_the_findings_claim_nothing_without_a_difference(scores) -> None:
    same = with_scores(scores, {"dynamic": 50.0, "static_1.0": 50.0, "ceiling": 50.2, "expert": 50.0})
    found = verdict.sentences({**summary.summarise(same, TUNED, num_draws=100), "pair": "far"})
    assert any(
        "static, alpha 1, the best static alpha in hindsight: +0.0 points" in s and "No difference is shown" in s
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
