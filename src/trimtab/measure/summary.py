"""From scores of single items to the document of `trimtab demo --json`: means, ratios, gaps, intervals, tests."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from trimtab.measure import paper
from trimtab.measure.gaps import Measured, gap_recovered, measured, ratio_to_ceiling
from trimtab.measure.intervals import Draws, resample
from trimtab.measure.paired import paired_test
from trimtab.measure.study import MULTI_STRATEGIES, SINGLE_STRATEGIES, Scores

Points = Mapping[str, Mapping[str, Tensor]]  # column -> task -> [item]
DIGITS = 4


def summarise(scores: Scores, tuned_tasks: Sequence[str], seed: int = 0, num_draws: int = 2000) -> dict[str, Any]:
    """Everything that the tables show, ready for JSON.

    tuned_tasks  tasks with an expert: the single table averages over those of them that were run; the table of all
                 experts averages the seen tasks and the unseen ones with the same weight, as the paper does
    seed         of the resampling and of the sign flips, nothing else
    """
    seen = [task for task in scores.items if task in tuned_tasks]
    unseen = [task for task in scores.items if task not in tuned_tasks]
    single, multi = scores.points["single"], _with_references(scores.points, seen)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    if single:
        parts.append(_Part("single", single, [seen], resample(single, generator, num_draws), "expert"))
    if multi:
        groups = [group for group in (seen, unseen) if group]
        parts.append(_Part("multi", multi, groups, resample(multi, generator, num_draws), "mixed"))
    document: dict[str, Any] = {
        "single": {task: _means(single, task) for task in seen} if single else {},
        "multi": {column: {task: _mean(points[task]) for task in points} for column, points in multi.items()},
        "unseen": {task: _means(multi, task) for task in unseen},
        "average": {part.name: part.averages(value_only=True) for part in parts},
        "ratio": {part.name: {c: _value(m) for c, m in part.ratios().items()} for part in parts},
        "pgr": {part.name: {c: _value(m) for c, m in part.gaps().items()} for part in parts},
        "intervals": _intervals(parts, seen, unseen),
        "reasons": _reasons(parts),
        "best_static": {part.name: part.best_static() for part in parts},
        "paired": [row for part in parts for row in part.paired(generator)],
        "paper": paper_figures(),
        "num_items": {task: len(items) for task, items in scores.items.items()},
        "items": max(len(items) for items in scores.items.values()),
        "seconds_by_column": {t: {c: round(s, 2) for c, s in cs.items()} for t, cs in scores.seconds.items()},
    }
    return document


def _with_references(points: Mapping[str, Points], seen: Sequence[str]) -> Points:
    """The table of all experts with base and strong on the tuned tasks, known from the single table."""
    single, multi = points["single"], points["multi"]
    if not multi:
        return {}
    references = {}
    for column in ("base", "strong"):
        known = {task: single[column][task] for task in seen if column in single and task in single[column]}
        references[column] = {**known, **multi.get(column, {})}
    return {**references, **{column: tasks for column, tasks in multi.items() if column not in references}}


class _Part:
    """One table with its draws; `groups` of tasks weigh the same in an average."""

    def __init__(self, name: str, table: Points, groups: list[list[str]], draws: Draws, weak: str) -> None:
        self.name, self.groups, self.draws, self.weak = name, groups, draws, weak
        self.shares = {task: 1.0 / (len(groups) * len(group)) for group in groups for task in group}
        self.tasks = list(self.shares)
        self.table = {column: points for column, points in table.items() if all(t in points for t in self.tasks)}

    def average(self, column: str) -> Tensor:
        """[1 + draw]"""
        means = self.draws.means[column]
        return torch.stack([share * means[task] for task, share in self.shares.items()]).sum(dim=0)

    def averages(self, value_only: bool = False) -> dict[str, Any]:
        found = {column: measured(self.average(column)) for column in self.table}
        return {column: _value(m) for column, m in found.items()} if value_only else dict(found)

    def ratios(self) -> dict[str, Measured]:
        ceiling = self.average("ceiling")
        return {c: ratio_to_ceiling(self.average(c), ceiling) for c in self.table if c != "ceiling"}

    def gaps(self) -> dict[str, Measured]:
        expert, ceiling = self.average(self.weak), self.average("ceiling")
        skipped = ("ceiling", self.weak)
        return {c: gap_recovered(self.average(c), expert, ceiling) for c in self.table if c not in skipped}

    def fused(self) -> list[str]:
        """The strategies of this table that answered every task, in the table's order."""
        known = SINGLE_STRATEGIES if self.name == "single" else MULTI_STRATEGIES
        return [column for column in known if column in self.table]

    def best_static(self) -> str | None:
        """The static alpha of the best average, known only in hindsight; None in a table without any."""
        names = [name for name in self.fused() if name.startswith("static")]
        return max(names, key=lambda name: float(self.average(name)[0]), default=None)

    def paired(self, generator: torch.Generator) -> list[dict[str, Any]]:
        """dynamic against every other strategy and the models alone, on all tasks together and on each."""
        alone = [column for column in (self.weak, "strong") if column in self.table]
        rows = []
        for rival in [column for column in self.fused() if column != "dynamic"] + alone:
            for shares in [self.shares, *({task: 1.0} for task in self.tasks if len(self.tasks) > 1)]:
                found = paired_test(self.table["dynamic"], self.table[rival], shares, generator)
                means, theirs = self.draws.means["dynamic"], self.draws.means[rival]
                leads = torch.stack([share * (means[t] - theirs[t]) for t, share in shares.items()])
                where = measured(leads.sum(dim=0)).interval
                row: dict[str, Any] = {"table": self.name, "first": "dynamic", "second": rival}
                row["tasks"] = "average" if shares is self.shares else next(iter(shares))
                row |= {k: round(v, DIGITS + 2) for k, v in asdict(found).items()}
                row["interval"] = [round(where.low, DIGITS), round(where.high, DIGITS)] if where else None
                rows.append(row)
        return rows


def _intervals(parts: Sequence[_Part], seen: Sequence[str], unseen: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"single": {}, "multi": {}, "unseen": {}, "average": {}, "ratio": {}, "pgr": {}}
    for part in parts:
        means = part.draws.means
        by_column = {c: {t: _pair(measured(d)) for t, d in tasks.items()} for c, tasks in means.items()}
        if part.name == "single":
            found["single"] = {t: {c: tasks[t] for c, tasks in by_column.items() if t in tasks} for t in seen}
        else:
            found["multi"] = by_column
            found["unseen"] = {t: {c: tasks[t] for c, tasks in by_column.items() if t in tasks} for t in unseen}
        found["average"][part.name] = {c: _pair(m) for c, m in part.averages().items()}
        found["ratio"][part.name] = {c: _pair(m) for c, m in part.ratios().items()}
        found["pgr"][part.name] = {c: _pair(m) for c, m in part.gaps().items()}
    return found


def _reasons(parts: Sequence[_Part]) -> dict[str, dict[str, str]]:
    """Why a ratio or a gap has no value or no interval, where one is missing."""
    found: dict[str, dict[str, str]] = {}
    for part in parts:
        for kind, statistics in (("ratio", part.ratios()), ("pgr", part.gaps())):
            missing = {column: m.reason for column, m in statistics.items() if m.reason}
            if missing:
                found[f"{kind}.{part.name}"] = missing
    return found


def paper_figures() -> dict[str, Any]:
    """The paper's own figures in the shape of ours; the recovered gaps follow from its averages."""
    tables = {"single": paper.SINGLE, "multi": paper.MULTI}
    gaps = {name: {pair: figures.gap_recovered for pair, figures in pairs.items()} for name, pairs in tables.items()}
    return {
        "source": "Fan et al. 2024, arXiv 2406.15480: Llama-2-13B steered by 7B (close) and 1.1B (far) experts",
        "ratio": paper.PRINTED_RATIOS,
        "pgr": {name: {p: round(g, 2) for p, g in pairs.items() if g is not None} for name, pairs in gaps.items()},
        **{name: {pair: asdict(figures) for pair, figures in pairs.items()} for name, pairs in tables.items()},
    }


def _mean(points: Tensor) -> float:
    return round(float(points.double().mean()), DIGITS)


def _means(table: Points, task: str) -> dict[str, float]:
    return {column: _mean(points[task]) for column, points in table.items() if task in points}


def _value(found: Measured) -> float | None:
    return None if found.value is None else round(found.value, DIGITS)


def _pair(found: Measured) -> list[float] | None:
    return [round(found.interval.low, DIGITS), round(found.interval.high, DIGITS)] if found.interval else None
