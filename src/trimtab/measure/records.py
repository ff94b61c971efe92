"""Tidy records: one line per study, condition and item, from which every figure of a study is computed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Points = Mapping[str, Mapping[str, Tensor]]  # condition -> task -> [item], points of 100


@dataclass(frozen=True, slots=True)
class Record:
    """How one condition did on one item.

    study      which comparison the condition belongs to
    seed       of the draw that the item came from
    score      points of 100
    seconds    wall time: the condition's on all items of the task, divided by their number
    answer     what was answered
    """

    study: str
    condition: str
    task: str
    item: str
    seed: int
    score: float
    seconds: float
    answer: str = ""


def points_of(records: Iterable[Record], study: str) -> dict[str, dict[str, Float[Tensor, " item"]]]:
    """The scores of one study by condition and task; conditions, tasks and items in the order of the records."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record.study == study:
            found.setdefault(record.condition, {}).setdefault(record.task, []).append(record.score)
    return {name: {task: torch.tensor(scores) for task, scores in tasks.items()} for name, tasks in found.items()}


def answers_of(records: Iterable[Record], study: str, task: str) -> dict[str, list[Record]]:
    """Condition -> its records on one task, in the order of the items."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if (record.study, record.task) == (study, task):
            found.setdefault(record.condition, []).append(record)
    return found


def seconds_of(records: Iterable[Record], study: str) -> dict[str, float]:
    """Condition -> wall seconds on all its items."""
    found: dict[str, float] = {}
    for record in records:
        if record.study == study:
            found[record.condition] = found.get(record.condition, 0.0) + record.seconds
    return found


def only_items(records: Iterable[Record], items: Mapping[str, Sequence[str]]) -> list[Record]:
    """The records of some items, task -> ids, each condition's in the order of those ids."""
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record.study, record.condition, record.task), {})[record.item] = record
    return [by_item[item] for (_, _, task), by_item in cells.items() for item in items.get(task, ())]
