"""One type of table, rendered for terminals, Markdown and HTML; and the tables that every study has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trimtab.measure.comparison import Description, best_of

NONE = "–"
Kind = Literal["", "first", "reference"]


@dataclass(frozen=True)
class Look:
    """How a condition is shown.

    kind   "first" is the one that the study is about; a "reference" does not compete for the best figure
    """

    label: str
    colour: str = "#5d6873"
    kind: Kind = ""


Looks = Mapping[str, Look]


@dataclass(frozen=True)
class Cell:
    """A figure with its interval; the best of a column is marked, and `after` follows the mark."""

    text: str
    interval: str = ""
    is_best: bool = False
    after: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table; `key` finds it in a page."""

    key: str
    name: str
    cells: tuple[Cell, ...]
    kind: Kind = ""


@dataclass(frozen=True)
class Grid:
    """A table: its title, the heads of its columns, its lines."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    corner: str = ""


def number(value: float | None, digits: int = 1) -> str:
    """A figure; a dash for none."""
    return NONE if value is None else f"{value:.{digits}f}"


def cell(value: float | None, span: Sequence[float] | None = None, digits: int = 1, is_best: bool = False) -> Cell:
    """A figure with its interval, both with so many digits."""
    interval = f"{span[0]:.{digits}f} – {span[1]:.{digits}f}" if span and value is not None else ""
    return Cell(number(value, digits), interval, is_best)


# --- the tables of a comparison ------------------------------------------------------------------------------------


def score_grid(title: str, found: Description, looks: Looks, tasks: Sequence[str], has_gaps: bool = True) -> Grid:
    """Every condition on some tasks, with average, ratio and gap where the conditions answered all of them.

    found      see `comparison.Comparison.describe`
    has_gaps   False: the tasks alone
    """
    scores, spans = found["scores"], found["intervals"]
    rivals = [name for name in scores if looks[name].kind != "reference"]
    best = {task: best_of({name: by_task.get(task) for name, by_task in scores.items()}, rivals) for task in tasks}
    best["average"] = best_of(found["average"], rivals)
    more = (("average", 1), ("ratio", 3), ("pgr", 2)) if has_gaps else ()
    rows = []
    for name, by_task in scores.items():
        if not any(task in by_task for task in tasks):
            continue
        own = spans["scores"][name]
        cells = [cell(by_task.get(task), own.get(task), 1, name in best[task]) for task in tasks]
        for kind, digits in more:
            span, is_best = spans[kind].get(name), kind == "average" and name in best["average"]
            cells.append(cell(found[kind].get(name), span, digits, is_best))
        rows.append(Row(name, looks[name].label, tuple(cells), looks[name].kind))
    heads = (*tasks, "average", "ratio to ceiling", "PGR") if has_gaps else tuple(tasks)
    return Grid(title, heads, tuple(rows))


def paired_grid(title: str, rows: Sequence[Mapping[str, Any]], name_of: Callable[[Mapping[str, Any]], str]) -> Grid:
    """The rows of paired tests; lines of single tasks are references.

    name_of   row -> what its rival is called
    """
    lines = []
    for row in rows:
        span = f"[{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}]" if row["interval"] else ""
        cells = (
            Cell(row["tasks"]),
            Cell(f"{row['difference']:+.1f}", span),
            Cell(f"{row['p_value']:.2g}"),
            Cell(f"{row['num_wins']} / {row['num_losses']}"),
        )
        lines.append(Row(row["second"], name_of(row), cells, "" if row["tasks"] == "average" else "reference"))
    return Grid(title, ("on", "difference", "p", "items won / lost"), tuple(lines))


def only_rows(grid: Grid, kinds: Sequence[Kind]) -> Grid:
    """The same table with the lines of some kinds."""
    return replace(grid, rows=tuple(row for row in grid.rows if row.kind in kinds))


# --- three ways to show a table ------------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    """A table of Markdown; intervals stand in brackets, the best figures are bold."""
    lines = [f"| {grid.corner} | " + " | ".join(grid.heads) + " |", "|---" + "|--:" * len(grid.heads) + "|"]
    lines += [f"| {row.name} | " + " | ".join(map(_markdown_cell, row.cells)) + " |" for row in grid.rows]
    return "\n".join(lines).replace("|  |", "| |")


def _markdown_cell(cell: Cell) -> str:
    text = (f"**{cell.text}**" if cell.is_best else cell.text) + cell.after
    return f"{text} ({cell.interval.replace(' ', '')})" if cell.interval else text


def terminal(grid: Grid) -> Any:
    """A table of rich; of wide tables only the averages show their intervals."""
    from rich.table import Table

    table = Table(title=grid.title, title_justify="left", title_style="bold")
    table.add_column(grid.corner)
    for head in grid.heads:
        table.add_column(head, justify="right")
    styles = {"first": "cyan", "reference": "dim", "": None}
    for row in grid.rows:
        shown = [_terminal_cell(one, head, len(grid.heads)) for head, one in zip(grid.heads, row.cells, strict=True)]
        table.add_row(row.name, *shown, style=styles[row.kind])
    return table


def _terminal_cell(cell: Cell, head: str, width: int) -> str:
    text = f"[bold]{cell.text}[/bold]" if cell.is_best else cell.text
    has_room = head == "average" or width <= 2
    return f"{text} [dim]({cell.interval.replace(' ', '')})[/dim]" if cell.interval and has_room else text
