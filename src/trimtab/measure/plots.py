"""Plots of one style as PNG files, drawn without a display."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure.comparison import Description
from trimtab.measure.explain_page import total_alpha
from trimtab.measure.tables import Looks

INK, SOFT, LINE, PAPER, ACCENT, QUIET = "#1d2329", "#5d6873", "#e3e0d8", "#ffffff", "#0b6e75", "#9aa5af"
EXPERT_COLOURS = ("#d97a06", "#1f78c8", "#a8479c", "#17936a", "#c23b3b", "#6b63d0", "#8a7418", "#2a8fa3")
COLOURS = 96  # of a picture: bars, lines, letters, and shades at their edges


def figure(rows: int, columns: int, size: tuple[float, float], grid_axis: str = "y", **more: Any) -> tuple[Any, Any]:
    """A figure in the style of all, and its axes as an array.

    size    inches
    more    for `Figure.subplots`, such as `sharex`
    """
    # Figure without pyplot: no global state, no display, whatever backend the user has set.
    from matplotlib.figure import Figure

    made: Any = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **more)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(LINE)
        axis.tick_params(colors=SOFT, length=0)
        axis.yaxis.label.set_color(SOFT)
        if grid_axis:
            axis.grid(axis=grid_axis, color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
    return made, axes


def title(axis: Any, text: str, size: int = 12) -> None:
    """A title above the left edge."""
    axis.set_title(text, loc="left", fontsize=size, fontweight="bold", color=INK)


def save(made: Any, file: Path) -> None:
    """A figure as PNG of few colours, a fifth of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    FigureCanvasAgg(made)
    drawn, saved = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        # A token may be of any script; a box in its place is no reason to disturb the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        made.savefig(drawn, dpi=120, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(saved, format="PNG", optimize=True)
    write_whole(file, saved.getvalue())


def score_plot(heading: str, found: Description, looks: Looks, groups: Sequence[str], file: Path) -> None:
    """Grouped bars of scores with 95% intervals.

    found    see `comparison.Comparison.describe`
    groups   what stands along the axis: tasks, and "average"; conditions without any of them are left out
    """
    values = {name: {**tasks, "average": found["average"].get(name)} for name, tasks in found["scores"].items()}
    spans, between = found["intervals"]["scores"], found["intervals"]["average"]
    names = [name for name, own in values.items() if any(own.get(group) is not None for group in groups)]
    made, axes = figure(1, 1, (max(9.0, 2.3 * len(groups)), 4.4))
    axis, width = axes.flat[0], 0.84 / len(names)
    for index, name in enumerate(names):
        indices, heights, errors = [], [], []
        for group, label in enumerate(groups):
            height = values[name].get(label)
            if height is None:
                continue
            low, high = (between if label == "average" else spans[name]).get(name if label == "average" else label) or (
                height,
                height,
            )
            indices.append(group - 0.42 + width * (index + 0.5))
            heights.append(height)
            errors.append((max(0.0, height - low), max(0.0, high - height)))
        axis.bar(indices, heights, width=width * 0.92, color=looks[name].colour, label=looks[name].label)
        axis.errorbar(indices, heights, yerr=list(zip(*errors, strict=True)), fmt="none", ecolor=INK, elinewidth=0.7)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(0, 105)
    axis.set_ylabel("points of 100")
    title(axis, heading)
    axis.legend(frameon=False, fontsize=8, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(made, file)


def alpha_plot(trace: Mapping[str, Any], file: Path) -> None:
    """Alpha of every expert (up) and KL(fused || strong) (down) over the steps of one answer; see `explain_page`."""
    made, axes = figure(2, 1, (11.0, 4.6), sharex=True, gridspec_kw={"height_ratios": (2, 1)})
    top, bottom = axes.flat
    steps = trace["steps"]
    indices = range(len(steps))
    if any(total_alpha(step) is not None for step in steps):
        floors = [0.0] * len(steps)
        for index, name in enumerate(trace["expert_names"]):
            alphas = [float((step["alpha"] or {}).get(name, 0.0)) for step in steps]
            colour = EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
            top.bar(indices, alphas, bottom=floors, color=colour, width=0.85, label=name)
            floors = [floor + alpha for floor, alpha in zip(floors, alphas, strict=True)]
        top.legend(frameon=False, ncols=4, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    else:
        top.text(0.5, 0.5, "this strategy has no alpha", ha="center", color=SOFT, transform=top.transAxes)
    top.set_ylabel("alpha")
    bottom.bar(indices, [step["kl_nats"] for step in steps], color=ACCENT, width=0.85)
    bottom.set_ylabel("KL(fused‖strong)\nnats")
    bottom.invert_yaxis()
    labels = [step["token"].replace("\n", "⏎").replace("$", r"\$") for step in steps]
    bottom.set_xticks(list(indices), labels, rotation=90 if len(steps) > 24 else 45, fontsize=8, ha="center")
    title(top, "Which expert acted, and how strongly")
    save(made, file)
