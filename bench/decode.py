"""Tokens per second of fused decoding, beside the strong model alone and beside fusion as published.

Members are inflated zoo models: real behaviour on real prompts, at the cost of big models. Around one central point one
thing at a time is varied. All arms answer the same prompts greedily; tokens are those that each of them really wrote.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from bench import members, published
from bench.harness import WARM_UP, Arm, Case, Findings, Options, Progress, Record, interleave
from bench.members import MemberFactory, MemberSet, Meter, Spec, Stepper, Stopwatch
from trimtab.core.errors import BadSetting
from trimtab.zoo import TUNED_TASKS, Split

STRONG, ASSISTED = "strong alone", "strong assisted"
STATIC, GRID = "static as published", "grid as published"
OURS, SPECULATED = "ours", "ours speculated"
CENTRE = "centre"
AS_IT_IS = "as it is"  # a prompt of the zoo, not cut and not lengthened
WARM_UP_TOKENS = 4
STEPS = 8  # of one measurement of a single step
ONE_ROW_ONLY = "transformers assists a single row only"
TOO_LONG = "left to the other points: a repeat takes minutes"


@dataclass(frozen=True)
class Point:
    """One point of comparison.

    tasks         whose test prompts are answered, in turn
    prompt        tokens of every prompt; None: as the items are
    output        tokens of every answer; None: until the end of the text, at most what the task allows
    batch         rows that are answered together
    batches       how many such batches a repeat answers
    split         which of the tasks' prompts
    drafts        fixed draft lengths that are measured beside the adaptive one
    is_brief      without the grid and fixed drafts, for points that take long
    """

    name: str
    spec: Spec
    tasks: tuple[str, ...] = ("arithmetic",)
    prompt: int | None = None
    output: int | None = None
    batch: int = 1
    batches: int = 1
    split: Split = "test"
    repeats: int = 3
    drafts: tuple[int, ...] = (4,)
    is_brief: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The coordinates, for JSON and tables."""
        kind = "LoRA" if self.spec.is_lora else "full"
        return {
            "ratio": self.spec.ratio,
            "experts": f"{len(self.spec.experts)} {kind}",
            "tasks": ", ".join(self.tasks),
            "batch": self.batch,
            "prompt": self.prompt or AS_IT_IS,
            "output": self.output or "to its end",
            "dtype": self.spec.dtype,
        }


def points(is_quick: bool) -> list[Point]:
    """The centre first, then one change at a time."""
    spec = Spec(600_000_000, 20)
    if is_quick:
        return [Point(CENTRE, spec)]
    centre = Point(CENTRE, spec, batches=2, repeats=5, drafts=(2, 4, 8))
    vary = partial(replace, centre, batches=1, repeats=3, drafts=(4,))
    found = [centre]
    found += [vary(name=f"ratio {ratio}", spec=replace(spec, ratio=ratio)) for ratio in (5, 10, 50)]
    found += [vary(name=f"batch {rows}", batch=rows) for rows in (4, 16)]
    for task, count in (("summary", 1), ("facts", 8), ("truth", 8)):  # two of them have answers of a few tokens
        found.append(vary(name=f"task {task}", tasks=(task,), spec=replace(spec, experts=(task,)), batches=count))
    for count, is_lora in ((2, False), (4, False), (1, True), (2, True), (4, True)):
        tasks = TUNED_TASKS[:count]
        name = f"{count} {'LoRA' if is_lora else 'full'} experts"
        members_of = replace(spec, experts=tasks, is_lora=is_lora)
        found.append(vary(name=name, tasks=tasks, batches=2 * count, spec=members_of))
    found += [vary(name=f"prompt {p}, output {o}", prompt=p, output=o) for p, o in ((512, 8), (8, 8))]
    found.append(vary(name="prompt 8, output 512", prompt=8, output=512, repeats=2, is_brief=True))
    return found


def measure(options: Options, progress: Progress) -> Findings:
    """All points whose name holds `options.only`, and single steps."""
    chosen = [point for point in points(options.is_quick) if options.only in point.name]
    return run([as_asked(point, options) for point in chosen], MemberFactory(), options, progress)


def as_asked(point: Point, options: Options) -> Point:
    """The point with what the command line says of it."""
    spec = replace(point.spec, device=options.device, strong_parameters=options.strong or point.spec.strong_parameters)
    return replace(point, spec=spec, repeats=options.repeats or point.repeats)


def run(chosen: list[Point], factory: MemberFactory, options: Options, progress: Progress) -> Findings:
    """Measures these points; after the centre also its single steps. Points that cannot be had here are noted."""
    cases, notes = list[Case](), list(NOTES)
    for point in chosen:
        progress(f"{point.name}: making members")
        try:
            member_set = factory.make(point.spec)
        except BadSetting as error:
            notes.append(f"Left out, {point.name}: {error.found} {error.expected}")
            continue
        cases.append(generation_case(point, member_set, progress))
        if point.name == CENTRE:
            cases += step_cases(point, factory, member_set, options, progress)
    settings = {"points": [repr(point) for point in chosen]}
    return Findings("Fused decoding beside its alternatives", settings, cases, notes)


NOTES = [
    "Members: zoo models with silent blocks on top (same logits, more cost). Strategy of 'ours': dynamic.",
    "Tokens per strong call are counted per row and include the reading of the prompt.",
    "Members alone and published loops read adapters merged into models of their own, which is the fastest way.",
    "Positions from 256 on were never trained: points with longer texts show cost, not natural acceptance.",
]


# ---- whole answers


def generation_case(point: Point, member_set: MemberSet, progress: Progress) -> Case:
    """All arms of one point."""
    work = Work(point, member_set)
    arms, left_out = arms_of(point, member_set, work)
    runs = interleave(arms, point.repeats, lambda text: progress(f"{point.name}: {text}"))
    about = (point.settings, member_set.facts, runs, left_out)
    return Case(point.name, "tokens_per_second", "tokens/s", True, STRONG, BESIDE, *about)


BESIDE = ("tokens", "tokens_per_strong_call", "acceptance", "strong_seconds", "small_seconds", "other_seconds")


class Work:
    """What a repeat has to answer: encoded before the clock starts, the same for all arms."""

    def __init__(self, point: Point, member_set: MemberSet) -> None:
        self._point, self._member_set = point, member_set
        limit = point.output or members.answer_tokens(point.tasks)
        self.limits = {"max_new_tokens": limit, "min_new_tokens": point.output or 0}
        self._encoded: dict[int, list[dict[str, Tensor]]] = {}

    def batches(self, repeat: int) -> list[dict[str, Tensor]]:
        """Input ids and masks; another repeat answers other prompts."""
        if repeat not in self._encoded:
            self._encoded[repeat] = list(self._encode(max(repeat, 0)))
        return self._encoded[repeat]

    def limits_of(self, repeat: int) -> dict[str, int]:
        """A warm-up writes a few tokens only."""
        if repeat == WARM_UP:
            return {name: min(limit, WARM_UP_TOKENS) for name, limit in self.limits.items()}
        return self.limits

    def _encode(self, repeat: int) -> Iterator[dict[str, Tensor]]:
        point, device = self._point, self._point.spec.device
        texts_of = members.prompts_of if point.prompt is None else members.long_prompts
        for number in range(repeat * point.batches, (repeat + 1) * point.batches):
            texts = texts_of(point.tasks, point.batch, number * point.batch, split=point.split)
            yield members.encode(self._member_set.tokenizer, texts, point.prompt, device)


Write = Callable[[Mapping[str, Tensor], Mapping[str, int]], Tensor]  # inputs, limits -> ids [batch, prompt + new]


def arms_of(point: Point, member_set: MemberSet, work: Work) -> tuple[dict[str, Arm], dict[str, str]]:
    """Every arm by name, and those left out with the reason."""
    tokenizer, left_out = member_set.tokenizer, {}
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}

    def as_published(fuse: published.Fuse) -> Write:
        experts = list(member_set.experts.values())
        return lambda inputs, limits: published.generate(
            member_set.strong, member_set.base, experts, fuse, inputs, **ends, **limits
        )

    def plain(**more: Any) -> Write:
        return lambda inputs, limits: member_set.strong.generate(**inputs, **limits, do_sample=False, **more)

    writers: dict[str, Write] = {STRONG: plain()}
    if point.batch == 1:
        writers[ASSISTED] = plain(assistant_model=member_set.base)
    else:
        left_out[ASSISTED] = ONE_ROW_ONLY
    writers[STATIC] = as_published(published.fuse_static)
    if not point.is_brief:
        writers[GRID] = as_published(published.fuse_grid)
    else:
        left_out[GRID] = TOO_LONG
    arms: dict[str, Arm] = {name: _arm(write, member_set, work) for name, write in writers.items()}
    plans: dict[str, Any] = {OURS: 0, SPECULATED: "auto"}
    if not point.is_brief:
        plans |= {f"{SPECULATED}, {n} drafted": n for n in point.drafts}
    arms |= {name: fused_arm(member_set, work, speculate=speculate) for name, speculate in plans.items()}
    return arms, left_out


def _arm(
    write: Write, member_set: MemberSet, work: Work, after: Callable[[], None] = lambda: None, is_fused: bool = False
) -> Arm:
    """An arm that answers all batches of a repeat, with counts; `after` is called behind each batch."""

    def answer(repeat: int) -> Record:
        forwards = member_set.fused.reader.groups
        groups = (forwards[:1], forwards[1:]) if is_fused else ([member_set.strong], member_set.small)
        watched = dict(zip(("strong", "small"), groups, strict=True))
        tokens, rows = 0, 0
        batches, limits = work.batches(repeat), work.limits_of(repeat)
        with Meter(watched) as meter, Stopwatch(member_set.strong.device) as watch:
            for inputs in batches:
                ids = write(inputs, limits)
                after()
                tokens += count_new(ids[:, inputs["input_ids"].shape[1] :], member_set.tokenizer.eos_token_id)
                rows = len(ids)
        return _record(watch.seconds, tokens, rows, meter)

    return answer


def fused_arm(member_set: MemberSet, work: Work, **settings: Any) -> Arm:
    """Ours; where it speculates, also what became of the drafts. `settings` go to `generate`."""
    fused, reports = member_set.fused, list[Any]()
    learned: Any = None  # of costs and drafts, by this arm alone

    def write(inputs: Mapping[str, Tensor], limits: Mapping[str, int]) -> Tensor:
        asked: dict[str, Any] = {**inputs, **limits, "do_sample": False, **settings}
        ids: Tensor = fused.generate(**asked)
        return ids

    plain = _arm(write, member_set, work, after=lambda: reports.append(fused.last_speculation), is_fused=True)

    def answer(repeat: int) -> Record:
        nonlocal learned
        reports.clear()
        fused._cost_model = learned
        record = dict(plain(repeat))
        learned = fused._cost_model
        if settings["speculate"] != 0:
            record["drafted"] = sum(report.drafted for report in reports)
            record["accepted"] = sum(report.accepted for report in reports)
            record["acceptance"] = record["accepted"] / max(record["drafted"], 1)
        return record

    return answer


def _record(seconds: float, tokens: int, rows: int, meter: Meter) -> Record:
    record = {
        "seconds": seconds,
        "tokens": float(tokens),
        "tokens_per_second": tokens / seconds,
        "tokens_per_strong_call": tokens / rows / max(meter.calls["strong"], 1),
        "strong_calls": float(meter.calls["strong"]),
        "small_calls": float(meter.calls["small"]),
    }
    shares = {f"{group}_seconds": inside for group, inside in meter.seconds.items()}
    return record | shares | {"other_seconds": seconds - sum(meter.seconds.values())}


def count_new(new_ids: Tensor, eos_id: int) -> int:
    """Tokens written, up to and including the first end of each row; `new_ids` is [batch, new]."""
    is_end = new_ids == eos_id
    behind = (is_end.cumsum(dim=-1) - is_end.long()) > 0
    return int((~behind).sum())


# ---- single steps

STEP, SMALL_PART = "single step", "small part"
OWN_STEPS = "members' own steps"
STEP_REPEATS = 9


def step_cases(
    point: Point, factory: MemberFactory, member_set: MemberSet, options: Options, progress: Progress
) -> list[Case]:
    """What fusing adds to the members' own forwards, and what more LoRA experts cost."""
    repeats = options.repeats or STEP_REPEATS
    progress("making members with adapters")
    one, four = (factory.make(replace(point.spec, experts=TUNED_TASKS[:n], is_lora=True)) for n in (1, 4))
    return [
        _step_case(STEP, member_set, point, repeats, progress),
        _step_case(f"{STEP}, 4 LoRA experts", four, point, repeats, progress),
        _small_part_case(one, four, point, repeats, progress),
    ]


def _step_case(name: str, member_set: MemberSet, point: Point, repeats: int, progress: Progress) -> Case:
    """The fused step beside the sum of what its members take one by one, each alone."""
    alone = [member_set.strong, member_set.base, *member_set.experts.values()]

    def own(_: int) -> Record:
        return {"ms": 1e3 * sum(mean_seconds(Stepper(model)) for model in alone)}

    arms: dict[str, Arm] = {OWN_STEPS: own, OURS: lambda _: {"ms": 1e3 * mean_seconds(Stepper(member_set.fused))}}
    runs = interleave(arms, repeats, lambda text: progress(f"{name}: {text}"))
    settings = _step_settings(point, len(member_set.experts))
    return Case(name, "ms", "ms a step", False, OWN_STEPS, (), settings, member_set.facts, runs)


ONE_EXPERT, FOUR_EXPERTS = "1 LoRA expert", "4 LoRA experts"


def _small_part_case(one: MemberSet, four: MemberSet, point: Point, repeats: int, progress: Progress) -> Case:
    """Seconds inside the small models' forwards of a fused step: base and one adapter, base and four."""

    def small_ms(member_set: MemberSet) -> Record:
        stepper = Stepper(member_set.fused)
        with Meter({"small": member_set.fused.reader.groups[1:]}) as meter:
            whole = mean_seconds(stepper)
        return {"ms": 1e3 * meter.seconds["small"] / STEPS, "whole_step_ms": 1e3 * whole}

    arms: dict[str, Arm] = {ONE_EXPERT: lambda _: small_ms(one), FOUR_EXPERTS: lambda _: small_ms(four)}
    runs = interleave(arms, repeats, lambda text: progress(f"{SMALL_PART}: {text}"))
    about = (_step_settings(point, 4), four.facts, runs)
    return Case(SMALL_PART, "ms", "ms a step", False, ONE_EXPERT, ("whole_step_ms",), *about)


def mean_seconds(stepper: Stepper) -> float:
    """Of one step, over a few steps in a row."""
    return sum(stepper.seconds() for _ in range(STEPS)) / STEPS


def _step_settings(point: Point, experts: int) -> dict[str, Any]:
    return {"ratio": point.spec.ratio, "experts": experts, "batch": 1, "dtype": point.spec.dtype}
