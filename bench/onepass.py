"""What the small members cost at a step: each by itself, beside all of them in one forward.

    separate        one forward per small member (`one_pass=False`)
    one pass        one forward for all of them (`one_pass=True`)
    ... one expert  the same with a single expert, for what more experts cost

Members are the zoo's, as they are or with silent blocks on top. A step reads one token per row after 64 others, with a
cache, by all members but the strong one. `products` are forwards of one model with torch's own matrix products, and
with those that groups use.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from bench import members
from bench.harness import Arm, Case, Findings, Options, Progress, Record, interleave
from bench.inflation import inflate_
from trimtab import FusedCausalLM
from trimtab.logits.forward import groups as groups_module
from trimtab.logits.forward.groups import ForwardGroup, ForwardInputs, OneModel
from trimtab.models.loading import Member
from trimtab.models.opening import quiet_bars
from trimtab.zoo import TUNED_TASKS

SEPARATE, ONE_PASS = "separate", "one pass"
SEPARATE_ONE, ONE_PASS_ONE = "separate, one expert", "one pass, one expert"
TORCH, QUICK = "torch's products", "groups' products"
LORA, FULL = "LoRA", "full"
PAST = 64  # tokens that were read before
STEPS = 5  # a record is the median of so many
PRODUCT_PARAMETERS = 100_000_000
BLOCKS = 12  # on top of the zoo's two: a step of a small real model starts as many operations
FIGURE = "milliseconds"


@dataclass(frozen=True)
class Point:
    """Where the arms stand side by side.

    parameters   of every small member; 0: as the zoo has it
    """

    kind: str
    experts: int
    parameters: int
    batch: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For example "4 LoRA experts, 25M, batch 1, float32"."""
        return f"{self.experts} {self.kind} experts, {size_of(self.parameters)}, batch {self.batch}, {self.dtype}"


def size_of(parameters: int) -> str:
    """For example "25M"."""
    return f"{parameters / 1e6:g}M" if parameters else "zoo"


def points(is_quick: bool) -> Iterator[Point]:
    """All points of a run."""
    if is_quick:
        for kind in (LORA, FULL):
            for parameters in (0, 25_000_000):
                yield Point(kind, 4, parameters, 1)
        return
    for kind in (LORA, FULL):
        for parameters in (0, 5_000_000, 25_000_000, 100_000_000):
            for batch in (1, 8):
                yield Point(kind, 4, parameters, batch)
            yield Point(kind, 4, parameters, 1, "bfloat16")
        for experts in (1, 2, 3):
            yield Point(kind, experts, 25_000_000, 1)


def measure(options: Options, progress: Progress) -> Findings:
    """All points whose name holds `options.only`, then products of few rows."""
    repeats = options.repeats or (3 if options.is_quick else 7)
    cases = []
    for point in points(options.is_quick):
        if options.only in point.name:
            progress(f"{point.name}: making members")
            cases.append(step_case(point, repeats, progress))
    for tokens in (1, 5) if options.is_quick else (1, 2, 3, 5, 9, 17):
        if options.only in product_name(tokens, PRODUCT_PARAMETERS):
            cases.append(product_case(tokens, PRODUCT_PARAMETERS, repeats, progress))
    return Findings("The small members in one forward", {"past": PAST, "steps": STEPS}, cases, [])


# ---- steps of the small members


def step_case(point: Point, repeats: int, progress: Progress) -> Case:
    """The small members' part of a step, apart and joint."""
    fused = fused_model(point, point.experts)
    arms = dict(zip((SEPARATE, ONE_PASS), groups_of(fused), strict=True))
    if point.experts > 1:
        few = fused_model(point, 1)
        arms |= dict(zip((SEPARATE_ONE, ONE_PASS_ONE), groups_of(few), strict=True))
    steppers: dict[str, Arm] = {name: Stepper(groups, point.batch) for name, groups in arms.items()}
    runs = interleave(steppers, repeats, lambda text: progress(f"{point.name}: {text}"))
    facts = {
        "bytes_of_a_member": bytes_of(fused.members.base.model),
        "groups": [group.kind for group in arms[ONE_PASS]],
    }
    return Case(point.name, FIGURE, "ms", False, SEPARATE, settings=vars(point), facts=facts, runs=runs)


def groups_of(fused: FusedCausalLM) -> Iterator[list[ForwardGroup]]:
    """The small members' groups, separate and then joint."""
    for one_pass in (False, True):
        fused.one_pass = one_pass
        yield [group for group in fused.reader.groups if 0 not in group.runs]


class Stepper:
    """Steps of some groups, one after the other."""

    def __init__(self, groups: list[ForwardGroup], batch: int) -> None:
        self._groups, self._batch, self._width = groups, batch, 0
        self._caches = [group.new_group_cache() for group in groups]
        self._read(PAST)

    def __call__(self, repeat: int) -> Record:
        times = [self._read(1) for _ in range(STEPS)]
        for cache in self._caches:
            cache.crop(-STEPS)
        self._width -= STEPS
        return {FIGURE: statistics.median(times) * 1e3}

    def _read(self, tokens: int) -> float:
        ids = torch.arange(2, 2 + tokens).repeat(self._batch, 1)
        positions = torch.arange(self._width, self._width + tokens).unsqueeze(0)
        self._width += tokens
        inputs = ForwardInputs(ids, None, positions, self._width)
        started = time.perf_counter()
        for group, cache in zip(self._groups, self._caches, strict=True):
            group.read([inputs] * len(group.runs), cache, 1)
        return time.perf_counter() - started


def fused_model(point: Point, experts: int) -> FusedCausalLM:
    """The zoo's strong model with so many small experts of this size."""
    tasks, tokenizer = TUNED_TASKS[:experts], members.load_tokenizer()
    strong = load("strong", 0, point.dtype)
    base = load("small", 0 if point.kind == LORA else point.parameters, point.dtype)
    if point.kind == FULL:
        full = {task: load(f"small/{task}", point.parameters, point.dtype) for task in tasks}
        return FusedCausalLM.from_members(strong, base, full, tokenizer=tokenizer, one_pass=False)
    references = {task: f"zoo:small/{task}-lora" for task in tasks}
    with quiet_bars():
        fused = FusedCausalLM.from_members(strong, base, references, tokenizer=tokenizer, one_pass=False)
    grow(base, point.parameters)
    for switch in fused.members.switches.values():
        switch.refresh()
    return fused


def load(name: str, parameters: int, dtype: str) -> Any:
    """A model of the zoo, of this size; 0: as it is."""
    return grow(members.load_member(name, dtype), parameters)


def grow(model: Any, parameters: int) -> Any:
    """With silent blocks on top, until it has so many parameters; 0: as it is."""
    return inflate_(model, parameters, BLOCKS) if parameters else model


def bytes_of(model: Any) -> int:
    """Bytes of a model's weights, without adapters."""
    return sum(part.nbytes for name, part in model.named_parameters() if ".lora_" not in name)


# ---- products of few rows


def product_name(tokens: int, parameters: int) -> str:
    """For example "products: 5 tokens, 100M, float32"."""
    return f"products: {tokens} tokens, {size_of(parameters)}, float32"


def product_case(tokens: int, parameters: int, repeats: int, progress: Progress) -> Case:
    """Forwards of one float32 model that read so many tokens at once."""
    name = product_name(tokens, parameters)
    model = load("small", parameters, "float32")
    with patch.object(groups_module, "quick_linears", lambda model: {}):
        plain = ForwardGroup([0], [Member("base", model)], OneModel(Member("base", model)))
    quick = ForwardGroup([0], [Member("base", model)], OneModel(Member("base", model)))
    arms: dict[str, Arm] = {TORCH: ReadingArm(plain, tokens), QUICK: ReadingArm(quick, tokens)}
    runs = interleave(arms, repeats, lambda text: progress(f"{name}: {text}"))
    settings = {"tokens": tokens, "parameters": parameters, "dtype": "float32"}
    facts = {"bytes_of_a_member": bytes_of(model)}
    return Case(name, FIGURE, "ms", False, TORCH, settings=settings, facts=facts, runs=runs)


class ReadingArm:
    """Reads so many tokens after no others."""

    def __init__(self, group: ForwardGroup, tokens: int) -> None:
        ids = torch.arange(2, 2 + tokens).unsqueeze(0)
        self._group, self._inputs = group, ForwardInputs(ids, None, torch.arange(tokens).unsqueeze(0), tokens)

    def __call__(self, repeat: int) -> Record:
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            self._group.read([self._inputs])
            times.append(time.perf_counter() - started)
        return {FIGURE: statistics.median(times) * 1e3}
