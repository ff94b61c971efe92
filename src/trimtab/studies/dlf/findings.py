"""What the numbers say, in sentences: written from the document alone, for the better and for the worse."""

from collections.abc import Mapping
from typing import Any

from trimtab.measure.statistics import SIGNIFICANT
from trimtab.measure.tables import Cell, Grid, Row, cell, paired_grid, score_grid
from trimtab.studies.dlf.conditions import FIRST, KINDS, LOOKS, TABLES, TITLES, WEAK, label, looks_of
from trimtab.studies.dlf.summary import Document, description, tasks_of, unseen_description

WHERE = {
    "single": "With one expert per task",
    "multi": "With all experts at once, the unseen task included",
}


# --- tables --------------------------------------------------------------------------------------------------------


def table_grid(document: Document, table: str) -> Grid:
    """One expert per task, or all experts at once with the unseen tasks last."""
    found = description(document, table)
    return score_grid(TITLES[table], found, looks_of(list(found["scores"])), tasks_of(document, table))


def unseen_grids(document: Document) -> list[Grid]:
    """Tasks that no expert was tuned on, each expert alone included."""
    found = {task: unseen_description(document, task) for task in document["unseen"]}
    return [
        score_grid(f"Unseen by every expert: {t}", one, looks_of(list(one["scores"])), [t], has_gaps=False)
        for t, one in found.items()
    ]


def rivals_grid(document: Document) -> Grid:
    """DLF against its rivals on the same items."""
    return paired_grid(
        "DLF against its rivals", document["paired"], lambda row: f"{label(row['second'])} ({KINDS[row['table']]})"
    )


def paper_grid(document: Document) -> Grid:
    """The paper's own figures beside ours."""
    rows = []
    for kind, name, digits in (("ratio", "ratio to the ceiling", 3), ("pgr", "PGR", 2)):
        for table in TABLES:
            theirs = document["paper"][kind].get(table, {}).get(document["pair"])
            ours = document[kind].get(table, {}).get(FIRST)
            span = (document["intervals"][kind].get(table) or {}).get(FIRST)
            cells: tuple[Cell, ...] = (cell(theirs, None, digits), cell(ours, span, digits))
            rows.append(Row(f"{kind}.{table}", f"{name}, {KINDS[table]}", cells))
    return Grid("The paper's figures beside ours", ("paper", "here"), tuple(rows))


# --- sentences -----------------------------------------------------------------------------------------------------


def key_findings(document: Document) -> list[str]:
    """The findings that a reader must know, at most five: how far DLF comes, and what it beats and loses to."""
    found, best = [], []
    for table in (table for table in TABLES if FIRST in document["average"].get(table, {})):
        found.append(_headline(document, table))
        rows = {row["second"]: row for row in _average_rows(document, table)}
        best_static = document["best_static"].get(table)
        if best_static in rows:
            found.append(f"{_where(table)}: {_against(rows[best_static], is_best_static=True)}")
        best.append(_best(document, table))
    return [*found, " ".join(best)] if found else []


def _where(table: str) -> str:
    return KINDS[table].capitalize()


def sentences(document: Document) -> list[str]:
    """All findings of a summary (see `summary.summarise`), each a sentence with its figures."""
    found = []
    for table in (table for table in TABLES if FIRST in document["average"].get(table, {})):
        best = document["best_static"].get(table)
        found.append(_headline(document, table))
        found += [_against(row, is_best_static=row["second"] == best) for row in _average_rows(document, table)]
        found.append(_best(document, table))
    return found


def _average_rows(document: Document, table: str) -> list[Mapping[str, Any]]:
    return [row for row in document["paired"] if row["table"] == table and row["tasks"] == "average"]


def _headline(document: Document, table: str) -> str:
    average, ratio, pgr = (document[kind][table] for kind in ("average", "ratio", "pgr"))
    start = (
        f"{WHERE[table]}, DLF scores {average[FIRST]:.1f} on average: "
        f"the untuned strong model {average['strong']:.1f}, the {label(WEAK[table])} {average[WEAK[table]]:.1f}, "
        f"the tuned strong model {average['ceiling']:.1f}"
    )
    if ratio.get(FIRST) is None:
        return start + "."
    gap = f"it recovers {100 * pgr[FIRST]:.0f}% of the gap" if pgr.get(FIRST) is not None else "no gap to recover"
    printed = document["paper"]["ratio"][table].get(document.get("pair", ""), None)
    theirs = f" (the paper's models: {printed:.3f})" if printed else ""
    return f"{start}. Its ratio to the ceiling is {ratio[FIRST]:.3f}{theirs}; {gap}."


def _against(row: Mapping[str, Any], is_best_static: bool) -> str:
    """One paired comparison of averages."""
    rival, difference = label(row["second"]), row["difference"]
    if is_best_static:
        rival += ", the best static alpha in hindsight"
    interval = f" [{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}]" if row["interval"] else ""
    figures = f"{difference:+.1f} points{interval}, p = {row['p_value']:.2g}"
    if row["p_value"] >= SIGNIFICANT:
        return f"DLF against {rival}: {figures}. No difference is shown."
    return f"DLF {'beats' if difference > 0 else 'loses to'} {rival}: {figures}."


def _best(document: Document, table: str) -> str:
    average = document["average"][table]
    best = max((name for name in average if LOOKS[name].kind != "reference"), key=lambda name: average[name])
    start = f"Of the strategies for {KINDS[table]} measured here"
    if best == FIRST:
        return f"{start} DLF has the best average."
    return f"{start} the best average is that of {label(best)}: {average[best]:.1f}."


def negatives(document: Document) -> list[str]:
    """What did not work, found in the numbers: on each task the rivals above DLF, p < 0.05, and experts diluted."""
    losses: dict[str, list[str]] = {}
    for row in document["paired"]:
        if row["tasks"] == "average" or row["p_value"] >= SIGNIFICANT or row["difference"] >= 0:
            continue
        losses.setdefault(f"{row['tasks']} ({KINDS[row['table']]})", []).append(
            f"{label(row['second'])} by {-row['difference']:.1f} (p = {row['p_value']:.2g})"
        )
    found = [f"On {where} DLF is below {'; '.join(rivals)}." for where, rivals in losses.items()]
    for task, columns in document["unseen"].items():
        if FIRST in columns and columns[FIRST] < columns["strong"]:
            found.append(
                f"On the unseen {task} DLF with all experts scores {columns[FIRST]:.1f}, below the untuned strong "
                f"model's {columns['strong']:.1f}."
            )
    return found
