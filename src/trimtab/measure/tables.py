"""The tables of a study as rows of text, for terminals, HTML and Markdown alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.measure.verdict import name_of

REFERENCES = ("base", "expert", "mixed", "strong", "latent", "ceiling")
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure with its interval; the best strategy of a column is marked."""

    text: str
    interval: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """One column of the study, as a line of a table."""

    column: str
    name: str
    is_reference: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """A table: what stands above its columns, and its lines."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def single_grid(document: Document) -> Grid:
    """One expert per task."""
    tasks = list(document["single"])
    columns = list(dict.fromkeys(column for task in tasks for column in document["single"][task]))
    values = {c: {t: document["single"][t].get(c) for t in tasks} for c in columns}
    spans = {c: {t: document["intervals"]["single"][t].get(c) for t in tasks} for c in columns}
    return _grid("One expert per task", "single", document, tasks, values, spans)


def multi_grid(document: Document) -> Grid:
    """All experts at once, the unseen tasks last."""
    tasks = list(dict.fromkeys(task for scores in document["multi"].values() for task in scores))
    complete = {c: v for c, v in document["multi"].items() if all(task in v for task in tasks)}
    spans = {c: document["intervals"]["multi"][c] for c in complete}
    return _grid("All experts at once", "multi", document, tasks, complete, spans)


def unseen_grids(document: Document) -> list[Grid]:
    """Tasks that no expert was tuned on, each expert alone included."""
    grids = []
    for task, scores in document["unseen"].items():
        spans = document["intervals"]["unseen"][task]
        best = _best({c: {task: v} for c, v in scores.items()}, task)
        rows = [
            Row(c, name_of(c), _is_reference(c), (_cell(v, spans.get(c), 1, c in best),)) for c, v in scores.items()
        ]
        grids.append(Grid(f"Unseen by every expert: {task}", (task,), tuple(rows)))
    return grids


def paired_grid(document: Document) -> Grid:
    """DLF against its rivals on the same items."""
    rows = []
    for row in document["paired"]:
        where = "average" if row["tasks"] == "average" else row["tasks"]
        span = f"[{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}]" if row["interval"] else ""
        cells = (
            Cell(where),
            Cell(f"{row['difference']:+.1f}", span),
            Cell(f"{row['p_value']:.2g}"),
            Cell(f"{row['num_wins']} / {row['num_losses']}"),
        )
        kind = "one expert" if row["table"] == "single" else "all experts"
        rows.append(Row(row["second"], f"{name_of(row['second'])} ({kind})", row["tasks"] != "average", cells))
    return Grid("DLF against", ("on", "difference", "p", "items won / lost"), tuple(rows))


def _grid(
    title: str,
    table: str,
    document: Document,
    tasks: list[str],
    values: Mapping[str, Mapping[str, float | None]],
    spans: Mapping[str, Mapping[str, Any]],
) -> Grid:
    average = {c: {"average": v} for c, v in document["average"].get(table, {}).items()}
    ratio, pgr = document["ratio"].get(table, {}), document["pgr"].get(table, {})
    between = document["intervals"]
    best = {task: _best(values, task) for task in tasks} | {"average": _best(average, "average")}
    rows = []
    for column in values:
        cells = [_cell(values[column].get(t), spans[column].get(t), 1, column in best[t]) for t in tasks]
        mean = average.get(column, {}).get("average")
        cells.append(_cell(mean, between["average"].get(table, {}).get(column), 1, column in best["average"]))
        cells.append(_cell(ratio.get(column), between["ratio"].get(table, {}).get(column), 3))
        cells.append(_cell(pgr.get(column), between["pgr"].get(table, {}).get(column), 2))
        rows.append(Row(column, name_of(column), _is_reference(column), tuple(cells)))
    return Grid(title, (*tasks, "average", "ratio to ceiling", "PGR"), tuple(rows))


def _is_reference(column: str) -> bool:
    return column in REFERENCES or "/" in column


def _best(values: Mapping[str, Mapping[str, float | None]], task: str) -> set[str]:
    """The strategies with the best figure in a column, all that are equal; models alone do not compete."""
    rivals = {c: v[task] for c, v in values.items() if not _is_reference(c) and v.get(task) is not None}
    top = max((value for value in rivals.values() if value is not None), default=None)
    return {column for column, value in rivals.items() if value == top}


def _cell(value: float | None, span: Any, digits: int, is_best: bool = False) -> Cell:
    if value is None:
        return Cell("–")
    interval = f"{span[0]:.{digits}f} – {span[1]:.{digits}f}" if span else ""
    return Cell(f"{value:.{digits}f}", interval, is_best)
