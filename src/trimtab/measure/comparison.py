"""One table of conditions, compared: averages over tasks, ratios and gaps to a ceiling, paired tests against rivals.

A description is a dict ready for JSON: scores, average, ratio, pgr and their intervals by condition. Tables, plots and
sentences are made from descriptions, so they can be made again from a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.measure.records import Points
from trimtab.measure.statistics import Measured, gap_recovered, measured, paired_test, ratio_to_ceiling, resample
from trimtab.measure.statistics import weighted as weighted_mean

DIGITS = 4
Description = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Which conditions play which part.

    first      is compared with every rival
    weak       scores what there is without the strong model: the zero of the recovered gap
    ceiling    scores what could be reached: its one
    rivals     in the order of the rows
    """

    first: str
    weak: str
    ceiling: str
    rivals: Sequence[str]


class Comparison:
    """Scores of one table with their resampled means; `groups` of tasks weigh the same in an average."""

    def __init__(
        self,
        points: Points,
        groups: Sequence[Sequence[str]],
        parts: Parts,
        generator: torch.Generator,
        num_draws: int = 2000,
    ) -> None:
        self.points, self.parts = points, parts
        self.means = resample(points, generator, num_draws)
        self.shares = {task: 1.0 / (len(groups) * len(group)) for group in groups for task in group}
        self.complete = [name for name, tasks in points.items() if all(task in tasks for task in self.shares)]

    def average(self, name: str) -> Tensor:
        """[1 + draw]"""
        return weighted_mean(self.means[name], self.shares)

    def describe(self) -> Description:
        """Everything but the paired tests, ready for JSON."""
        weak, ceiling = self.parts.weak, self.parts.ceiling
        found: dict[str, dict[str, Measured]] = {
            "average": {name: measured(self.average(name)) for name in self.complete},
            "ratio": {
                name: ratio_to_ceiling(self.average(name), self.average(ceiling))
                for name in self.complete
                if name != ceiling
            },
            "pgr": {
                name: gap_recovered(self.average(name), self.average(weak), self.average(ceiling))
                for name in self.complete
                if name not in (ceiling, weak)
            },
        }
        intervals: dict[str, Any] = {
            "scores": {name: {t: span_of(measured(d)) for t, d in tasks.items()} for name, tasks in self.means.items()}
        }
        intervals |= {kind: {name: span_of(m) for name, m in values.items()} for kind, values in found.items()}
        reasons = {kind: {n: m.reason for n, m in values.items() if m.reason} for kind, values in found.items()}
        return {
            "scores": {n: {t: _mean(scores) for t, scores in tasks.items()} for n, tasks in self.points.items()},
            **{kind: {name: _value(m) for name, m in values.items()} for kind, values in found.items()},
            "intervals": intervals,
            "reasons": {kind: values for kind, values in reasons.items() if values},
        }

    def paired(self, generator: torch.Generator) -> list[dict[str, Any]]:
        """The first condition against every rival, on all tasks together and on each."""
        first, rows = self.parts.first, []
        for rival in self.parts.rivals:
            for shares in [self.shares, *({task: 1.0} for task in self.shares if len(self.shares) > 1)]:
                found = paired_test(self.points[first], self.points[rival], shares, generator)
                lead = {task: self.means[first][task] - self.means[rival][task] for task in shares}
                row: dict[str, Any] = {"first": first, "second": rival}
                row["tasks"] = "average" if shares is self.shares else next(iter(shares))
                row |= {key: round(value, DIGITS + 2) for key, value in asdict(found).items()}
                row["interval"] = span_of(measured(weighted_mean(lead, shares)))
                rows.append(row)
        return rows


def _mean(points: Tensor) -> float:
    return round(float(points.double().mean()), DIGITS)


def _value(found: Measured) -> float | None:
    return None if found.value is None else round(found.value, DIGITS)


def span_of(found: Measured) -> list[float] | None:
    """[low, high] of an interval, rounded for JSON."""
    return [round(found.interval.low, DIGITS), round(found.interval.high, DIGITS)] if found.interval else None


def best_of(values: Mapping[str, float | None], rivals: Sequence[str]) -> list[str]:
    """The rivals of largest value, all that are equal; empty where none has a value."""
    known = {name: value for name in rivals if (value := values.get(name)) is not None}
    return [name for name, value in known.items() if value == max(known.values())]
