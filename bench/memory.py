"""Peak memory of a fused model that generates, beside the sum of its members that generate alone.

Every figure comes from a process of its own. It imports everything and generates a little with tiny members, so that
libraries, thread pools and compiled code stand; what is resident then is the baseline. It makes its members, sets the
kernel's high-water mark back, generates, and reads the mark: peak = mark - baseline. The allocator gives freed memory
back at once (MALLOC_* of the children), or the mark would hold what nobody uses.
"""

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import members
from bench.harness import Arm, Case, Findings, Options, Progress, Record, interleave
from bench.machine import ROOT
from bench.members import Spec
from trimtab.core.errors import TrimtabError, unknown_name
from trimtab.zoo import TUNED_TASKS

SUM, OURS, SPECULATED = "sum of members", "ours", "ours speculated"
PARTS, SMALL_PART = "base + adapters", "ours, small part"
FUSED, STRONG, BASE = "fused", "strong", "base"
MIB = 2**20
GIVING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
LARGE_VOCABULARY = 152_000


@dataclass(frozen=True)
class Load:
    """What one process holds and does.

    who          "fused", "strong", "base", or an expert's name
    small        parameters of every small member
    vocabulary   of random members; 0: the zoo's members
    speculate    for the fused model
    """

    who: str
    strong: int = 400_000_000
    small: int = 40_000_000
    experts: tuple[str, ...] = TUNED_TASKS[:1]
    is_lora: bool = False
    prompt: int = 8
    output: int = 256
    vocabulary: int = 0
    speculate: str | int = 0

    @property
    def spec(self) -> Spec:
        """As the makers of members want it."""
        return Spec(self.strong, 0, self.experts, self.is_lora)


def loads(is_quick: bool) -> dict[str, Load]:
    """The fused models to be measured, unspeculated, by name."""
    if is_quick:
        base = Load(FUSED, strong=200_000_000, small=20_000_000, output=64)
        return {"1 full expert": base, "2 LoRA experts": replace(base, experts=TUNED_TASKS[:2], is_lora=True)}
    base = Load(FUSED)
    found = {}
    for is_lora in (False, True):
        for count in (1, 2, 4):
            name = f"{count} {'LoRA' if is_lora else 'full'} expert{'s' if count > 1 else ''}"
            found[name] = replace(base, experts=TUNED_TASKS[:count], is_lora=is_lora)
    found["prompt 256, output 8"] = replace(base, prompt=256, output=8)
    found[f"vocabulary {LARGE_VOCABULARY:,}"] = replace(base, vocabulary=LARGE_VOCABULARY, output=64)
    return found


def measure(options: Options, progress: Progress) -> Findings:
    """All fused models whose name holds `options.only`."""
    chosen = {name: load for name, load in loads(options.is_quick).items() if options.only in name}
    repeats = options.repeats or (1 if options.is_quick else 3)
    return run(chosen, repeats, progress)


def run(chosen: dict[str, Load], repeats: int, progress: Progress) -> Findings:
    """Measures these."""
    peaks, cases = Peaks(), []
    for name, load in chosen.items():
        cases += cases_of(name, load, peaks, repeats, progress)
    settings = {"loads": {name: asdict(load) for name, load in chosen.items()}, "allocator": GIVING}
    return Findings("Peak memory of a fused model beside its members", settings, cases, NOTES)


NOTES = [
    "Peak of resident memory while generating, in MiB over a baseline with all libraries loaded, greedy, batch 1.",
    "Adapters share their base: its weights count once in the sum.",
]


def cases_of(name: str, load: Load, peaks: "Peaks", repeats: int, progress: Progress) -> list[Case]:
    """The fused model beside the sum of its members; with adapters also its small part beside base and adapters."""

    def say(text: str) -> None:
        progress(f"{name}: {text}")

    settings = {key: value for key, value in asdict(load).items() if key not in ("who", "speculate")}
    kind = "LoRA" if settings.pop("is_lora") else "full"
    settings["experts"] = f"{len(load.experts)} {kind}"
    drafts: str | int = "auto" if load.vocabulary == 0 else 8  # random members agree on too little for "auto"
    arms: dict[str, Arm] = {
        SUM: lambda repeat: total([STRONG, BASE, *load.experts], load, peaks, repeat),
        OURS: lambda repeat: peaks.of(load, repeat),
        SPECULATED: lambda repeat: peaks.of(replace(load, speculate=drafts), repeat),
    }
    runs = interleave(arms, repeats, say, warm_up=False)
    cases = [Case(name, "mib", "MiB", False, SUM, ("weights_mib",), settings, {}, runs)]
    if load.is_lora:
        parts: dict[str, Arm] = {
            PARTS: lambda repeat: base_and_adapters(load, peaks, repeat),
            SMALL_PART: lambda repeat: beyond_strong(load, peaks, repeat),
        }
        runs = interleave(parts, repeats, say, warm_up=False)
        cases.append(Case(small_part_of(name), "mib", "MiB", False, PARTS, ("weights_mib",), settings, {}, runs))
    return cases


def small_part_of(name: str) -> str:
    """The name of a case beside that of the whole fused model."""
    return f"{name}, small part"


def total(who: Sequence[str], load: Load, peaks: "Peaks", repeat: int) -> Record:
    """Peaks of members alone, added; of an adapter only what it adds to the base's weights."""
    found = [peaks.of(replace(load, who=name), repeat) for name in who]
    shared = peaks.of(replace(load, who=BASE), repeat)["weights_mib"] if load.is_lora else 0.0
    adapters = sum(name in load.experts for name in who)
    return {name: sum(record[name] for record in found) - adapters * shared for name in ("mib", "weights_mib")}


def base_and_adapters(load: Load, peaks: "Peaks", repeat: int) -> Record:
    """The base alone with its cache, and the weights of all adapters; no caches of theirs."""
    base = peaks.of(replace(load, who=BASE), repeat)
    adapters = sum(peaks.of(replace(load, who=name), repeat)["weights_mib"] for name in load.experts)
    extra = adapters - len(load.experts) * base["weights_mib"]
    return {name: base[name] + extra for name in ("mib", "weights_mib")}


def beyond_strong(load: Load, peaks: "Peaks", repeat: int) -> Record:
    """What the fused model takes beyond the strong model alone."""
    fused, strong = peaks.of(load, repeat), peaks.of(replace(load, who=STRONG), repeat)
    return {name: fused[name] - strong[name] for name in ("mib", "weights_mib")}


class Peaks:
    """Measured peaks; a load that several cases share runs once per repeat."""

    def __init__(self) -> None:
        self._found: dict[tuple[Load, int], Record] = {}

    def of(self, load: Load, repeat: int) -> Record:
        """Peak and weights of one process, in MiB."""
        key = (self._essence(load), repeat)
        if key not in self._found:
            self._found[key] = in_own_process(key[0])
        return self._found[key]

    def _essence(self, load: Load) -> Load:
        """The load without what does not concern this member, so that equal work is recognised."""
        if load.who == FUSED:
            return load
        others = replace(load, experts=(load.who,) if load.who in load.experts else (), speculate=0)
        return replace(others, is_lora=load.is_lora and load.who in load.experts)


def in_own_process(load: Load) -> Record:
    """Runs a load in a fresh process.

    raises    TrimtabError with what the process said, where it failed
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(asdict(load))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **GIVING, **threads, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if done.returncode != 0:
        raise TrimtabError(
            f"the process for {load.who} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no words'}",
            fix=f"run it alone: python -m bench.memory '{json.dumps(asdict(load))}'",
        )
    found: Record = json.loads(done.stdout)
    return found


# ---- inside the process


def peak_of(load: Load) -> Record:
    """Peak and weights of this load in this process, in MiB over what was resident before."""
    known = (FUSED, STRONG, BASE, *load.experts)
    if load.who not in known:
        raise unknown_name("member", load.who, known)
    _warm_up(load)
    gc.collect()
    baseline = _status("VmRSS")
    model = _make(load)
    gc.collect()
    weights = _status("VmRSS") - baseline
    _reset_high_water_mark()
    _generate(model, load, load.output)
    return {"mib": (_status("VmHWM") - baseline) / 1024, "weights_mib": weights / 1024}


def _warm_up(load: Load) -> None:
    """Everything that is loaded or compiled on first use, with members too small to count."""
    import peft  # noqa: F401

    tiny = replace(load, strong=8_000_000, small=1_000_000, who=FUSED, experts=load.experts or TUNED_TASKS[:1])
    for one in (replace(tiny, speculate=0), replace(tiny, speculate=4)):
        _generate(_make(one), one, 8)
    _generate(_make(replace(tiny, who=STRONG)), load, 8)


def _make(load: Load) -> Any:
    """The member, or the fused model with all of them."""
    if load.vocabulary:
        return _random(load)
    if load.who == STRONG:
        return members.strong_model(load.spec)
    if load.who == BASE:
        return members.small_model("small", load.small, load.spec)
    if load.who in load.experts:
        if load.is_lora:
            return members.adapted_model(load.who, load.small, load.spec)
        return members.small_model(f"small/{load.who}", load.small, load.spec)
    strong, tokenizer = members.strong_model(load.spec), members.load_tokenizer()
    if load.is_lora:
        return members.fuse_adapters(strong, load.small, load.spec, tokenizer)
    base = members.small_model("small", load.small, load.spec)
    experts = {name: members.small_model(f"small/{name}", load.small, load.spec) for name in load.experts}
    return members.fuse(strong, base, experts, tokenizer)


def _random(load: Load) -> Any:
    """Members of random weights with a large vocabulary: what distributions over it take."""
    small = [members.random_model("small", load.vocabulary, load.small, seed) for seed in range(_count_small(load))]
    if load.who not in (FUSED, STRONG):
        return small[0]
    strong = members.random_model("strong", load.vocabulary, load.strong, seed=0)
    if load.who == STRONG:
        return strong
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random experts descend from no base
        return members.fuse(strong, small[0], dict(zip(load.experts, small[1:], strict=True)), None)


def _count_small(load: Load) -> int:
    return {FUSED: 1 + len(load.experts), STRONG: 0}.get(load.who, 1)


def _generate(model: Any, load: Load, output: int) -> None:
    ids = torch.arange(2, 2 + load.prompt).unsqueeze(0)
    more = {"speculate": load.speculate} if load.who == FUSED and hasattr(model, "speculate") else {}
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=output,
        min_new_tokens=output,
        do_sample=False,
        **more,
    )


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    try:
        print(json.dumps(peak_of(Load(**{**words, "experts": tuple(words["experts"])}))))
    except TrimtabError as error:
        sys.exit(f"{type(error).__name__}: {error.found} {error.expected}")
