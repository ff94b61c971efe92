"""The page that shows an answer token by token: which expert acted, how strongly, how far the strong model was moved.

A trace comes as the dict that `Trace.to_dict` writes: prompt, text, strategy, expert_names, and steps of token_id,
token, alpha {expert: float} or None, chosen, kl_nats, reverse_kl_nats, entropy_nats {member: float} and
top5 {member: [[token, probability], ...]}. All values stand in the page twice: as data- attributes of the tokens, and
as JSON in the script element "trace".
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from trimtab.measure import pages

Trace = Mapping[str, Any]
Step = Mapping[str, Any]
NUM_COLOURS = 8
CHART_HEIGHT, CHART_TOP, CHART_LEFT, KL_HEIGHT = 110.0, 14.0, 34.0, 54.0


def explain_page(trace: Trace) -> str:
    """The whole page; opens with any browser, without network, and reads without scripts as well."""
    shown = view(trace)
    script = {**trace, **shown["scales"], "opens_at": _most_moved(trace)}
    return pages.render(
        "explain.html",
        title=f"trimtab explain · {_short(trace['prompt'], 60)}",
        heading="How the answer was made",
        motto="which expert acted, how strongly, and why",
        view=shown,
        script=pages.json_script(script),
    )


def view(trace: Trace) -> dict[str, Any]:
    """A trace as templates show it."""
    steps, scales = trace["steps"], _scales(trace)
    speakers = [speaker_of(step) for step in steps]
    counts = {name: speakers.count(name) for name in [*trace["expert_names"], None]}
    has_alpha = any(step["alpha"] for step in steps)
    strategy = trace["strategy"]
    settings = {k: v for k, v in strategy.get("settings", {}).items() if v is not None}
    heads, rows = _table(trace)
    return {
        "trace": trace,
        "scales": scales,
        "has_alpha": has_alpha,
        "tokens": [_token(trace, scales, step) for step in steps],
        "chips": [*((k, v) for k, v in strategy.items() if isinstance(v, str)), *settings.items()],
        "totals": _totals(steps),
        "shares": [(name or "none", who_class(trace, name), count) for name, count in counts.items() if count],
        "experts": [(name, who_class(trace, name)) for name in trace["expert_names"]],
        "chart": _chart(trace, scales, has_alpha),
        "heads": heads,
        "rows": rows,
    }


def _token(trace: Trace, scales: Mapping[str, float], step: Step) -> dict[str, Any]:
    speaker, alpha = speaker_of(step), total_alpha(step)
    moved = min(1.0, step["kl_nats"] / scales["kl_top"]) if scales["kl_top"] else 0.0
    loud = moved if alpha is None else min(1.0, abs(alpha) / scales["alpha_top"])
    return {
        "step": step,
        "who": who_class(trace, speaker),
        "loud": loud if speaker else 0.0,
        "moved": moved,
        "speaker": speaker or "",
        "alpha": "" if alpha is None else f"{alpha:.6g}",
        "alphas": json.dumps(pages.finite(step["alpha"])),
        "entropies": json.dumps(pages.finite(step["entropy_nats"])),
        "label": f"{step['token']!r}, {speaker or 'no expert'}" + (f", alpha {alpha:.2f}" if alpha else ""),
    }


def speaker_of(step: Step) -> str | None:
    """The expert of largest alpha at a step; None where no expert acts."""
    if not step["chosen"]:
        return None
    alpha = step["alpha"]
    if alpha is None:
        return str(step["chosen"][0])
    loudest = max(step["chosen"], key=lambda name: abs(alpha.get(name, 0.0)))
    return str(loudest) if alpha.get(loudest, 0.0) != 0 else None


def total_alpha(step: Step) -> float | None:
    """The alphas of all experts together; None for strategies that have none."""
    return None if step["alpha"] is None else float(sum(step["alpha"].values()))


def who_class(trace: Trace, name: str | None) -> str:
    """The colour of an expert, by its index among the names."""
    return f"who-{list(trace['expert_names']).index(name) % NUM_COLOURS}" if name else "nobody"


def _short(line: str, length: int) -> str:
    line = " ".join(line.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _scales(trace: Trace) -> dict[str, float]:
    """The tops of the bars: of alpha (the strategy's own range, where it says one), KLs and entropies."""
    steps = trace["steps"]
    settings = trace["strategy"].get("settings", {})
    alphas = [abs(total_alpha(step) or 0.0) for step in steps]
    kls = [step[kind] for step in steps for kind in ("kl_nats", "reverse_kl_nats") if math.isfinite(step[kind])]
    entropies = [value for step in steps for value in step["entropy_nats"].values()]
    return {
        "alpha_top": max([1.0, float(settings.get("alpha_max") or 0.0), *alphas]),
        "kl_top": max([0.0, *kls]),
        "entropy_top": max([0.0, *entropies]),
    }


def _most_moved(trace: Trace) -> int:
    """The step that the page opens at: there is most to see where the strong model was moved most."""
    return max(range(len(trace["steps"])), key=lambda index: trace["steps"][index]["kl_nats"], default=0)


def _totals(steps: list[Step]) -> list[tuple[str, str]]:
    alphas = [alpha for alpha in map(total_alpha, steps) if alpha is not None]
    mean = [("mean alpha", pages.number(sum(alphas) / len(alphas), 2))] if alphas else []
    return [
        ("tokens", str(len(steps))),
        *mean,
        ("nats moved in all", pages.number(sum(s["kl_nats"] for s in steps), 2)),
    ]


def _chart(trace: Trace, scales: Mapping[str, float], has_alpha: bool) -> dict[str, Any]:
    """Alpha upwards, KL(fused || strong) downwards, one column per step; lengths in pixels."""
    steps, top = trace["steps"], scales["alpha_top"]
    width = max(7.0, min(26.0, 640 / max(1, len(steps))))
    up = CHART_HEIGHT if has_alpha else 0.0
    floor, bars = CHART_TOP + up, []
    for index, step in enumerate(steps):
        x, bottom = CHART_LEFT + index * width, floor

        def bar(kind: str, y: float, height: float, x: float = x, **more: Any) -> dict[str, Any]:
            return {
                "kind": kind,
                "x": x,
                "y": y,
                "width": width - 2,
                "height": height,
                "step": None,
                "title": "",
            } | more

        for name, alpha in (step["alpha"] or {}).items():
            if height := up * abs(alpha) / top:
                bottom -= height
                bars.append(bar(f"bar {who_class(trace, name)}", bottom, height))
        drop = KL_HEIGHT * step["kl_nats"] / scales["kl_top"] if scales["kl_top"] else 0.0
        bars.append(bar("kl", floor + 3, drop))
        told = f"{step['token']!r} · KL {step['kl_nats']:.3f}"
        bars.append(bar("hit", CHART_TOP, up + KL_HEIGHT + 3, x - 1, width=width, step=index, title=told))
    return {
        "left": CHART_LEFT,
        "width": CHART_LEFT + width * len(steps) + 8,
        "height": floor + KL_HEIGHT + 22,
        "marks": [(mark, floor - up * mark / top) for mark in (0.0, top / 2, top)] if has_alpha else [],
        "bars": bars,
    }


def _table(trace: Trace) -> tuple[list[str], list[list[str]]]:
    """Every number of the page for those who do not hover, or have no scripts."""
    members = list(trace["steps"][0]["entropy_nats"]) if trace["steps"] else []
    experts = list(trace["expert_names"])
    heads = ["token", "id", *(f"alpha {name}" for name in experts), "KL(fused‖strong)", "KL(strong‖fused)"]
    rows = []
    for step in trace["steps"]:
        cells = [repr(step["token"]), str(step["token_id"])]
        cells += [pages.number((step["alpha"] or {}).get(name) if step["alpha"] else None) for name in experts]
        cells += [pages.number(step["kl_nats"], 4), pages.number(step["reverse_kl_nats"], 4)]
        rows.append(cells + [pages.number(step["entropy_nats"].get(name)) for name in members])
    return [*heads, *(f"entropy {name}" for name in members)], rows
