"""What a strategy's call costs, beside the paper's grid, beside one log-softmax, and beside a strong model's step.

    ours: dynamic, compiled     Strategy.__call__ of the amount `dynamic`: from log-probs to the fused distribution
    ours: its search of alpha   the part of it that finds alpha, targets and families being known
    dynamic, plain torch        the same call where numba is missing
    grid                        Strategy.__call__ of the amount `grid`, the paper's Algorithm 1
    log-softmax                 of the strong model's logits alone, float32

Members: `peaked` logits are 4.5 g + 1.5 s for the strong model, 4.5 g + 2 b for the base and 0.7 t more for the expert,
with independent normal g, s, b, t: entropies of 1 to 4 nats, as language models have them. `flat` logits are s, b and
b + t / 2, with nearly log V nats. `zoo` are positions of the embedded models, V = 1,536.

On a machine that is busy otherwise measure with `--threads 1`: threads that wait for one another then cost the plain
arms tens of times their work.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.harness import Arm, Case, Findings, Options, Progress, Record, interleave, ratios, spread
from trimtab import zoo
from trimtab.core.divergence import entropy_nats
from trimtab.logits.solver import compiled
from trimtab.logits.solver.deltas import measure_deltas
from trimtab.logits.solver.match import match_divergences
from trimtab.logits.strategy.fusion import Strategy, make_strategy

OURS, SEARCH, PLAIN, GRID, SOFTMAX = (
    "ours: dynamic, compiled",
    "ours: its search of alpha",
    "dynamic, plain torch",
    "grid",
    "log-softmax",
)
STEP = "strong model's step"
PEAKED, FLAT, ZOO = "peaked", "flat", "zoo"
ALPHA_MAX = 2.0

# A record is the median of as many calls as fit into this time, at least one.
RECORD_SECONDS = 0.03
# The slow arms work on so many numbers at most; of a larger batch they get the first rows, and the time is multiplied.
# That flatters them: a smaller working set stays in the processor's caches.
SLOW_NUMBERS, SLOW_NUMBERS_QUICK = 1 << 22, 1 << 19
DRAWN_NUMBERS = 1 << 23  # draws that differ from repeat to repeat, up to so many numbers in all

ZOO_SIZE, ZOO_TASK = "small", "arithmetic"
MemberLogProbs = tuple[Tensor, Tensor, Tensor]  # strong and base [batch, vocab], expert [1, batch, vocab]


@dataclass(frozen=True)
class Point:
    """Where arms stand side by side."""

    distribution: str
    vocab: int
    batch: int

    @property
    def name(self) -> str:
        """For example "peaked, V 152,000, batch 1"."""
        return f"{self.distribution}, V {self.vocab:,}, batch {self.batch}"


def points(is_quick: bool) -> list[Point]:
    """All points of a run."""
    if is_quick:
        sizes = [(1_000, 1), (1_000, 64), (8_000, 8), (32_000, 1), (152_000, 1), (152_000, 8), (260_000, 1)]
        flat = [Point(FLAT, vocab, 1) for vocab in (1_000, 152_000)]
        return [
            *(Point(PEAKED, *size) for size in sizes),
            *flat,
            Point(ZOO, zoo_vocab(), 1),
            Point(ZOO, zoo_vocab(), 64),
        ]
    batches = (1, 8, 64, 256)
    sizes = [(vocab, batch) for vocab in (1_000, 8_000, 32_000, 152_000, 260_000) for batch in batches]
    real = [Point(ZOO, zoo_vocab(), batch) for batch in batches]
    return [*(Point(kind, *size) for kind in (PEAKED, FLAT) for size in sizes), *real]


def measure(options: Options, progress: Progress) -> Findings:
    """All points whose name holds `options.only`, and the steps of a strong model of a billion parameters."""
    repeats = options.repeats or (3 if options.is_quick else 7)
    if compiled.is_available():
        compiled.warm_up()
    cases = []
    for point in points(options.is_quick):
        if options.only in point.name:
            cases.append(solve_case(point, repeats, options.is_quick, progress))
    for dtype in (torch.bfloat16,) if options.is_quick else (torch.bfloat16, torch.float32):
        if options.only in (name := step_name(dtype)):
            cases.append(step_case(name, dtype, repeats, 1 if options.is_quick else 3, progress))
    settings = {"alpha_max": ALPHA_MAX, "record_seconds": RECORD_SECONDS, "is_compiled": compiled.is_available()}
    return Findings("The solver: time of a strategy's call", settings, cases, notes(cases))


# ---- the solver beside its alternatives


def solve_case(point: Point, repeats: int, is_quick: bool, progress: Progress) -> Case:
    """All arms at one point; ratios to ours."""
    draws = max(1, min(repeats, DRAWN_NUMBERS // (point.batch * point.vocab)))
    drawn = [draw_log_probs(point, draw) for draw in range(draws)]
    rows = max(1, min(point.batch, (SLOW_NUMBERS_QUICK if is_quick else SLOW_NUMBERS) // point.vocab))
    arms = arms_of(drawn, rows)
    entropy = torch.cat([entropy_nats(log_probs[0].double()) for log_probs in drawn])
    facts = {"entropy_nats": round(float(entropy.median()), 2)}
    if rows < point.batch:
        facts["rows_of_slow_arms"] = rows
    settings = {"distribution": point.distribution, "vocab": point.vocab, "batch": point.batch}
    runs = interleave(arms, repeats, lambda text: progress(f"{point.name}: {text}"))
    case = Case(
        point.name,
        "microseconds",
        "us per call",
        False,
        reference(),
        (),
        settings,
        facts,
        runs,
    )
    if not compiled.is_available():
        case.left_out = dict.fromkeys((OURS, SEARCH), "numba is not installed")
    return case


def reference() -> str:
    """The arm that ratios are taken against."""
    return OURS if compiled.is_available() else PLAIN


def arms_of(drawn: list[MemberLogProbs], rows: int) -> dict[str, Arm]:
    """The arms over draws that take turns; the slow ones on the first `rows` rows, scaled to the batch."""
    dynamic, grid = (make_strategy(name, alpha_max=ALPHA_MAX) for name in ("dynamic", "grid"))
    batch = drawn[0][0].shape[0]
    logits = [log_probs[0] + 1.0 for log_probs in drawn]

    def fuse(strategy: Strategy, repeat: int, rows: int) -> Record:
        strong, base, experts = drawn[repeat % len(drawn)]
        strong, base, experts = strong[:rows], base[:rows], experts[:, :rows]
        return timed(lambda: strategy(strong, base, experts), scale=batch / rows)

    def fuse_plainly(repeat: int) -> Record:
        with patch.object(compiled, "is_available", lambda: False):
            return fuse(dynamic, repeat, rows)

    def search(repeat: int) -> Record:
        deltas = measure_deltas(*drawn[repeat % len(drawn)])
        targets = deltas.forward[0], deltas.reverse[0]
        return timed(lambda: match_divergences(deltas.family, *targets, ALPHA_MAX))

    arms: dict[str, Arm] = {}
    if compiled.is_available():
        arms = {OURS: lambda repeat: fuse(dynamic, repeat, batch), SEARCH: search}
    arms[PLAIN] = fuse_plainly
    arms[GRID] = lambda repeat: fuse(grid, repeat, rows)
    arms[SOFTMAX] = lambda repeat: timed(lambda: logits[repeat % len(drawn)].log_softmax(dim=-1))
    return arms


def timed(call: Callable[[], object], scale: float = 1.0) -> Record:
    """The median time of some calls, the first not counted where they are short; times `scale`."""
    seconds = [seconds_of(call)]
    if seconds[0] < RECORD_SECONDS:
        seconds = [seconds_of(call) for _ in range(max(3, min(300, int(RECORD_SECONDS / seconds[0]))))]
    return {"microseconds": 1e6 * scale * statistics.median(seconds)}


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ---- distributions


def draw_log_probs(point: Point, draw: int) -> MemberLogProbs:
    """Members' log-probabilities, float32; different ones for each draw."""
    if point.distribution == ZOO:
        rows = torch.arange(point.batch) + draw * point.batch
        strong, base, expert = (log_probs[rows % len(log_probs)] for log_probs in zoo_log_probs())
        return strong, base, expert.unsqueeze(0)
    generator = torch.Generator().manual_seed(draw)

    def normal() -> Tensor:
        return torch.randn(point.batch, point.vocab, generator=generator)

    if point.distribution == FLAT:
        strong, base = normal(), normal()
        expert = base + 0.5 * normal()
    else:
        common = 4.5 * normal()
        strong, base = common + 1.5 * normal(), common + 2.0 * normal()
        expert = base + 0.7 * normal()
    return strong.log_softmax(-1), base.log_softmax(-1), expert.log_softmax(-1).unsqueeze(0)


def zoo_vocab() -> int:
    """How many tokens the embedded models have."""
    return int(zoo_log_probs()[0].shape[-1])


@cache
@torch.no_grad()
def zoo_log_probs(texts: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Strong, base and expert at every position of some validation texts, float32 [row, vocab]; rows shuffled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.resolve("zoo:tokenizer"))
    items = zoo.load_items(ZOO_TASK, "validation", limit=texts)
    ids = [torch.tensor([tokenizer(item.prompt + item.target)["input_ids"]]) for item in items]
    found = []
    for name in ("strong", ZOO_SIZE, f"{ZOO_SIZE}/{ZOO_TASK}"):
        model = AutoModelForCausalLM.from_pretrained(zoo.resolve(f"zoo:{name}"), dtype=torch.float32).eval()
        found.append(torch.cat([model(text).logits[0] for text in ids]).log_softmax(-1))
    order = torch.randperm(len(found[0]), generator=torch.Generator().manual_seed(0))
    return found[0][order], found[1][order], found[2][order]


# ---- the solver beside a step of a strong model

STEP_VOCAB, CACHED_TOKENS = 152_000, 128


def step_name(dtype: torch.dtype) -> str:
    """For example "1B step, bfloat16"."""
    return f"1B step, {str(dtype).removeprefix('torch.')}"


def step_case(name: str, dtype: torch.dtype, repeats: int, draws: int, progress: Progress) -> Case:
    """A decoding step of a model of the size, and the strategy's call that follows it, caches left as the step does."""
    progress(f"{name}: making the model")
    step, parameters = billion_step(dtype)
    drawn = [draw_log_probs(Point(PEAKED, STEP_VOCAB, 1), draw) for draw in range(draws)]
    dynamic = make_strategy("dynamic", alpha_max=ALPHA_MAX)

    def after_a_step(seconds: Callable[[MemberLogProbs], float]) -> Record:
        found = []
        for log_probs in drawn:
            step()
            found.append(seconds(log_probs))
        return median_of(found)

    def search(log_probs: MemberLogProbs) -> float:
        deltas = measure_deltas(*log_probs)
        return seconds_of(lambda: match_divergences(deltas.family, deltas.forward[0], deltas.reverse[0], ALPHA_MAX))

    arms: dict[str, Arm] = {
        STEP: lambda repeat: median_of(seconds_of(step) for _ in drawn),
        OURS: lambda repeat: after_a_step(lambda log_probs: seconds_of(lambda: dynamic(*log_probs))),
        SEARCH: lambda repeat: after_a_step(search),
        SOFTMAX: lambda repeat: after_a_step(lambda log_probs: seconds_of(lambda: log_probs[0].log_softmax(dim=-1))),
    }
    if not compiled.is_available():
        arms[PLAIN] = arms.pop(OURS)
    settings = {"vocab": STEP_VOCAB, "batch": 1, "cached_tokens": CACHED_TOKENS, "distribution": PEAKED}
    runs = interleave(arms, repeats, lambda text: progress(f"{name}: {text}"))
    return Case(
        name,
        "microseconds",
        "us per call",
        False,
        reference(),
        (),
        settings,
        {"parameters": parameters},
        runs,
    )


def median_of(seconds: Iterable[float]) -> Record:
    """The median of some times."""
    return {"microseconds": 1e6 * statistics.median(seconds)}


def billion_step(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A step with a cache of a Llama-shaped model, 16 blocks of width 2,048 as in Llama 3.2 1B, and its parameters.

    Every weight has the same value: a step's time does not depend on values.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=STEP_VOCAB,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for values in (*model.parameters(), *model.buffers()):
            values.fill_(0.01)
    past = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.ones(1, CACHED_TOKENS, dtype=torch.long), past_key_values=past, logits_to_keep=1)

    @torch.no_grad()
    def step() -> None:
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
        past.crop(-1)

    return step, sum(values.numel() for values in model.parameters())


# ---- what stands out


def notes(cases: list[Case]) -> list[str]:
    """Ours over the grid at its worst, and over each step of a strong model; `targets` judges them."""
    found = []
    beside_grid = [(share(case, OURS, GRID), case.name) for case in cases if {OURS, GRID} <= case.runs.keys()]
    if beside_grid:
        worst, where = max(beside_grid)
        found.append(f"The exact call takes at most {worst:.3f} of the grid's time, at {where}.")
    for case in cases:
        if {OURS, STEP} <= case.runs.keys():
            whole, search = share(case, OURS, STEP), share(case, SEARCH, STEP)
            found.append(
                f"Of a strong model's step, {case.name}: the whole call takes {whole:.2%}, its search {search:.2%}."
            )
    return found


def share(case: Case, arm: str, reference: str) -> float:
    """The median over repeats of one arm's time over another's."""
    return spread(ratios(case, arm, reference)).median
