"""Runs alternatives interleaved and keeps every repeat: A B C A B C, so that what disturbs one disturbs all.

A ratio is taken within each repeat, between runs that stood side by side; its median and quartiles are reported. A
slow minute of the machine then moves both sides of a ratio, and a single disturbed run does not move the median. Of
fewer than four repeats the least and the largest are reported in place of quartiles.
"""

import contextlib
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from trimtab.core.files import write_whole
from trimtab.measure import plots
from trimtab.measure.tables import NONE, Cell, Grid, Row, terminal

Record = Mapping[str, float]  # the figures of one run
WARM_UP = -1
Arm = Callable[[int], Record]  # called with the number of the repeat, or WARM_UP; the same number means the same work
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line says to every bench.

    output     folder of the results
    repeats    how often each arm runs; None: the bench's own number
    only       part of a case's name; other cases are left out
    device     where members run, for `decode`
    strong     parameters of the strong model, for `decode`; None: the bench's own number
    """

    is_quick: bool = True
    output: Path = Path("bench/results")
    threads: int | None = None
    repeats: int | None = None
    only: str = ""
    machine: str = ""
    device: str = "cpu"
    strong: int | None = None


@dataclass
class Case:
    """One point at which arms stand side by side.

    figure        the record's figure that the table, the plot and the ratios show, such as "tokens_per_second"
    is_more_better  whether a larger figure is the better one
    reference     the arm that ratios are taken against
    beside        further figures of the records that the table shows
    settings      what was set: the coordinates of this point
    facts         what was measured once: sizes, cost ratios
    runs          arm -> its record of every repeat
    left_out      arm -> why it was not run here
    """

    name: str
    figure: str
    unit: str
    is_more_better: bool
    reference: str
    beside: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, list[Record]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Findings:
    """All that a bench found, and how it was set."""

    title: str
    settings: dict[str, Any]
    cases: list[Case]
    notes: list[str] = field(default_factory=list)


# ---- running


def interleave(
    arms: Mapping[str, Arm], repeats: int, progress: Progress = lambda text: None, warm_up: bool = True
) -> dict[str, list[Record]]:
    """Every arm in turn, `repeats` times over.

    warm_up    each arm runs once before, unrecorded, called with WARM_UP
    returns    arm -> its records; "seconds" is the wall time of the whole arm where the arm gives none itself
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; at least one is measured.")
    runs: dict[str, list[Record]] = {name: [] for name in arms}
    with _cheap_collections():
        for repeat in range(WARM_UP if warm_up else 0, repeats):
            for name, arm in arms.items():
                progress(f"{name}, {'warm-up' if repeat == WARM_UP else f'{repeat + 1} of {repeats}'}")
                record = _timed(arm, repeat)
                if repeat != WARM_UP:
                    runs[name].append(record)
    return runs


@contextlib.contextmanager
def _cheap_collections() -> Iterator[None]:
    """What is there already is not looked through by every collection: libraries are a million objects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _timed(arm: Arm, repeat: int) -> Record:
    gc.collect()  # otherwise an arm pays for what the one before it left behind
    started = time.perf_counter()
    record = dict(arm(repeat))
    return {"seconds": time.perf_counter() - started} | record


# ---- summing up


FEW = 4  # repeats that have quartiles


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some repeats; of fewer than FEW, median, least and largest."""

    median: float
    low: float
    high: float
    repeats: int

    def text(self, digits: int = 2) -> str:
        """For example "2.10 (2.05 – 2.20)"; a single repeat has no spread."""
        if self.repeats == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} – {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a few values, which have no quartiles worth the name, the least and the largest."""
    if len(values) < FEW:
        return Spread(statistics.median(values), min(values), max(values), len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def interval_of(case: Case) -> str:
    """What the brackets of a case hold."""
    return "quartiles" if all(len(records) >= FEW for records in case.runs.values()) else "least – largest"


def figures(case: Case, arm: str, figure: str | None = None) -> list[float]:
    """One figure of an arm in every repeat."""
    return [record[figure or case.figure] for record in case.runs[arm]]


def ratios(case: Case, arm: str, reference: str | None = None, figure: str | None = None) -> list[float]:
    """The arm's figure over the reference's, repeat by repeat."""
    pairs = zip(figures(case, arm, figure), figures(case, reference or case.reference, figure), strict=True)
    return [ours / theirs for ours, theirs in pairs]


def summary(case: Case) -> dict[str, Any]:
    """The spread of every figure of every arm, and of the ratios to the reference."""
    return {
        arm: {
            "figures": {name: vars(spread(figures(case, arm, name))) for name in records[0]},
            "ratio": vars(spread(ratios(case, arm))) if case.reference in case.runs else None,
        }
        for arm, records in case.runs.items()
    }


# ---- writing and showing


def document(name: str, findings: Findings, options: Options) -> dict[str, Any]:
    """The JSON of a bench: what, where, when, how, every raw repeat, and the summary."""
    return {
        "bench": name,
        "command": command_of(name, options),
        "title": findings.title,
        "is_quick": options.is_quick,
        "only": options.only,
        "date": machine.now(),
        "commit": machine.commit(),
        "machine": machine.describe(options.machine),
        "settings": findings.settings,
        "notes": findings.notes,
        "cases": [vars(case) | {"summary": summary(case)} for case in findings.cases],
    }


def command_of(name: str, options: Options) -> str:
    """The command line that measures the same again."""
    words = ["python", "-m", "bench", name, *(["--quick"] if options.is_quick else [])]
    given = {"threads": options.threads, "repeats": options.repeats, "only": options.only, "strong": options.strong}
    if options.device != "cpu":
        given["device"] = options.device
    return shlex.join([*words, *(word for flag, value in given.items() if value for word in (f"--{flag}", str(value)))])


def cases_of(found: Mapping[str, Any]) -> list[Case]:
    """The cases of a document, as they were measured."""
    plain = [{key: part for key, part in case.items() if key != "summary"} for case in found["cases"]]
    return [Case(**{**case, "beside": tuple(case["beside"])}) for case in plain]


def file_of(folder: Path, name: str, is_quick: bool, ending: str = "json") -> Path:
    """Where a bench writes: a quick run does not overwrite a long one."""
    return folder / f"{name}{'-quick' if is_quick else ''}.{ending}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers that JSON has no word for."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A document that `write_json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def show(findings: Findings) -> None:
    """One table per case on stdout."""
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    for case in findings.cases:
        console.print(f"\n[bold]{case.name}[/bold]  {listed(case.settings)}")
        if case.facts:
            console.print(f"measured: {listed(case.facts)}")
        console.print(terminal(grid_of(case)))
        for arm, reason in case.left_out.items():
            console.print(f"left out: {arm}: {reason}")
    for note in findings.notes:
        console.print(note)


def grid_of(case: Case) -> Grid:
    """The table of a case: every arm's figure, its ratio to the reference, and what is shown beside."""
    heads = [f"{case.unit} ({interval_of(case)})", f"x {case.reference}", *case.beside]
    rows = []
    for arm in case.runs:
        ratio = spread(ratios(case, arm)).text() if case.reference in case.runs else NONE
        texts = [spread(figures(case, arm)).text(), ratio, *beside(case, arm)]
        rows.append(Row(arm, arm, tuple(map(Cell, texts))))
    return Grid("", tuple(head.replace("_", " ") for head in heads), tuple(rows), corner="arm")


def listed(named: Mapping[str, Any]) -> str:
    """For example "batch 4, ratio 20"."""
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in named.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}: {part}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def beside(case: Case, arm: str) -> list[str]:
    """The medians of the figures that stand beside the main one; a dash where an arm has none."""
    has = [all(name in record for record in case.runs[arm]) for name in case.beside]
    pairs = zip(case.beside, has, strict=True)
    return [f"{spread(figures(case, arm, name)).median:.3g}" if there else NONE for name, there in pairs]


OURS, THEIRS = "#e08a14", plots.QUIET


def plot(findings: Findings, file: Path) -> None:
    """Ratios to the reference, one panel of bars per case, with quartiles or extremes."""
    cases = [case for case in findings.cases if case.reference in case.runs]
    columns = min(3 if len(cases) <= 12 else 4, max(1, len(cases)))
    rows = max(1, -(-len(cases) // columns))
    arms = max((len(case.runs) for case in cases), default=1)
    made, axes = plots.figure(rows, columns, (5.2 * columns, (1.0 + 0.3 * arms) * rows), grid_axis="")
    for index, panel in enumerate(axes.flat):
        panel.set_visible(index < len(cases))
    for panel, case in zip(axes.flat, cases, strict=False):
        _bars(panel, case)
    made.suptitle(findings.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=plots.INK)
    plots.save(made, file)


def _bars(panel: Any, case: Case) -> None:
    arms = list(case.runs)[::-1]
    spreads = [spread(ratios(case, arm)) for arm in arms]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    colours = [OURS if arm.startswith("ours") else THEIRS for arm in arms]
    bars = {"color": colours, "ecolor": plots.INK, "error_kw": {"elinewidth": 0.8}}
    panel.barh(arms, [s.median for s in spreads], xerr=errors, **bars)
    for index, one in enumerate(spreads):
        panel.text(one.high, index, f" {one.median:.2f}", va="center", fontsize=8, color=plots.INK)
    panel.axvline(1.0, color=plots.SOFT, linewidth=0.8)
    plots.title(panel, f"{case.name}\n{case.unit}, x {case.reference}", size=9)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.15)
