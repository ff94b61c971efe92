"""From records to the document of `--json`: means, ratios, gaps, intervals, tests; and back to single tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from trimtab.measure.comparison import Comparison, Description, Parts, best_of
from trimtab.measure.records import Points, Record, points_of, seconds_of
from trimtab.studies.dlf import published
from trimtab.studies.dlf.conditions import FIRST, STRATEGIES, TABLES, WEAK

Document = Mapping[str, Any]
FIGURES = ("average", "ratio", "pgr")


def summarise(
    records: Sequence[Record], tuned_tasks: Sequence[str], seed: int = 0, num_draws: int = 2000
) -> dict[str, Any]:
    """Everything that the tables show, ready for JSON.

    tuned_tasks  tasks with an expert: the single table averages over those of them that were run; the table of all
                 experts averages the seen tasks and the unseen ones with the same weight, as the paper does
    seed         of the resampling and of the sign flips, nothing else
    """
    counts: dict[str, set[str]] = {}
    for record in records:
        counts.setdefault(record.task, set()).add(record.item)
    seen, unseen = ([task for task in counts if (task in tuned_tasks) is is_seen] for is_seen in (True, False))
    single, own = points_of(records, "single"), points_of(records, "multi")
    multi = _with_references(single, own, seen) if own else {}
    generator = torch.Generator().manual_seed(seed)
    tables: dict[str, Comparison] = {}
    for table, points, groups in (("single", single, [seen]), ("multi", multi, [g for g in (seen, unseen) if g])):
        if points:
            tables[table] = Comparison(points, groups, _parts(table, points, groups), generator, num_draws)
    found = {table: comparison.describe() for table, comparison in tables.items()}
    paired = [{"table": name, **row} for name, table in tables.items() for row in table.paired(generator)]
    document: dict[str, Any] = {
        **_by_table(found, seen, unseen),
        "best_static": {table: _best_static(found[table], tables[table].parts) for table in found},
        "paired": paired,
        "paper": paper_figures(),
        "num_items": {task: len(items) for task, items in counts.items()},
        "items": max(len(items) for items in counts.values()),
        "seconds_by_column": {t: {c: round(s, 2) for c, s in seconds_of(records, t).items()} for t in TABLES},
    }
    return document


def _with_references(single: Points, multi: Points, seen: Sequence[str]) -> Points:
    """The table of all experts with base and strong on the tuned tasks, known from the single table."""
    references = {}
    for name in ("base", "strong"):
        known = {task: single[name][task] for task in seen if name in single and task in single[name]}
        references[name] = {**known, **multi.get(name, {})}
    return {**references, **{name: tasks for name, tasks in multi.items() if name not in references}}


def _parts(table: str, points: Points, groups: Sequence[Sequence[str]]) -> Parts:
    """DLF against every strategy that answered all tasks, and against the models alone."""
    complete = [name for name in points if all(task in points[name] for group in groups for task in group)]
    fused = [name for name in STRATEGIES[table] if name in complete and name != FIRST]
    alone = [name for name in (WEAK[table], "strong") if name in complete]
    return Parts(FIRST, WEAK[table], "ceiling", [*fused, *alone])


def _best_static(found: Description, parts: Parts) -> str | None:
    """The static alpha of the best average, known only in hindsight; None in a table without any."""
    best = best_of(found["average"], [name for name in parts.rivals if name.startswith("static")])
    return best[0] if best else None


# --- the layout of the document ------------------------------------------------------------------------------------


def _by_table(found: Mapping[str, Description], seen: Sequence[str], unseen: Sequence[str]) -> dict[str, Any]:
    """The single table by task, that of all experts by condition, figures by table."""

    def by_task(scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {task: {name: own[task] for name, own in scores.items() if task in own} for task in tasks}

    def layout(scores: Mapping[str, Any]) -> dict[str, Any]:
        multi = scores.get("multi", {})
        single = by_task(scores["single"], seen) if "single" in scores else {}
        return {"single": single, "multi": multi, "unseen": by_task(multi, unseen) if multi else {}}

    spans = {table: described["intervals"] for table, described in found.items()}
    intervals = layout({table: own["scores"] for table, own in spans.items()})
    reasons = {f"{kind}.{t}": r for t, d in found.items() for kind, r in d["reasons"].items()}
    return {
        **layout({table: described["scores"] for table, described in found.items()}),
        **{kind: {table: described[kind] for table, described in found.items()} for kind in FIGURES},
        "intervals": intervals | {kind: {table: own[kind] for table, own in spans.items()} for kind in FIGURES},
        "reasons": reasons,
    }


def description(document: Document, table: str) -> Description:
    """One table of a document, as `measure` shows it; of `multi` the conditions that answered every task."""
    scores, spans = document[table], document["intervals"][table]
    if table == "single":
        scores, spans = _by_condition(scores), _by_condition(spans)
    elif table == "multi":
        tasks = tasks_of(document, table)
        scores = {name: own for name, own in scores.items() if all(task in own for task in tasks)}
    found = {kind: document[kind].get(table, {}) for kind in FIGURES}
    between = {kind: document["intervals"][kind].get(table, {}) for kind in FIGURES}
    return {"scores": scores, **found, "intervals": {"scores": spans, **between}}


def _by_condition(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for own in by_task.values() for name in own)
    return {name: {task: own[name] for task, own in by_task.items() if name in own} for name in names}


def unseen_description(document: Document, task: str) -> Description:
    """The scores of all conditions on a task that no expert was tuned on, single experts included."""
    scores = {name: {task: value} for name, value in document["unseen"][task].items()}
    spans = {name: {task: span} for name, span in document["intervals"]["unseen"][task].items()}
    return {"scores": scores, "average": {}, "intervals": {"scores": spans}}


def tasks_of(document: Document, table: str) -> list[str]:
    """The tasks of a table, in its order."""
    if table == "single":
        return list(document["single"])
    return list(dict.fromkeys(task for scores in document["multi"].values() for task in scores))


def paper_figures() -> dict[str, Any]:
    """The paper's own figures in the shape of ours; the recovered gaps follow from its averages."""
    tables = {"single": published.SINGLE, "multi": published.MULTI}
    gaps = {name: {pair: figures.gap_recovered for pair, figures in pairs.items()} for name, pairs in tables.items()}
    return {
        "source": "Fan et al. 2024, arXiv 2406.15480: Llama-2-13B steered by 7B (close) and 1.1B (far) experts",
        "ratio": published.PRINTED_RATIOS,
        "pgr": {name: {p: round(g, 2) for p, g in pairs.items() if g is not None} for name, pairs in gaps.items()},
        **{name: {pair: asdict(figures) for pair, figures in pairs.items()} for name, pairs in tables.items()},
    }
