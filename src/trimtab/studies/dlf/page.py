"""docs/results.md from several draws of test items: what was measured, with its spread, and what did not work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure.plots import score_plot
from trimtab.measure.tables import NONE, Cell, Grid, Row, markdown, number
from trimtab.studies.dlf import findings
from trimtab.studies.dlf.conditions import KINDS, TABLES, TITLES, label, looks_of
from trimtab.studies.dlf.summary import Document, description, tasks_of

BEST_STATIC = "best static"  # a row of the headline table, no condition
WORDS = {
    "single": "Each task with its own expert; alpha 1 is Proxy-Tuning.",
    "multi": "No one says which task a question belongs to. Where a name says neither all experts nor the most "
    "confident one, the paper's rule picks one expert per token; means take all. All experts with alpha 1 is "
    "Proxy-Tuning. The average gives the seen tasks together and the unseen one the same weight.",
}
START, END = "<!-- results:start -->", "<!-- results:end -->"
HEADLINES = (  # what a line of the README says, and its condition with one expert and with all
    ("strong model, untuned", "strong", "strong"),
    ("small expert; small model tuned on all tasks", "expert", "mixed"),
    ("static alpha 1 (proxy-tuning)", "static_1.0", "static_sum"),
    ("best static alpha, chosen afterwards", BEST_STATIC, BEST_STATIC),
    ("**Dynamic Logits Fusion**", "dynamic", "dynamic"),
    ("strong model, tuned (ceiling)", "ceiling", "ceiling"),
)


def collect(pairs: Mapping[str, Sequence[Document]], pooled: Mapping[str, Document]) -> dict[str, Any]:
    """The JSON beside the page: for each pair the document of all items together, and the averages of each draw.

    pairs   pair -> one document per draw of items
    pooled  pair -> the document over all distinct items of those draws
    """
    return {
        pair: {
            "pooled": pooled[pair],
            "draws": [{key: document[key] for key in ("seed", "items", "average")} for document in documents],
            "spread": {table: _spread(documents, table) for table in TABLES},
        }
        for pair, documents in pairs.items()
    }


def _spread(documents: Sequence[Document], table: str) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each condition's average over the draws."""
    columns = documents[0]["average"].get(table, {})
    values = {c: [document["average"][table][c] for document in documents] for c in columns}
    return {c: {"mean": round(fmean(v), 3), "sd": round(stdev(v), 3) if len(v) > 1 else 0.0} for c, v in values.items()}


def draw_tables(folder: Path, document: Document, prefix: str = "") -> dict[str, Path]:
    """One PNG per table, named PREFIXsingle.png and PREFIXmulti.png."""
    found = {table: folder / f"{prefix}{table}.png" for table in TABLES if document[table]}
    for table, file in found.items():
        described = description(document, table)
        groups = [*tasks_of(document, table), *(["average"] if table == "single" else [])]
        score_plot(TITLES[table], described, looks_of(list(described["scores"])), groups, file)
    return found


def write_page(page: Path, found: Mapping[str, Any]) -> None:
    """The page, and beside it one picture per pair and table."""
    for pair, measured in found.items():
        draw_tables(page.parent, measured["pooled"], prefix=picture_prefix(page, pair))
    write_whole(page, page_text(found, page))


def picture_prefix(page: Path, pair: str) -> str:
    """docs/results.md, far -> results-far-"""
    return f"{page.stem}-{pair}-"


def page_text(found: Mapping[str, Any], page: Path) -> str:
    """The whole page, as it is to stand at `page`."""
    first = next(iter(found.values()))
    some, per_draw = first["pooled"], first["draws"][0]["items"]
    seeds = ", ".join(str(draw["seed"]) for draw in first["draws"])
    counts = ", ".join(f"{task} {count}" for task, count in some["num_items"].items())
    versions = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    parts = [
        "# Measured results",
        "",
        "Written by `trimtab results`; do not edit. No setting was tuned on these items.",
        "",
        f"- Each draw takes up to {per_draw} test items per task (seeds {seeds}); the tables pool all distinct items "
        f"({counts}).",
        "- Answers are greedy. Scores are points of 100, in brackets 95% bootstrap intervals over items; ± is the "
        "standard deviation over the draws.",
        "- *Ratio* is the ratio of averages that Fan et al. 2024 call closing the gap.",
        "- *PGR* is the performance gap recovered of Burns et al. 2023, (fused - expert) / (ceiling - expert); with "
        "all experts the small model tuned on all tasks stands for the expert.",
        f"- Versions: {versions}.",
        "",
    ]
    for pair, measured in found.items():
        parts += _pair(pair, measured, picture_prefix(page, pair))
    return "\n".join(parts).rstrip() + "\n"


def _pair(pair: str, measured: Mapping[str, Any], prefix: str) -> list[str]:
    document = measured["pooled"]
    parts = [f"## The {pair} pair", "", *_bullets(findings.key_findings(document))]
    for table in TABLES:
        grid = findings.table_grid(document, table)
        if grid.rows:
            shown = _with_spread(grid, measured["spread"].get(table, {}))
            picture = f"![{grid.title}, {pair} pair]({prefix}{table}.png)"
            parts += [f"### {grid.title}", "", WORDS[table], "", picture, "", markdown(shown), ""]
    for grid in findings.unseen_grids(document):
        parts += [f"### {grid.title}", "", markdown(grid), ""]
    source = f"{document['paper']['source']}."
    parts += ["### Beside the paper", "", source, "", markdown(findings.paper_grid(document)), ""]
    parts += ["### What did not work", "", *_bullets(findings.negatives(document))]
    parts += ["### DLF against each rival, on average", "", *_bullets(findings.sentences(document))]
    words = "Every strategy and the models alone; with so many comparisons a p just under 0.05 is no discovery."
    parts += ["### DLF against its rivals, same items", "", words, "", markdown(findings.rivals_grid(document)), ""]
    return parts


def _bullets(sentences: Sequence[str]) -> list[str]:
    return [*(f"- {sentence}" for sentence in sentences), ""]


def _with_spread(grid: Grid, spread: Mapping[str, Mapping[str, float]]) -> Grid:
    """The same table; averages carry their spread over the draws."""

    def marked(row: Row) -> Row:
        after = f" ± {spread[row.key]['sd']:.1f}" if row.key in spread else ""
        cells = zip(grid.heads, row.cells, strict=True)
        return replace(row, cells=tuple(replace(c, after=after) if head == "average" else c for head, c in cells))

    return replace(grid, rows=tuple(map(marked, grid.rows)))


def headline_table(found: Mapping[str, Any]) -> str:
    """The few lines that the README shows: averages with one expert per task, and with all experts at once."""
    columns = [(pair, own["pooled"], index) for pair, own in found.items() for index in range(len(TABLES))]
    rows = [
        Row(
            name, name, tuple(_average_cell(document, TABLES[index], by_table[index]) for _, document, index in columns)
        )
        for name, *by_table in HEADLINES
    ]
    heads = tuple(f"{pair} pair, {KINDS[TABLES[index]]}" for pair, _, index in columns)
    return markdown(Grid("", heads, tuple(rows), corner="average score of 100"))


def _average_cell(document: Document, table: str, name: str) -> Cell:
    """The average of a condition; of the best static one, its alpha as well."""
    if name != BEST_STATIC:
        return Cell(number(document["average"].get(table, {}).get(name)))
    best = document["best_static"].get(table)
    if best is None:
        return Cell(NONE)
    return Cell(f"{number(document['average'][table][best])} ({label(best).removeprefix('static, ')})")
