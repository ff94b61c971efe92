"""Plots as PNG files, drawn without a display."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.measure.explain_page import total_alpha
from trimtab.measure.verdict import name_of

INK, SOFT, LINE, PAPER, ACCENT = "#1d2329", "#5d6873", "#e3e0d8", "#ffffff", "#0b6e75"
EXPERT_COLOURS = ("#d97a06", "#1f78c8", "#a8479c", "#17936a", "#c23b3b", "#6b63d0", "#8a7418", "#2a8fa3")
COLUMN_COLOURS = {
    "base": "#cfd4d8",
    "mixed": "#b9a27c",
    "expert": "#b9a27c",
    "strong": "#9aa5af",
    "latent": "#7b8794",
    "ceiling": "#3a444d",
    "static_0.5": "#bcdcf2",
    "static_1.0": "#7fb8e0",
    "static_1.5": "#4a90c4",
    "static_mean": "#b8c9a3",
    "static_sum": "#86a063",
    "grid": "#f0c078",
    "dynamic": "#e08a14",
    "dynamic_confident": "#c65f00",
    "cautious": "#b3431e",
    "filter": "#17936a",
    "filter_confident": "#0f6b4d",
    "filter_sum": "#6cc3a0",
    "product": "#a99fe0",
    "mixture": "#7a6fd0",
    "contrastive": "#c98bbf",
}


def alpha_plot(trace: Mapping[str, Any], file: Path) -> None:
    """Alpha of every expert (up) and KL(fused || strong) (down) over the steps of one answer; see `explain_page`."""
    figure, (top, bottom) = _figure(2, 1, (11.0, 4.6), sharex=True, height_ratios=(2, 1))
    steps = trace["steps"]
    places = range(len(steps))
    if any(total_alpha(step) is not None for step in steps):
        floors = [0.0] * len(steps)
        for index, name in enumerate(trace["expert_names"]):
            alphas = [float((step["alpha"] or {}).get(name, 0.0)) for step in steps]
            colour = EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
            top.bar(places, alphas, bottom=floors, color=colour, width=0.85, label=name)
            floors = [floor + alpha for floor, alpha in zip(floors, alphas, strict=True)]
        top.legend(frameon=False, ncols=4, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    else:
        top.text(0.5, 0.5, "this strategy has no alpha", ha="center", color=SOFT, transform=top.transAxes)
    top.set_ylabel("alpha")
    bottom.bar(places, [step["kl_nats"] for step in steps], color=ACCENT, width=0.85)
    bottom.set_ylabel("KL(fused‖strong)\nnats")
    bottom.invert_yaxis()
    labels = [step["token"].replace("\n", "⏎").replace("$", r"\$") for step in steps]
    bottom.set_xticks(list(places), labels, rotation=90 if len(steps) > 24 else 45, fontsize=8, ha="center")
    top.set_title("Who spoke, and how loudly", loc="left", fontsize=12, fontweight="bold", color=INK)
    _save(figure, file)


def score_plot(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]],
    file: Path,
) -> None:
    """Grouped bars with 95% intervals.

    groups     label on the axis -> column -> score, points of 100; every group with the same columns
    intervals  the same shape with [low, high]
    """
    columns = list(dict.fromkeys(column for scores in groups.values() for column in scores))
    figure, axis = _figure(1, 1, (max(9.0, 2.3 * len(groups)), 4.4))
    width = 0.84 / len(columns)
    for index, column in enumerate(columns):
        places, heights, errors = [], [], []
        for group, (name, scores) in enumerate(groups.items()):
            if column in scores:
                places.append(group - 0.42 + width * (index + 0.5))
                heights.append(scores[column])
                low, high = intervals[name].get(column) or (scores[column], scores[column])
                errors.append((max(0.0, scores[column] - low), max(0.0, high - scores[column])))
        colour = COLUMN_COLOURS.get(column, SOFT)
        axis.bar(places, heights, width=width * 0.92, color=colour, label=name_of(column))
        axis.errorbar(places, heights, yerr=list(zip(*errors, strict=True)), fmt="none", ecolor=INK, elinewidth=0.7)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(0, 105)
    axis.set_ylabel("points of 100")
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axis.legend(frameon=False, fontsize=8, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def _figure(rows: int, columns: int, size: tuple[float, float], **grid: Any) -> tuple[Any, Any]:
    # Figure without pyplot: no global state, no display, whatever backend the user has set.
    from matplotlib.figure import Figure

    ratios = {"gridspec_kw": {"height_ratios": grid.pop("height_ratios")}} if "height_ratios" in grid else {}
    figure: Any = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    axes = figure.subplots(rows, columns, **grid, **ratios)
    for axis in axes.flat if rows * columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(LINE)
        axis.tick_params(colors=SOFT, length=0)
        axis.yaxis.label.set_color(SOFT)
        axis.grid(axis="y", color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A token may be of any script; a box in its place is no reason to disturb the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, dpi=130, format="png")
