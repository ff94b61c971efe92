"""The study on tiny real models: its conditions against the fused model itself, its document, its pages."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tiny_models import make_model, make_tokenizer, tune
from trimtab.measure import evaluate
from trimtab.measure.evaluate import Answering, run_conditions
from trimtab.measure.records import Record, answers_of, only_items, points_of
from trimtab.studies.dlf import findings, report, summary
from trimtab.studies.dlf.conditions import LOOKS, MULTI, SINGLE, conditions, label
from trimtab.studies.dlf.page import END, START, headline_table, page_text
from trimtab.studies.models import Fused, StudyModels
from trimtab.studies.regime.criteria import forced_points


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
    for index in range(count):
        prompt = f"Q: {WORDS[index % 12]} {WORDS[(index * 5 + 1) % 12]} {index}?\nA:"
        choices = tuple(f" {WORDS[(index + step) % 12]} {step}" for step in range(3))
        right = index % 3
        is_open = TASKS[task].kind == "generate"
        made.append(
            Asked(f"{task}-{index}", prompt, choices[right], None if is_open else choices, None if is_open else right)
        )
    return made


@pytest.fixture(scope="module")
def models() -> StudyModels:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    base, strong = make_model(1, size), make_model(2, size, hidden=48)
    made = {
        "base": base,
        "strong": strong,
        "expert/facts": tune(base, 3),
        "expert/truth": tune(base, 4),
        "mixed": tune(base, 5),
        "ceiling/facts": tune(strong, 6),
        "ceiling/truth": tune(strong, 7),
        "ceiling/mixed": tune(strong, 8),
    }

    return StudyModels(made, tokenizer)


@pytest.fixture(scope="module")
def items() -> dict[str, list[Asked]]:
    return {task: draw_items(task) for task in TASKS}


def run_study(models, items, few_shot=None, on_cell=lambda cell, done, total: None) -> list[Record]:
    columns = conditions(models, TUNED, few_shot or {})
    return run_conditions(columns, models.models, models.tokenizer, TASKS, items, on_cell=on_cell)


@pytest.fixture(scope="module")
def records(models, items) -> list[Record]:
    return run_study(models, items, {"facts": "Q: 1?\nA: one\n"})


@pytest.fixture(scope="module")
def document(records) -> dict:
    made = summary.summarise(records, TUNED, num_draws=200)
    return {**made, "pair": "far", "seconds": 1.0, "seed": 0, "versions": {"trimtab": "0"}}


@pytest.mark.parametrize("column", SINGLE)
def test_written_answers_are_those_of_the_fused_model(models, items, records, column: str) -> None:
    fused = models.fuse(("facts",))
    fused.strategy = models.strategy(SINGLE[column], ("facts",))
    stop = sorted(evaluate.stop_ids_of(models.tokenizer))
    written_by_study = answers_of(records, "single", "facts")[column]
    for item, record in list(zip(items["facts"], written_by_study, strict=True))[:4]:
        inputs = fused.encode(item.prompt)
        out = fused.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=stop, pad_token_id=0)
        written = [i for i in out[0, inputs["input_ids"].shape[1] :].tolist() if i not in stop]
        assert models.tokenizer.decode(written, skip_special_tokens=True) == record.answer


@pytest.mark.parametrize("column", MULTI)
def test_choices_are_those_of_the_fused_models_own_scores(models, items, records, column: str) -> None:
    fused = models.fuse(TUNED)
    fused.strategy = models.strategy(MULTI[column], TUNED)
    for item, record in zip(items["domains"], answers_of(records, "multi", "domains")[column], strict=True):
        sums = fused.score([item.prompt] * len(item.choices), list(item.choices))
        top = float(sums.max())
        # Rounding may decide between choices that are equally likely to a hair, and only between those.
        assert float(sums[item.choices.index(record.answer)]) >= top - 1e-3


def test_every_condition_has_every_task_it_should(records) -> None:
    single, multi = points_of(records, "single"), points_of(records, "multi")
    assert set(single) == {"base", "expert", "strong", "latent", "ceiling", *SINGLE}
    assert set(single["latent"]) == {"facts"}
    assert all(set(tasks) == set(TUNED) for column, tasks in single.items() if column != "latent")
    assert all(set(multi[column]) == set(TASKS) for column in (*MULTI, "mixed", "ceiling"))
    assert all(set(multi[column]) == {"domains"} for column in ("base", "strong", "expert/facts", "expert/truth"))
    assert all(len(points) == 12 for tasks in single.values() for points in tasks.values())


def test_records_of_some_items_are_the_same_records_in_their_order(records, items) -> None:
    chosen = {task: [found[7].id, found[2].id] for task, found in items.items()}
    part = only_items(records, chosen)
    for table in ("single", "multi"):
        whole = points_of(records, table)
        for column, tasks in points_of(part, table).items():
            for task, points in tasks.items():
                assert points.tolist() == [whole[column][task][7], whole[column][task][2]]
    assert len(part) == 2 * len({(r.study, r.condition, r.task) for r in records})


def test_cells_are_announced_before_they_run(models, items) -> None:
    seen = []
    few = {"truth": items["truth"][:2]}
    run_study(models, few, on_cell=lambda cell, done, total: seen.append((cell.condition.name, done, total)))
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


def spread(start: float) -> list[float]:
    """Scores of twelve items around `start`, all different, so that no mean is a round number."""
    return [start + index**1.5 / 4 for index in range(12)]


def with_scores(records, table: str, changes) -> list[Record]:
    """The same records with new scores: condition -> one for all, or task -> one or a list over the items."""
    found, counts = [], {}
    for record in records:
        change = changes.get(record.condition) if record.study == table else None
        change = change.get(record.task) if isinstance(change, dict) else change
        index = counts[key] = counts.get(key := (record.study, record.condition, record.task), -1) + 1
        score = change[index] if isinstance(change, list) else change
        found.append(record if change is None else replace(record, score=score))
    return found


def test_averages_ratios_and_gaps_follow_from_the_means(records) -> None:
    """Known scores in every column that the figures need: none of them may be missing then."""
    known = {
        "single": {"dynamic": 60.0, "expert": 40.0, "ceiling": 80.0},
        "multi": {"dynamic": 50.0, "mixed": 30.0, "ceiling": 85.0},
    }
    shifts = {"single": {"facts": 0.0, "truth": 7.0}, "multi": {"facts": 0.0, "truth": 3.0, "domains": -11.0}}
    for table, starts in known.items():
        changed = {c: {t: spread(start + s) for t, s in shifts[table].items()} for c, start in starts.items()}
        records = with_scores(records, table, changed)
    document = summary.summarise(records, TUNED, num_draws=100)
    mean = sum(spread(0.0)) / 12
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
    assert averages["single"] == {*SINGLE, "expert", "strong"} - {"dynamic"}
    assert averages["multi"] == {*MULTI, "mixed"} - {"dynamic"} | {"strong"}


@pytest.mark.parametrize(("table", "column"), [("single", "static_1.5"), ("multi", "static_mean")])
def test_the_best_static_alpha_is_found_in_both_tables(records, table: str, column: str) -> None:
    document = summary.summarise(with_scores(records, table, {column: 99.0}), TUNED, num_draws=20)
    assert document["best_static"][table] == column
    told = findings.sentences({**document, "pair": "far"})
    assert any(f"{label(column)}, the best static alpha in hindsight" in sentence for sentence in told)


def test_the_table_of_all_experts_has_every_rival_with_the_papers_chooser() -> None:
    by_paper = {"static_0.5", "static_1.0", "static_1.5", "grid", "dynamic", "cautious", "filter"}
    assert {name for name, spec in MULTI.items() if spec.chooser == Fused("dynamic").chooser} == by_paper
    assert MULTI["filter_sum"] == Fused("filter", "sum")


def test_every_column_has_a_name_and_a_colour_of_its_own() -> None:
    for columns in (SINGLE, MULTI):
        assert len({LOOKS[column].label for column in columns}) == len(columns)
        assert len({LOOKS[column].colour for column in columns}) == len(columns)


def test_the_headline_names_the_best_static_alpha_and_the_page_groups_losses_by_task(records, tmp_path: Path) -> None:
    document = summary.summarise(
        with_scores(records, "multi", {"dynamic": 40.0, "static_0.5": 77.0}), TUNED, num_draws=50
    )
    document |= {"pair": "far", "versions": {}}
    found = {"far": {"pooled": document, "draws": [{"seed": 0, "items": 12}], "spread": {}}}
    best, ours = (next(x for x in headline_table(found).splitlines() if name in x) for name in ("best", "Dynamic"))
    assert best.endswith("| 77.0 (alpha 0.5) |")
    assert ours.endswith("| 40.0 |")
    page = page_text(found, tmp_path / "results.md")
    assert page.count("On facts (all experts) DLF is below") == 1
    assert "static, alpha 0.5 by 37.0" in page
    assert page.count("the paper's rule picks one expert per token") == 1


@torch.inference_mode()
def test_an_answer_bound_to_the_style_opens_with_the_likeliest_opening(models, items) -> None:
    """Against the model itself: the opening it likes best, and what it writes after it."""
    asked = [replace(item, choices=(" Moss", " cat")) for item in items["facts"][:4]]
    kind, seen, strong = TASKS["facts"], [], models.models["strong"]
    for item in asked:
        sums = []
        for choice in item.choices:
            ids = models.tokenizer(item.prompt + choice, return_tensors="pt")["input_ids"]
            start = len(models.tokenizer(item.prompt)["input_ids"])
            log_probs = strong(input_ids=ids).logits.float().log_softmax(dim=-1)[0]
            sums.append(float(sum(log_probs[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))))
        opening = item.choices[sums.index(max(sums))]
        prefixes = evaluate.read_prompts(strong, models.tokenizer, [item.prompt + opening], 5)
        seen.append(opening + evaluate.answer_prompts(strong, models.tokenizer, prefixes, 5)[0])
    right = [replace(item, target=answer) for item, answer in zip(asked, seen, strict=True)]
    assert forced_points(models, kind, right, "strong") == [100.0] * 4
    wrong = [replace(item, target=answer + "x") for item, answer in zip(asked, seen, strict=True)]
    assert forced_points(models, kind, wrong, "strong") == [0.0] * 4


def test_items_with_a_label_are_answered_by_choosing_even_where_the_task_writes(models, items) -> None:
    asked = [
        replace(item, choices=(" Moss", " cat", " Elm"), label=index % 3) for index, item in enumerate(items["facts"])
    ]
    _, as_choice = Answering(models.models, models.tokenizer, TASKS["truth"], asked).ask(models.alone("strong"))
    assert 0.0 < sum(as_choice) < 1200.0
    assert forced_points(models, TASKS["facts"], asked, "strong") == as_choice


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


def test_the_findings_say_so_when_the_rule_loses(records) -> None:
    lost = with_scores(
        records, "single", {"dynamic": 20.0, "expert": 60.0, "static_1.0": 90.0, "ceiling": 95.0, "strong": 0.0}
    )
    told = findings.sentences({**summary.summarise(lost, TUNED, num_draws=100), "pair": "far"})
    assert any(
        "DLF loses to static, alpha 1, the best static alpha in hindsight: -70.0" in sentence for sentence in told
    )
    assert any("DLF loses to small expert alone" in sentence for sentence in told)
    assert any("the best average is that of static, alpha 1" in sentence for sentence in told)
    assert any("recovers -114% of the gap" in sentence for sentence in told)


def test_the_findings_claim_nothing_without_a_difference(records) -> None:
    same = with_scores(records, "single", {"dynamic": 50.0, "static_1.0": 50.0, "ceiling": 50.2, "expert": 50.0})
    told = findings.sentences({**summary.summarise(same, TUNED, num_draws=100), "pair": "far"})
    assert any(
        "static, alpha 1, the best static alpha in hindsight: +0.0 points" in s and "No difference is shown" in s
        for s in told
    )
    assert any("no gap to recover" in sentence for sentence in told)


def test_the_report_folder_holds_page_plots_and_document(tmp_path: Path, models, document, records, items) -> None:
    fused = models.fuse(("facts",))
    trace = fused.trace(items["facts"][0].prompt, max_new_tokens=4).to_dict()
    page = report.write_report(tmp_path, document, records, items, [report.Shown("facts", " Moss", trace)])
    written = {file.name for file in tmp_path.iterdir()}
    pages = {"index.html", "single.png", "multi.png", "results.json", "explain-facts.html", "explain-facts.png"}
    assert written >= pages
    assert (tmp_path / "single.png").read_bytes()[:4] == b"\x89PNG"
    html = page.read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    assert f"{document['average']['single']['dynamic']:.1f}" in html
    assert json.loads((tmp_path / "results.json").read_text())["items"] == 12


def test_the_report_page_opens_with_the_picture_and_few_findings(browser, tmp_path: Path, document, records, items):
    file = report.write_report(tmp_path, document, records, items, [])
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    troubles: list[str] = []
    page.on("request", lambda request: None if request.url.startswith("file:") else troubles.append(request.url))
    page.goto(file.as_uri())
    pictures, shown = page.locator("img"), page.locator("li:visible")
    assert pictures.count() == 2
    assert pictures.first.evaluate("image => image.naturalWidth") > 500
    assert pictures.first.bounding_box()["y"] < 250
    assert 1 <= shown.count() <= 5
    assert page.locator("table:visible").count() == 0
    for folded in page.locator("#report > details").all():
        folded.locator("summary").first.click()
    assert page.locator("li:visible").count() > 25
    table = page.locator("table").first
    cells = table.locator("tr[data-key=dynamic] td[data-head=average]").inner_text().split()
    low, high = document["intervals"]["average"]["single"]["dynamic"]
    assert float(cells[0]) == pytest.approx(document["average"]["single"]["dynamic"], abs=0.051)
    assert (float(cells[-3]), float(cells[-1])) == pytest.approx((low, high), abs=0.051)
    page.close()
    assert [url for url in troubles if not url.startswith("data:")] == []


def test_the_star_marks_the_best_strategy_and_never_a_model_alone(records) -> None:
    best = with_scores(records, "single", {"ceiling": 100.0, "mixture": 99.0})
    document = {**summary.summarise(best, TUNED, num_draws=50), "pair": "far"}
    grid = findings.table_grid(document, "single")
    stars = {row.key for row in grid.rows for cell in row.cells if cell.is_best}
    assert stars == {"mixture"}


ROOT = Path(__file__).parents[2]
FIGURE = re.compile(r"-?\d+(?:\.\d+)?")


def test_the_page_in_the_repository_is_that_of_its_data() -> None:
    """What was measured once is shown by today's code with the same words and figures."""
    found = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
    page = ROOT / "docs" / "results.md"
    assert page_text(found, page) == page.read_text(encoding="utf-8"), "run `trimtab results --redraw --force`"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert headline_table(found) == readme.split(START)[1].split(END)[0].strip()


def test_every_figure_of_the_data_stands_on_the_page() -> None:
    """Read without the code that writes the page: each average and its interval, in the line of its condition."""
    found = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for pair, measured in found.items():
        part, spans = page.split(f"## The {pair} pair")[1].split("\n## ")[0], measured["pooled"]["intervals"]
        tables = part.split("### One expert per task")[1].split("### All experts at once")
        for table, text in zip(("single", "multi"), tables, strict=True):
            lines = {
                line.split(" | ")[0].strip("| "): FIGURE.findall(line) for line in text.split("\n### ")[0].splitlines()
            }
            for name, average in measured["pooled"]["average"][table].items():
                shown = lines[label(name)]
                expected = [average, *spans["average"][table][name]]
                assert {f"{value:.1f}" for value in expected} <= set(shown), (pair, table, name)
