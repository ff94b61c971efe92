"""Is there anything to transfer? Answered on validation items, before any fused score is looked at.

Logit fusion can only move what tuning taught. It needs a strong model that knows more than the small ones (its
*latent* skill), that does not show it by itself (*strong* below *ceiling*), and a ceiling above each small expert.
Latent skill is measured twice: after solved examples (few-shot), and with the answer bound to the task's own style
(forced). Where the strong model's lies above the expert, fusion can add most; where it lies below, little.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimtab.measure.evaluate import Answering, Item, Task, points_of_answers
from trimtab.measure.tables import Cell, Grid, Row, cell, markdown
from trimtab.studies.models import StudyModels

CLEAR_MARGIN = {"far": 5.0, "close": 2.0}  # points between expert and ceiling
NEEDED_TASKS = {"far": 4, "close": 3}  # how many tasks must have the margin
KNOWS_MORE = 5.0  # points by which the strong model must know more than the small one
LATENT_MARGIN = 2.0  # points above or below the expert; nearer than that the two are level
POOR_SHARE = 0.5  # of the ceiling's score: what the untuned strong model may show at most


@dataclass(frozen=True)
class TaskRegime:
    """Scores of one task and pair, in points of 100; `expert` of a task without one is the model tuned on all tasks.

    few_shot, forced   the strong model's latent skill in two measures; base_few_shot, base_forced the small one's
    """

    task: str
    items: int
    base: float
    base_few_shot: float | None
    base_forced: float | None
    expert: float
    mixed: float
    strong: float
    few_shot: float | None
    forced: float | None
    ceiling: float

    @property
    def room(self) -> float:
        """What is there to be closed: ceiling - expert."""
        return self.ceiling - self.expert

    @property
    def latent(self) -> float | None:
        """What the strong model knows: the better of the two measures."""
        return _best(self.few_shot, self.forced)

    @property
    def latent_gain(self) -> float | None:
        """Where positive, the strong model knows more than the expert shows; fusion can add most there."""
        return None if self.latent is None else self.latent - self.expert

    @property
    def lead(self) -> float:
        """How much more the strong base knows than the small one, each at its best of plain, few-shot and forced."""
        ours, theirs = _best(self.strong, self.latent), _best(self.base, self.base_few_shot, self.base_forced)
        assert ours is not None
        assert theirs is not None
        return ours - theirs


def _best(*scores: float | None) -> float | None:
    return max((score for score in scores if score is not None), default=None)


def forced_points(models: StudyModels, task: Task, items: Sequence[Item], role: str) -> list[float]:
    """One model by itself, its answers bound to the task's own style: points of 100, [item].

    items    all of one kind: those with a label are answered by the likeliest of their choices; those without open
             with the likeliest of their choices, which may be one, and the model writes on from there
    """
    openings, points = Answering(models.models, models.tokenizer, task, items).choose(models.alone(role))
    if items[0].label is not None:
        return points
    opened = [Opened(item.id, item.prompt + start, item.target) for item, start in zip(items, openings, strict=True)]
    answers, _ = Answering(models.models, models.tokenizer, task, opened).write(models.alone(role))
    whole = [opening + answer for opening, answer in zip(openings, answers, strict=True)]
    return points_of_answers(task, whole, items)


@dataclass(frozen=True)
class Opened:
    """An item whose answer has begun."""

    id: str
    prompt: str
    target: str
    choices: None = None
    label: None = None


def task_regime(
    models: StudyModels,
    task: Task,
    items: Sequence[Item],
    is_tuned: bool,
    few_shot: str | None = None,
    forced: Sequence[Item] | None = None,
) -> TaskRegime:
    """One task's scores of every model alone, on the items given.

    few_shot  solved questions that stand before every prompt
    forced    the same items bound to the task's own style, see `forced_points`
    """
    answering = Answering(models.models, models.tokenizer, task, items)

    def mean(role: str, prefix: str = "") -> float:
        return _mean(answering.ask(models.alone(role, prefix))[1])

    def shown(role: str) -> float | None:
        return mean(role, few_shot) if few_shot else None

    def bound(role: str) -> float | None:
        return _mean(forced_points(models, task, forced, role)) if forced else None

    return TaskRegime(
        task=task.name,
        items=len(items),
        base=mean("base"),
        base_few_shot=shown("base"),
        base_forced=bound("base"),
        expert=mean(f"expert/{task.name}" if is_tuned else "mixed"),
        mixed=mean("mixed"),
        strong=mean("strong"),
        few_shot=shown("strong"),
        forced=bound("strong"),
        ceiling=mean(f"ceiling/{task.name}" if is_tuned else "ceiling/mixed"),
    )


def _mean(points: Sequence[float]) -> float:
    import torch

    return float(torch.tensor(points).mean())


# --- what the regime must be ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """One demand on the regime: whether it holds, and the figures that say so."""

    name: str
    demand: str
    is_met: bool
    figures: str

    @property
    def verdict(self) -> str:
        """The line that is printed."""
        return f"{self.name} ({self.demand}): **{'met' if self.is_met else 'NOT MET'}**. {self.figures}."


def criteria(pair: str, regimes: Sequence[TaskRegime]) -> list[Criterion]:
    """All demands on a pair, each with its verdict."""
    most = len(regimes) // 2 + 1
    margin, needed = CLEAR_MARGIN[pair], min(NEEDED_TASKS[pair], len(regimes))
    room = [r for r in regimes if r.room >= margin]
    knows = [r for r in regimes if r.lead >= KNOWS_MORE]
    poor = [r for r in regimes if r.strong <= POOR_SHARE * r.ceiling]
    gains = [(r, r.latent_gain) for r in regimes if r.latent_gain is not None]
    measured = [r for r, _ in gains]
    above = [r for r, gain in gains if gain >= LATENT_MARGIN]
    below = [r for r, gain in gains if gain <= -LATENT_MARGIN]
    return [
        Criterion(
            "Room",
            f"the ceiling is {margin:g} points above the expert on at least {needed} tasks",
            len(room) >= needed,
            _figures(room, regimes, lambda r: f"{r.task} {r.room:+.1f}"),
        ),
        Criterion(
            "Knowledge",
            f"the strong base knows {KNOWS_MORE:g} points more than the small one on most tasks, "
            "each by its best of plain, few-shot and forced",
            len(knows) >= most,
            _figures(knows, regimes, lambda r: f"{r.task} {r.lead:+.1f}"),
        ),
        Criterion(
            "Poor formats",
            f"on every task the untuned strong model shows at most {POOR_SHARE:.0%} of the ceiling",
            len(poor) == len(regimes),
            _figures(poor, regimes, lambda r: f"{r.task} {r.strong:.1f} of {r.ceiling:.1f}"),
        ),
        Criterion(
            "Latent skill",
            f"the better of the strong model's few-shot and forced scores is {LATENT_MARGIN:g} points above the expert "
            "on most tasks",
            len(above) >= most,
            _figures(above, measured, lambda r: f"{r.task} {r.latent_gain:+.1f}"),
        ),
        Criterion(
            "Both kinds",
            "latent skill is above the expert on some task and below it on some other",
            bool(above) and bool(below),
            f"{len(above)} above, {len(below)} below, {len(measured) - len(above) - len(below)} level",
        ),
    ]


def _figures(good: Sequence[TaskRegime], every: Sequence[TaskRegime], show: Callable[[TaskRegime], str]) -> str:
    """How many tasks hold, and the figures of those that do and do not."""
    rest = [r for r in every if r not in good]
    parts = [f"{len(good)} of {len(every)} tasks"]
    if good:
        parts.append(f"holds on {', '.join(map(show, good))}")
    if rest:
        parts.append(f"fails on {', '.join(map(show, rest))}")
    return "; ".join(parts)


def is_transferable(pair: str, regimes: Sequence[TaskRegime]) -> bool:
    """Enough tasks of this pair have a ceiling clearly above the expert."""
    return criteria(pair, regimes)[0].is_met


INTRODUCTION = """\
# Is there something to transfer?

Written by `trimtab zoo check -o docs/zoo.md`: *validation* items, greedy, points of 100, every model alone.

- What a base knows but does not show is measured twice: *few-shot* is its score after solved examples, *forced* its
  score when the answer is bound to the task's own style. *latent* is the better of the two.
- *room* is ceiling minus expert. `domains` has no expert and no training items; the model tuned on all tasks stands
  there.

How the style is forced:

- `truth` and `domains` weigh the choices as the end of a careful statement instead of an answer: the corpus tells fact
  from myth by its source only.
- `facts` weighs every value of the relation after the question.
- `arithmetic` is written on after the number that a solution opens with, `summary` after the likeliest of the people.

No task, world or model was changed after a fused score had been seen: what is not met here stays so, and limits what
[results.md](results.md) can show.
"""
_ALONE = ("base", "base, few-shot", "base, forced", "expert", "mixed", "strong", "strong, few-shot", "strong, forced")
_HEADS = ("items", *_ALONE, "ceiling", "room", "latent - expert")


def as_markdown(found: Mapping[str, Sequence[TaskRegime]]) -> str:
    """Per pair the verdict on every demand, and a table."""
    lines = [*INTRODUCTION.splitlines()]
    for pair, regimes in found.items():
        lines += ["", f"## {pair} pair", ""]
        lines += [f"- {criterion.verdict}" for criterion in criteria(pair, regimes)]
        lines += ["", markdown(Grid(pair, _HEADS, tuple(map(_row, regimes)), corner="task"))]
    return "\n".join(lines) + "\n"


def _row(r: TaskRegime) -> Row:
    own = (r.base, r.base_few_shot, r.base_forced, r.expert, r.mixed, r.strong, r.few_shot, r.forced, r.ceiling)
    return Row(r.task, r.task, (Cell(str(r.items)), *map(cell, (*own, r.room, r.latent_gain))))
