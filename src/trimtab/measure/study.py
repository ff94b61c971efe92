"""The whole comparison: every column of the tables on the same items, each model and each prompt read once.

A study knows no zoo and no file: it gets loaded models, a way to fuse them, and items. What it returns are scores of
single items; tables, intervals and tests are computed from those (`summary`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.measure import evaluation
from trimtab.measure.evaluation import Choices, Item, Prefix
from trimtab.measure.scores import ANSWER_METRICS

MAX_POSITIONS_AT_ONCE = 1024  # rows that a strategy fuses in one call: bounds the memory of [expert, batch, vocab]


@runtime_checkable
class Task(Protocol):
    """How a task's items are answered and scored."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["generate", "choose"]: ...
    @property
    def metric(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Spec:
    """A strategy by name: what `make_strategy` is called with."""

    amount: str
    chooser: str = "paper"
    settings: Mapping[str, Any] = field(default_factory=dict)


SINGLE_STRATEGIES: Mapping[str, Spec] = {
    "static_0.5": Spec("static", settings={"alpha": 0.5}),
    "static_1.0": Spec("static", settings={"alpha": 1.0}),
    "static_1.5": Spec("static", settings={"alpha": 1.5}),
    "grid": Spec("grid"),
    "dynamic": Spec("dynamic"),
    "cautious": Spec("cautious"),
    "filter": Spec("filter"),
    "product": Spec("product"),
    "mixture": Spec("mixture"),
    "contrastive": Spec("contrastive"),
}

MULTI_STRATEGIES: Mapping[str, Spec] = {
    "static_sum": Spec("static", "sum", {"alpha": 1.0}),
    "static_mean": Spec("static", "sum", {"alpha": 0.25}),
    "static_0.5": Spec("static", "paper", {"alpha": 0.5}),
    "static_1.0": Spec("static", "paper", {"alpha": 1.0}),
    "static_1.5": Spec("static", "paper", {"alpha": 1.5}),
    "product": Spec("product", "sum"),
    "mixture": Spec("mixture", "sum"),
    "grid": Spec("grid", "paper"),
    "dynamic": Spec("dynamic", "paper"),
    "dynamic_confident": Spec("dynamic", "confident"),
    "cautious": Spec("cautious", "paper"),
    "filter": Spec("filter", "paper"),
    "filter_confident": Spec("filter", "confident"),
    "filter_sum": Spec("filter", "sum"),
}
# What a demonstration of minutes leaves out of the table of all experts; `trimtab results` leaves out nothing.
DEMO_MULTI: Mapping[str, Spec] = {
    name: spec for name, spec in MULTI_STRATEGIES.items() if name not in ("static_1.5", "filter", "filter_sum")
}


@dataclass(frozen=True)
class Panel:
    """The models of one pair, loaded, and how to fuse them.

    models     "base", "strong", "mixed" (the small one tuned on everything), "ceiling/mixed", and for each tuned task
               "expert/TASK" and "ceiling/TASK"
    fuse       names of tuned tasks -> strong + base + those experts as one model whose `strategy` can be set
    strategy   (spec, names of experts) -> a strategy
    """

    models: Mapping[str, Any]
    tokenizer: Any
    fuse: Callable[[tuple[str, ...]], Any]
    strategy: Callable[[Spec, tuple[str, ...]], Any]


@dataclass
class Scores:
    """Scores of single items in points of 100: table -> column -> task -> [item]; answers and seconds beside them."""

    items: dict[str, list[Item]]
    points: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=lambda: {"single": {}, "multi": {}})
    answers: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=lambda: {"single": {}, "multi": {}})
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: {"single": {}, "multi": {}})

    def only(self, items: Mapping[str, Sequence[Item]]) -> "Scores":
        """The same scores on some of the items, in their order."""
        places = {task: {item.id: place for place, item in enumerate(known)} for task, known in self.items.items()}
        picks = {task: [places[task][item.id] for item in chosen] for task, chosen in items.items()}

        def pick(table: str) -> dict[str, dict[str, Tensor]]:
            columns = self.points[table].items()
            return {column: {t: points[picks[t]] for t, points in tasks.items()} for column, tasks in columns}

        return Scores({t: list(i) for t, i in items.items()}, {name: pick(name) for name in self.points})


@dataclass(frozen=True)
class Job:
    """One column of one task: what a progress bar counts."""

    table: str
    column: str
    task: str
    run: Callable[[], tuple[list[str], Tensor]]


def run_study(
    panel: Panel,
    tasks: Mapping[str, Task],
    items: Mapping[str, Sequence[Item]],
    tuned_tasks: Sequence[str],
    few_shot: Mapping[str, str] | None = None,
    on_job: Callable[[Job, int, int], None] = lambda job, done, total: None,
    multi: Mapping[str, Spec] = MULTI_STRATEGIES,
) -> Scores:
    """Every model and strategy on every item.

    items        task -> its items; every name stands in `tasks`
    tuned_tasks  tasks that have an expert; the others are unseen, and appear in the table of all experts only
    few_shot     task -> solved questions to put before the prompt: what the strong model knows but does not show
    on_job       called before each column of each task with how many are done and how many there are
    multi        the strategies of the table of all experts
    """
    scores = Scores({task: list(chosen) for task, chosen in items.items()})

    def jobs(task: str) -> Iterator[Job]:
        return _jobs(panel, tasks[task], items[task], tuned_tasks, few_shot or {}, multi)

    total, done = sum(1 for task in items for _ in jobs(task)), 0
    for name in items:
        for job in jobs(name):
            on_job(job, done, total)
            started = perf_counter()
            answers, points = job.run()
            seconds = scores.seconds[job.table]
            seconds[job.column] = seconds.get(job.column, 0.0) + perf_counter() - started
            scores.points[job.table].setdefault(job.column, {})[name] = points
            scores.answers[job.table].setdefault(job.column, {})[name] = answers
            done += 1
    return scores


def alone_scores(panel: Panel, task: Task, items: Sequence[Item], role: str, prefix: str = "") -> Tensor:
    """One model by itself on the items: points of 100, [item]; `prefix` stands before every prompt."""
    work = _Writing(panel, task, items) if task.kind == "generate" else _Choosing(panel, items)
    return work.alone(role, prefix)[1]


def forced_scores(panel: Panel, task: Task, items: Sequence[Item], role: str) -> Tensor:
    """One model by itself, its answers bound to the task's own style: points of 100, [item].

    items    all of one kind: those with a label are answered by the likeliest of their choices; those without open
             with the likeliest of their choices, which may be one, and the model writes on from there
    """
    openings, points = _Choosing(panel, items).alone(role, "")
    if items[0].label is not None:
        return points
    model, tokenizer, length = panel.models[role], panel.tokenizer, task.max_new_tokens
    prompts = [item.prompt + opening for item, opening in zip(items, openings, strict=True)]
    prefixes = evaluation.read_prompts(model, tokenizer, prompts, length)
    answers = evaluation.answer_prompts(model, tokenizer, prefixes, length)
    whole = [opening + answer for opening, answer in zip(openings, answers, strict=True)]
    return _points(task, whole, items)


def _points(task: Task, answers: Sequence[str], items: Sequence[Item]) -> Tensor:
    """Points of written answers, [item]."""
    metric = ANSWER_METRICS[task.metric]
    return torch.tensor([100.0 * metric(a, item.target) for a, item in zip(answers, items, strict=True)])


def _jobs(
    panel: Panel,
    task: Task,
    items: Sequence[Item],
    tuned_tasks: Sequence[str],
    few_shot: Mapping[str, str],
    multi: Mapping[str, Spec],
) -> Iterator[Job]:
    """All columns of one task. Nothing runs before a job is run, and what jobs share is read by the first of them."""
    work = _Writing(panel, task, items) if task.kind == "generate" else _Choosing(panel, items)
    everyone, is_tuned = tuple(tuned_tasks), task.name in tuned_tasks

    def alone(table: str, column: str, role: str, prefix: str = "") -> Job:
        return Job(table, column, task.name, lambda: work.alone(role, prefix))

    def fused(table: str, column: str, spec: Spec, experts: tuple[str, ...]) -> Job:
        return Job(table, column, task.name, lambda: work.fused(spec, experts))

    if is_tuned:
        yield alone("single", "base", "base")
        yield alone("single", "expert", f"expert/{task.name}")
        yield alone("single", "strong", "strong")
        if task.name in few_shot:
            yield alone("single", "latent", "strong", few_shot[task.name])
        for column, spec in SINGLE_STRATEGIES.items():
            yield fused("single", column, spec, (task.name,))
        yield alone("single", "ceiling", f"ceiling/{task.name}")
    if "mixed" not in panel.models:
        return
    if not is_tuned:
        yield alone("multi", "base", "base")
        yield alone("multi", "strong", "strong")
        for name in everyone:
            yield alone("multi", f"expert/{name}", f"expert/{name}")
    for column, spec in multi.items():
        yield fused("multi", column, spec, everyone)
    yield alone("multi", "mixed", "mixed")
    yield alone("multi", "ceiling", "ceiling/mixed")


class _Writing:
    """Answers are written, greedily, and compared with the target."""

    def __init__(self, panel: Panel, task: Task, items: Sequence[Item]) -> None:
        self.panel, self.task, self.items = panel, task, items
        self.prefixes: dict[tuple[str, ...], tuple[Any, list[Prefix]]] = {}

    def alone(self, role: str, prefix: str) -> tuple[list[str], Tensor]:
        model = self.panel.models[role]
        return self._write(model, self._read(model, prefix))

    def fused(self, spec: Spec, experts: tuple[str, ...]) -> tuple[list[str], Tensor]:
        if experts not in self.prefixes:
            model = self.panel.fuse(experts)
            self.prefixes = {experts: (model, self._read(model, ""))}  # one set of caches at a time
        model, prefixes = self.prefixes[experts]
        model.strategy = self.panel.strategy(spec, experts)
        return self._write(model, prefixes)

    def _read(self, model: Any, prefix: str) -> list[Prefix]:
        prompts = [prefix + item.prompt for item in self.items]
        return evaluation.read_prompts(model, self.panel.tokenizer, prompts, self.task.max_new_tokens)

    def _write(self, model: Any, prefixes: list[Prefix]) -> tuple[list[str], Tensor]:
        answers = evaluation.answer_prompts(model, self.panel.tokenizer, prefixes, self.task.max_new_tokens)
        return answers, _points(self.task, answers, self.items)


class _Choosing:
    """The likeliest of the given choices. A strategy is a function of the members' laws, which are read once."""

    def __init__(self, panel: Panel, items: Sequence[Item]) -> None:
        self.panel, self.items = panel, items
        self.encoded: dict[str, Choices] = {}
        self.laws: dict[tuple[str, str], Float[Tensor, "position vocab"]] = {}

    def _choices(self, prefix: str) -> Choices:
        if prefix not in self.encoded:
            asked = [_Prefixed(item, prefix) for item in self.items]
            self.encoded[prefix] = evaluation.encode_choices(self.panel.tokenizer, asked)
        return self.encoded[prefix]

    def _law(self, role: str, prefix: str = "") -> Float[Tensor, "position vocab"]:
        if (role, prefix) not in self.laws:
            choices = self._choices(prefix)
            law = evaluation.read_choices(self.panel.models[role], self.panel.tokenizer, choices)
            self.laws[role, prefix] = law
        return self.laws[role, prefix]

    def alone(self, role: str, prefix: str) -> tuple[list[str], Tensor]:
        return self._choose(self._law(role, prefix), prefix)

    @torch.inference_mode()
    def fused(self, spec: Spec, experts: tuple[str, ...]) -> tuple[list[str], Tensor]:
        strategy = self.panel.strategy(spec, experts)
        strong, base = self._law("strong"), self._law("base")
        tuned = [self._law(f"expert/{name}") for name in experts]
        parts = []
        for start in range(0, len(strong), MAX_POSITIONS_AT_ONCE):
            rows = slice(start, start + MAX_POSITIONS_AT_ONCE)
            parts.append(strategy(strong[rows], base[rows], torch.stack([law[rows] for law in tuned])).log_probs)
        return self._choose(torch.cat(parts), "")

    def _choose(self, law: Float[Tensor, "position vocab"], prefix: str) -> tuple[list[str], Tensor]:
        places = evaluation.choose(self._choices(prefix), law)
        chosen = [(item.choices or ())[place] for item, place in zip(self.items, places, strict=True)]
        points = [100.0 * (place == item.label) for item, place in zip(self.items, places, strict=True)]
        return chosen, torch.tensor(points)


@dataclass(frozen=True)
class _Prefixed:
    """An item with solved questions before its prompt."""

    item: Item
    prefix: str

    @property
    def id(self) -> Any:
        return self.item.id

    @property
    def prompt(self) -> str:
        return self.prefix + self.item.prompt

    @property
    def target(self) -> str:
        return self.item.target

    @property
    def choices(self) -> Sequence[str] | None:
        return self.item.choices

    @property
    def label(self) -> int | None:
        return self.item.label
