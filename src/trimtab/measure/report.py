"""The report folder of a study: one self-contained page with its tables, plots, answers and traces."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure import pages, tables, verdict
from trimtab.measure.explain_page import explain_page, token_strip
from trimtab.measure.plots import alpha_plot, score_plot
from trimtab.measure.study import Scores

SHOWN_ANSWERS = ("base", "expert", "strong", "static_1.0", "dynamic", "ceiling")
EXAMPLES_PER_TASK = 3


@dataclass(frozen=True)
class Shown:
    """One answer that is shown token by token."""

    task: str
    target: str
    trace: Mapping[str, Any]


def write_report(folder: Path, document: Mapping[str, Any], scores: Scores, shown: Sequence[Shown]) -> Path:
    """Write index.html, its plots as PNG, a page per shown answer and the document as JSON; returns the page."""
    plots = draw_tables(folder, document)
    for answer in shown:
        write_whole(folder / f"explain-{answer.task}.html", explain_page(answer.trace))
        alpha_plot(answer.trace, folder / f"explain-{answer.task}.png")
    write_whole(folder / "results.json", json.dumps(pages.finite(document), indent=2))
    page = folder / "index.html"
    write_whole(page, report_page(document, scores, shown, plots))
    return page


def report_page(document: Mapping[str, Any], scores: Scores, shown: Sequence[Shown], plots: Mapping[str, Path]) -> str:
    """The page as text."""
    pair = document["pair"]
    sections = []
    if document["single"]:
        sections.append(_section(tables.single_grid(document), plots.get("single"), _ONE))
    if document["multi"]:
        sections.append(_section(tables.multi_grid(document), plots.get("multi"), _ALL))
    sections += [
        _section(grid, plots.get(f"unseen-{grid.heads[0]}"), _UNSEEN) for grid in tables.unseen_grids(document)
    ]
    sections.append(_paired(document))
    sections += [_paper(document), _traces(shown), _answers(scores)]
    return pages.fill(
        "report.html",
        title=f"trimtab demo · {pair} pair",
        heading=f"What small experts teach a strong model: the {pages.text(pair)} pair",
        lead=_lead(document),
        hero=_hero(document),
        findings="".join(f"<li>{pages.text(sentence)}</li>" for sentence in verdict.sentences(document)),
        sections="".join(sections),
        footer=_footer(document),
    )


_ONE = (
    "Each task with its own expert. The strong model is never trained; the ceiling is what training it would give. "
    "Small figures are 95% bootstrap intervals over items; a star marks the best strategy of a column. "
    "PGR is the share of the gap between the small expert and the ceiling that is recovered."
)
_ALL = (
    "Nobody says which task a question belongs to: all experts are there at every token, and the strategy chooses: "
    "one expert by the paper's rule where its name says nothing else; means and sums take all. "
    "The average gives the seen tasks together and the unseen ones the same weight; PGR counts from the small model "
    "that was tuned on all tasks."
)
_UNSEEN = "No expert was tuned on this task: what is gained or lost here comes from other tasks' experts."
_PAIRED = (
    "Differences on the same items in points of 100, with 95% intervals; p is from a two-sided sign-flip test. "
    "Many comparisons stand here: a p just under 0.05 in one of them is no discovery."
)


def _lead(document: Mapping[str, Any]) -> str:
    models = "about 0.3 M parameters" if document["pair"] == "far" else "about 1.5 M parameters"
    return (
        f"{document['items']} test items per task, greedy answers, seed {document['seed']}, "
        f"{document['seconds']:.0f} seconds. The small models have {models}; the strong one is never trained."
    )


def _hero(document: Mapping[str, Any]) -> str:
    """The averages that matter, as large figures."""
    table = "single" if document["single"] else "multi"
    weak = "expert" if table == "single" else "mixed"
    average = document["average"].get(table, {})
    cards = []
    for column in ("strong", weak, "static_1.0", "dynamic", "ceiling"):
        if column in average:
            ours = " is-ours" if column == "dynamic" else ""
            figure = f'<b class="num">{average[column]:.1f}</b><span>{pages.text(verdict.name_of(column))}</span>'
            cards.append(f'<div class="card{ours}" data-column="{column}">{figure}</div>')
    return "".join(cards)


def _section(grid: tables.Grid, plot: Path | None, words: str) -> str:
    image = ""
    if plot is not None:
        data = base64.b64encode(plot.read_bytes()).decode("ascii")
        image = f'<img alt="{pages.text(grid.title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{pages.text(grid.title)}</h2><p>{pages.text(words)}</p>{html_table(grid)}{image}"


def html_table(grid: tables.Grid) -> str:
    """A grid as an HTML table; figures carry data-column and data-head, so that they can be found."""
    head = "".join(f"<th>{pages.text(name)}</th>" for name in ("", *grid.heads))
    lines = []
    for row in grid.rows:
        kind = "is-ours" if row.column == "dynamic" else "is-reference" if row.is_reference else ""
        cells = "".join(
            f'<td data-head="{pages.text(name)}"{" class=is-best" if cell.is_best else ""}>{_figure(cell)}'
            f"{f'<small>{pages.text(cell.interval)}</small>' if cell.interval else ''}</td>"
            for name, cell in zip(grid.heads, row.cells, strict=True)
        )
        lines.append(
            f'<tr class="{kind}" data-column="{pages.text(row.column)}"><td>{pages.text(row.name)}</td>{cells}</tr>'
        )
    body = "".join(lines)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _paired(document: Mapping[str, Any]) -> str:
    """The averages; single tasks are folded away."""
    grid = tables.paired_grid(document)
    averages = tables.Grid(grid.title, grid.heads, tuple(row for row in grid.rows if not row.is_reference))
    more = f"<details><summary>Task by task</summary><br>{html_table(grid)}</details>"
    return _section(averages, None, _PAIRED) + f"<br>{more}"


def _figure(cell: tables.Cell) -> str:
    return f"<b>{pages.text(cell.text)}</b>" if cell.is_best else pages.text(cell.text)


def paper_grid(document: Mapping[str, Any]) -> tables.Grid:
    """The paper's own figures beside ours."""
    pair, printed = document["pair"], document["paper"]
    rows = []
    for label, kind, table in (
        ("ratio to the ceiling, one expert", "ratio", "single"),
        ("ratio to the ceiling, all experts", "ratio", "multi"),
        ("PGR, one expert", "pgr", "single"),
        ("PGR, all experts", "pgr", "multi"),
    ):
        theirs = printed[kind].get(table, {}).get(pair)
        ours = document[kind].get(table, {}).get("dynamic")
        span = (document["intervals"][kind].get(table) or {}).get("dynamic")
        digits = 3 if kind == "ratio" else 2
        cells = (
            tables.Cell(pages.number(theirs, digits)),
            tables.Cell(pages.number(ours, digits), f"{span[0]:.{digits}f} – {span[1]:.{digits}f}" if span else ""),
        )
        rows.append(tables.Row(f"{kind}.{table}", label, False, cells))
    return tables.Grid("The paper's figures beside ours", ("paper", "here"), tuple(rows))


def _paper(document: Mapping[str, Any]) -> str:
    words = (
        f"{document['paper']['source']}. Other models, other tasks: the comparison is of kind, not of size. "
        "The ratio of averages is what the paper calls closing the gap; PGR is computed from its averages."
    )
    return _section(paper_grid(document), None, words)


def _traces(shown: Sequence[Shown]) -> str:
    """The shown answers as coloured strips, each with a link to its page."""
    if not shown:
        return ""
    strips = []
    for answer in shown:
        trace = answer.trace
        strips.append(
            f'<div class="card shown"><h3>{pages.text(answer.task)} · <a href="explain-{pages.text(answer.task)}.html">'
            f'every value</a></h3><div class="tokens"><span class="prompt">{pages.text(trace["prompt"])}</span>'
            f'{token_strip(trace)}</div><p class="soft">target: {pages.text(answer.target.strip())}</p></div>'
        )
    words = "The stronger a token's colour, the more of the expert's difference was added to the strong model there."
    return f"<h2>Answers, token by token</h2><p>{words}</p>{''.join(strips)}"


def _answers(scores: Scores) -> str:
    """Some answers of every column side by side, right and wrong ones alike."""
    parts = []
    for task, items in scores.items.items():
        answers = {c: a[task] for c, a in scores.answers.get("single", {}).items() if task in a}
        columns = [column for column in SHOWN_ANSWERS if column in answers]
        if not columns:
            continue
        points = scores.points["single"]
        lines = []
        for place in _telling(scores, task, columns):
            question = f"<td>{pages.text(items[place].prompt)}<br><b>{pages.text(items[place].target.strip())}</b></td>"
            cells = "".join(_answer(answers[c][place], float(points[c][task][place])) for c in columns)
            lines.append(f"<tr>{question}{cells}</tr>")
        head = "".join(f"<th>{pages.text(verdict.name_of(column))}</th>" for column in columns)
        parts.append(
            f"<h3>{pages.text(task)}</h3><div class='card scroll answers'><table><thead><tr>"
            f"<th>question and target</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><br>"
        )
    words = (
        "From each task the first item that DLF answers and neither strong model nor expert does, the first that the "
        "expert answers and DLF does not, and the first item."
    )
    return f"<h2>Some answers</h2><p>{words}</p>{''.join(parts)}" if parts else ""


def _telling(scores: Scores, task: str, columns: Sequence[str]) -> list[int]:
    """Items worth showing, chosen by rule and for both sides."""
    points = {column: scores.points["single"][column][task] for column in columns}
    fused, places = points.get("dynamic"), [0]
    if fused is not None and "expert" in points and "strong" in points:
        gained = ((fused > points["expert"]) & (fused > points["strong"])).nonzero().flatten().tolist()
        lost = (fused < points["expert"]).nonzero().flatten().tolist()
        places = [*gained[:1], *lost[:1], 0]
    return list(dict.fromkeys(places))[:EXAMPLES_PER_TASK]


def _answer(answer: str, points: float) -> str:
    mark = '<span class="ok">✓</span>' if points >= 99.9 else '<span class="no">✗</span>'
    if 0 < points < 99.9:
        mark = f'<span class="soft num">{points:.0f}</span>'
    short = answer if len(answer) <= 160 else answer[:157] + "…"
    return f"<td>{mark} {pages.text(short.strip())}</td>"


def draw_tables(folder: Path, document: Mapping[str, Any], prefix: str = "") -> dict[str, Path]:
    """One PNG per table, named PREFIXsingle.png and PREFIXmulti.png."""
    found: dict[str, Path] = {}
    between = document["intervals"]
    if document["single"]:
        found["single"] = folder / f"{prefix}single.png"
        groups = {**document["single"], "average": document["average"]["single"]}
        spans = {**between["single"], "average": between["average"]["single"]}
        score_plot("One expert per task", groups, spans, found["single"])
    if document["multi"]:
        found["multi"] = folder / f"{prefix}multi.png"
        columns = list(tables.multi_grid(document).rows)
        tasks = list(document["multi"][columns[0].column])
        groups = {t: {row.column: document["multi"][row.column][t] for row in columns} for t in tasks}
        spans = {t: {row.column: between["multi"][row.column][t] for row in columns} for t in tasks}
        score_plot("All experts at once", groups, spans, found["multi"])
    return found


def _footer(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in document.get("versions", {}).items())
    return f"Made by <b>trimtab demo</b>; every figure stands in results.json beside this page. {pages.text(versions)}"
