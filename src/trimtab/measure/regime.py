"""Is there anything to transfer? Answered on validation items, before any fused score is looked at.

Logit fusion can only move what tuning taught. It needs a strong model that knows more than the small ones (its
*latent* skill, shown by solved examples in the prompt), that does not show it by itself (*strong* below *ceiling*), and
a ceiling above each small expert. Where that does not hold, world, sizes or training must change, not the method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.measure.evaluation import Item
from trimtab.measure.study import Panel, Task, alone_scores

CLEAR_MARGIN = {"far": 5.0, "close": 2.0}  # points between expert and ceiling
NEEDED_TASKS = {"far": 4, "close": 3}  # how many tasks must have the margin


@dataclass(frozen=True)
class TaskRegime:
    """Scores of one task and pair, in points of 100; `expert` of a task without one is the model tuned on all tasks."""

    task: str
    base: float
    base_latent: float | None
    expert: float
    mixed: float
    strong: float
    latent: float | None
    ceiling: float

    @property
    def room(self) -> float:
        """What is there to be closed: ceiling - expert."""
        return self.ceiling - self.expert

    @property
    def latent_gain(self) -> float | None:
        """Where positive, the strong model knows more than the expert; fusion can add most there."""
        return None if self.latent is None else self.latent - self.expert


def task_regime(panel: Panel, task: Task, items: Sequence[Item], is_tuned: bool, few_shot: str | None) -> TaskRegime:
    """One task's scores of every model alone, on the items given."""

    def mean(role: str, prefix: str = "") -> float:
        return float(alone_scores(panel, task, items, role, prefix).mean())

    return TaskRegime(
        task=task.name,
        base=mean("base"),
        base_latent=mean("base", few_shot) if few_shot else None,
        expert=mean(f"expert/{task.name}" if is_tuned else "mixed"),
        mixed=mean("mixed"),
        strong=mean("strong"),
        latent=mean("strong", few_shot) if few_shot else None,
        ceiling=mean(f"ceiling/{task.name}" if is_tuned else "ceiling/mixed"),
    )


def is_transferable(pair: str, regimes: Sequence[TaskRegime]) -> bool:
    """Enough tasks of this pair have a ceiling clearly above the expert."""
    return sum(regime.room >= CLEAR_MARGIN[pair] for regime in regimes) >= NEEDED_TASKS[pair]


def as_markdown(found: Mapping[str, Sequence[TaskRegime]], items: int) -> str:
    """One table per pair, and whether there is something to transfer."""
    lines = [
        "# Is there something to transfer?",
        "",
        f"Written by `trimtab zoo check -o docs/zoo.md`: {items} *validation* items a task at most, greedy,",
        "points of 100, every model alone. *latent* is a base after solved examples: what it knows but does",
        "not show. *room* is ceiling minus expert; `domains` has no expert, the model tuned on all tasks stands there.",
    ]
    for pair, regimes in found.items():
        verdict = "yes" if is_transferable(pair, regimes) else "NO"
        bar = f"at least {NEEDED_TASKS[pair]} tasks with {CLEAR_MARGIN[pair]:g} points of room"
        names = ("task", "base", "base, latent", "expert", "mixed", "strong", "strong, latent", "ceiling", "room")
        lines += [
            "",
            f"## {pair} pair",
            "",
            f"Room above the expert ({bar}): **{verdict}**.",
            "",
            "| " + " | ".join((*names, "latent - expert")) + " |",
            "|" + "---|" * (len(names) + 1),
        ]
        for r in regimes:
            cells = (r.base, r.base_latent, r.expert, r.mixed, r.strong, r.latent, r.ceiling, r.room, r.latent_gain)
            lines.append(f"| {r.task} | " + " | ".join("–" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"
