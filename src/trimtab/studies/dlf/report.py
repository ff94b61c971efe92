"""The report folder of one pair: a self-contained page that opens with the picture, plots, answers and traces."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure import pages
from trimtab.measure.explain_page import explain_page, view
from trimtab.measure.plots import alpha_plot
from trimtab.measure.records import Record, answers_of
from trimtab.measure.tables import only_rows
from trimtab.studies.dlf import findings
from trimtab.studies.dlf.conditions import FIRST, LOOKS, TABLES, TITLES, WEAK, label
from trimtab.studies.dlf.page import draw_tables
from trimtab.studies.dlf.summary import Document
from trimtab.studies.models import SIZE_OF

SHOWN_ANSWERS = ("base", "expert", "strong", "static_1.0", "dynamic", "ceiling")
EXAMPLES_PER_TASK = 3
WORDS = {
    "single": "Each task with its own expert. The strong model is never trained; the ceiling is what training it would "
    "give. Small figures are 95% bootstrap intervals over items; a star marks the best strategy of a column. "
    "PGR is the share of the gap between the small expert and the ceiling that is recovered.",
    "multi": "The question does not say which task it belongs to: all experts are there at every token, and the "
    "strategy chooses: one expert by the paper's rule where its name says nothing else; means and sums take all. "
    "The average gives the seen tasks together and the unseen ones the same weight; PGR counts from the small model "
    "that was tuned on all tasks.",
    "unseen": "No expert was tuned on this task: what is gained or lost here comes from other tasks' experts.",
    "paired": "Differences on the same items in points of 100, with 95% intervals; p is from a two-sided sign-flip "
    "test. Many comparisons stand here: a p just under 0.05 in one of them is no discovery.",
    "paper": "Other models, other tasks: the comparison is of kind, not of size. "
    "The ratio of averages is what the paper calls closing the gap; PGR is computed from its averages.",
}


@dataclass(frozen=True)
class Shown:
    """One answer that is shown token by token."""

    task: str
    target: str
    trace: Mapping[str, Any]

    @property
    def view(self) -> dict[str, Any]:
        """As templates show it."""
        return view(self.trace)


def write_report(
    folder: Path,
    document: Document,
    records: Sequence[Record],
    items: Mapping[str, Sequence[Any]],
    shown: Sequence[Shown],
) -> Path:
    """Write index.html, its plots as PNG, a page per shown answer and the document as JSON; returns the page."""
    plots = draw_tables(folder, document)
    for answer in shown:
        write_whole(folder / f"explain-{answer.task}.html", explain_page(answer.trace))
        alpha_plot(answer.trace, folder / f"explain-{answer.task}.png")
    write_whole(folder / "results.json", json.dumps(pages.finite(document), indent=2))
    page = folder / "index.html"
    write_whole(page, report_page(document, records, items, shown, plots))
    return page


def report_page(
    document: Document,
    records: Sequence[Record],
    items: Mapping[str, Sequence[Any]],
    shown: Sequence[Shown],
    plots: Mapping[str, Path],
) -> str:
    """The page as text: picture, averages and key findings; everything else is folded."""
    first = next(iter(plots), None)
    key = findings.key_findings(document)
    rest = [
        one
        for one in [*findings.sentences(document), *findings.negatives(document)]
        if not any(shown.endswith(one) for shown in key)
    ]
    versions = ", ".join(f"{name} {number}" for name, number in document.get("versions", {}).items())
    return pages.render(
        "demo.html",
        Path(__file__).parent,
        title=f"trimtab demo · {document['pair']} pair",
        heading=f"What small experts teach a strong model: the {document['pair']} pair",
        motto="a strong model, steered by small experts",
        lead=f"{document['items']} test items per task, greedy answers, seed {document['seed']}, "
        f"{document['seconds']:.0f} seconds. The small models have {SIZE_OF[document['pair']]}; the strong one is "
        "never trained.",
        plot=plots[first] if first else None,
        plot_words=TITLES[first] if first else "",
        cards=_cards(document),
        findings=key,
        more_findings=rest,
        sections=_sections(document, plots, first),
        shown=shown,
        answers=list(_answers(records, items)),
        made_by=f"Made by trimtab demo; every figure stands in results.json beside this page. {versions}",
    )


def _cards(document: Document) -> list[dict[str, str]]:
    """The averages that matter, as large figures."""
    table = "single" if document["single"] else "multi"
    average = document["average"].get(table, {})
    return [
        {"key": name, "text": f"{average[name]:.1f}", "name": label(name), "kind": LOOKS[name].kind}
        for name in ("strong", WEAK[table], "static_1.0", FIRST, "ceiling")
        if name in average
    ]


def _sections(document: Document, plots: Mapping[str, Path], first: str | None) -> list[dict[str, Any]]:
    """Every table with its words; the first picture stands at the top of the page already."""
    found: list[dict[str, Any]] = []
    for table in TABLES:
        if document[table]:
            plot = None if table == first else plots.get(table)
            found.append({"grids": [findings.table_grid(document, table)], "words": WORDS[table], "plot": plot})
    found += [{"grids": [grid], "words": WORDS["unseen"]} for grid in findings.unseen_grids(document)]
    rivals = findings.rivals_grid(document)
    found.append({"grids": [only_rows(rivals, ("",)), only_rows(rivals, ("reference",))], "words": WORDS["paired"]})
    words = f"{document['paper']['source']}. {WORDS['paper']}"
    found.append({"grids": [findings.paper_grid(document)], "words": words})
    return [{"title": one["grids"][0].title, "plot": None, **one} for one in found]


def _answers(records: Sequence[Record], items: Mapping[str, Sequence[Any]]) -> Any:
    """Some answers of every condition side by side, right and wrong ones alike."""
    for task, asked in items.items():
        found = answers_of(records, "single", task)
        columns = [name for name in SHOWN_ANSWERS if name in found]
        if not columns:
            continue
        lines = [
            {
                "prompt": asked[index].prompt,
                "target": asked[index].target.strip(),
                "answers": [{"text": found[c][index].answer.strip(), "points": found[c][index].score} for c in columns],
            }
            for index in _telling(found)
        ]
        yield {"task": task, "heads": [label(name) for name in columns], "lines": lines}


def _telling(found: Mapping[str, Sequence[Record]]) -> list[int]:
    """Items worth showing, chosen by rule and for both sides."""
    indices = [0]
    if all(name in found for name in (FIRST, "expert", "strong")):
        scores = [[record.score for record in found[name]] for name in (FIRST, "expert", "strong")]
        points = list(enumerate(zip(*scores, strict=True)))
        gained = [index for index, (fused, expert, strong) in points if fused > expert and fused > strong]
        lost = [index for index, (fused, expert, _) in points if fused < expert]
        indices = [*gained[:1], *lost[:1], 0]
    return list(dict.fromkeys(indices))[:EXAMPLES_PER_TASK]
