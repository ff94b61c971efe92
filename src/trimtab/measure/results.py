"""docs/results.md from several draws of test items: what was measured, with its spread, and what did not work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure import pages, tables, verdict
from trimtab.measure.report import draw_tables, paper_grid

Document = Mapping[str, Any]
BEST_STATIC = "best static"  # a row of the headline table, no column of a study
WORDS = {
    "single": "Each task with its own expert; alpha 1 is Proxy-Tuning.",
    "multi": "No one says which task a question belongs to. Where a name says neither all experts nor the most "
    "confident one, the paper's rule picks one expert per token; means take all. All experts with alpha 1 is "
    "Proxy-Tuning. The average gives the seen tasks together and the unseen one the same weight.",
}
START, END = "<!-- results:start -->", "<!-- results:end -->"


def collect(pairs: Mapping[str, Sequence[Document]], pooled: Mapping[str, Document]) -> dict[str, Any]:
    """The JSON beside the page: for each pair the document of all items together, and the averages of each draw.

    pairs   pair -> one document per draw of items
    pooled  pair -> the document over all distinct items of those draws
    """
    return {
        pair: {
            "pooled": pooled[pair],
            "draws": [
                {"seed": document["seed"], "items": document["items"], "average": document["average"]}
                for document in documents
            ],
            "spread": {table: _spread(documents, table) for table in ("single", "multi")},
        }
        for pair, documents in pairs.items()
    }


def _spread(documents: Sequence[Document], table: str) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each column's average over the draws."""
    columns = documents[0]["average"].get(table, {})
    values = {c: [document["average"][table][c] for document in documents] for c in columns}
    return {c: {"mean": round(fmean(v), 3), "sd": round(stdev(v), 3) if len(v) > 1 else 0.0} for c, v in values.items()}


def write_page(page: Path, found: Mapping[str, Any]) -> None:
    """The page, and beside it one picture per pair and table."""
    for pair, measured in found.items():
        draw_tables(page.parent, measured["pooled"], prefix=picture_prefix(page, pair))
    write_whole(page, markdown(found, page))


def picture_prefix(page: Path, pair: str) -> str:
    """docs/results.md, far -> results-far-"""
    return f"{page.stem}-{pair}-"


def markdown(found: Mapping[str, Any], page: Path) -> str:
    """The whole page, as it is to stand at `page`."""
    some = next(iter(found.values()))["pooled"]
    seeds = ", ".join(str(draw["seed"]) for draw in next(iter(found.values()))["draws"])
    per_draw = next(iter(found.values()))["draws"][0]["items"]
    counts = ", ".join(f"{task} {count}" for task, count in some["num_items"].items())
    versions = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    parts = [
        "# Measured results",
        "",
        "Written by `trimtab results`; do not edit. "
        f"Each draw takes up to {per_draw} test items per task (seeds {seeds}); the tables pool all distinct items "
        f"({counts}). Answers are greedy. Scores are points of 100, in brackets 95% bootstrap intervals over items; "
        "± is the standard deviation over the draws. "
        "*Ratio* is the ratio of averages that Fan et al. 2024 call closing the gap; *PGR* is the performance gap "
        "recovered of Burns et al. 2023, (fused - expert) / (ceiling - expert), in the table of all experts counted "
        "from the small model tuned on all tasks.",
        "",
        f"Versions: {versions}. No setting was tuned on these items.",
        "",
    ]
    for pair, measured in found.items():
        parts += _pair(pair, measured, picture_prefix(page, pair))
    return "\n".join(parts).rstrip() + "\n"


def _pair(pair: str, measured: Mapping[str, Any], prefix: str) -> list[str]:
    document = measured["pooled"]
    parts = [f"## The {pair} pair", "", "What was found, for the better and for the worse:", ""]
    parts += [f"- {sentence}" for sentence in verdict.sentences(document)]
    parts += [f"- {sentence}" for sentence in negatives(document)]
    parts.append("")
    for grid, table in ((tables.single_grid(document), "single"), (tables.multi_grid(document), "multi")):
        if grid.rows:
            picture = f"![{grid.title}, {pair} pair]({prefix}{table}.png)"
            spread = measured["spread"].get(table, {})
            parts += [f"### {grid.title}", "", WORDS[table], "", picture, "", _table(grid, spread), ""]
    for grid in tables.unseen_grids(document):
        parts += [f"### {grid.title}", "", _table(grid), ""]
    parts += ["### Beside the paper", "", f"{document['paper']['source']}.", "", _table(paper_grid(document)), ""]
    words = "Every strategy and the models alone; with so many comparisons a p just under 0.05 is no discovery."
    parts += ["### DLF against its rivals, same items", "", words, "", _table(tables.paired_grid(document)), ""]
    return parts


def negatives(document: Document) -> list[str]:
    """What did not work, found in the numbers: on each task the rivals above DLF, p < 0.05, and experts diluted."""
    losses: dict[str, list[str]] = {}
    for row in document["paired"]:
        if row["tasks"] == "average" or row["p_value"] >= verdict.SIGNIFICANT or row["difference"] >= 0:
            continue
        kind = "one expert" if row["table"] == "single" else "all experts"
        losses.setdefault(f"{row['tasks']} ({kind})", []).append(
            f"{verdict.name_of(row['second'])} by {-row['difference']:.1f} (p = {row['p_value']:.2g})"
        )
    found = [f"On {where} DLF is below {'; '.join(rivals)}." for where, rivals in losses.items()]
    for task, columns in document["unseen"].items():
        if "dynamic" in columns and columns["dynamic"] < columns["strong"]:
            found.append(
                f"On the unseen {task} DLF with all experts scores {columns['dynamic']:.1f}, below the untuned strong "
                f"model's {columns['strong']:.1f}."
            )
    return found


def _table(grid: tables.Grid, spread: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A grid in Markdown; the average carries its spread over the draws."""
    lines = ["| | " + " | ".join(grid.heads) + " |", "|---" + "|--:" * len(grid.heads) + "|"]
    for row in grid.rows:
        cells = []
        for head, cell in zip(grid.heads, row.cells, strict=True):
            text = f"**{cell.text}**" if cell.is_best else cell.text
            if head == "average" and spread and row.column in spread:
                text += f" ± {spread[row.column]['sd']:.1f}"
            cells.append(f"{text} ({cell.interval.replace(' ', '')})" if cell.interval else text)
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline_table(found: Mapping[str, Any]) -> str:
    """The few lines that the README shows: averages with one expert per task, and with all experts at once."""
    documents = {pair: measured["pooled"] for pair, measured in found.items()}
    heads = [f"{pair} pair, {what}" for pair in documents for what in ("one expert", "all experts")]
    lines = ["| average score of 100 | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
    rows = [
        ("strong model, untuned", "strong", "strong"),
        ("small expert alone; small model tuned on all tasks", "expert", "mixed"),
        ("static alpha 1 (proxy-tuning)", "static_1.0", "static_sum"),
        ("best static alpha, known in hindsight", BEST_STATIC, BEST_STATIC),
        ("smaller root", "cautious", "cautious"),
        ("mean of strong model and expert", "mixture", "mixture"),
        ("**DLF**, the paper's rule", "dynamic", "dynamic"),
        ("DLF, most confident expert", None, "dynamic_confident"),
        ("posterior filter", "filter", "filter"),
        ("posterior filter, most confident expert", None, "filter_confident"),
        ("strong model, tuned (ceiling)", "ceiling", "ceiling"),
    ]
    for name, single, multi in rows:
        cells = [
            _average_cell(document, table, column)
            for document in documents.values()
            for table, column in (("single", single), ("multi", multi))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for kind, label, digits in (
        ("ratio", "DLF's ratio to the ceiling (paper's)", 3),
        ("pgr", "DLF's PGR (paper's)", 2),
    ):
        cells = []
        for pair, document in documents.items():
            for table in ("single", "multi"):
                ours = document[kind].get(table, {}).get("dynamic")
                theirs = document["paper"][kind].get(table, {}).get(pair)
                cells.append(f"{pages.number(ours, digits)} ({pages.number(theirs, digits)})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _average_cell(document: Document, table: str, column: str | None) -> str:
    """The average of a column with its interval, and its name where the row does not say it; a dash where it is not."""
    is_best = column == BEST_STATIC
    column = document["best_static"].get(table) if is_best else column
    if column is None:
        return pages.number(None, 1)
    span = (document["intervals"]["average"].get(table) or {}).get(column)
    between = f" ({span[0]:.1f}–{span[1]:.1f})" if span else ""
    name = f", {verdict.name_of(column).removeprefix('static, ')}" if is_best else ""
    return pages.number(document["average"].get(table, {}).get(column), 1) + between + name


def replace_between_markers(text: str, content: str, start: str = START, end: str = END) -> str:
    """The text with `content` between two markers; raises ValueError where they are not there once each."""
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected {start} and then {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
