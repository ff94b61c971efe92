"""The page that shows an answer token by token: who spoke, how loudly, how far the strong model was moved, and why.

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
CHART_HEIGHT, CHART_TOP, KL_HEIGHT = 110.0, 14.0, 54.0


def explain_page(trace: Trace) -> str:
    """The whole page; opens with any browser, without network, and reads without scripts as well."""
    has_alpha = any(step["alpha"] for step in trace["steps"])
    return pages.fill(
        "explain.html",
        title=f"trimtab explain · {pages.text(_short(trace['prompt'], 60))}",
        heading="How the answer was made",
        mode="expert",
        alpha_disabled="" if has_alpha else " disabled title='this strategy has no alpha'",
        chips=_chips(trace),
        facts=_facts(trace),
        legend=_legend(trace),
        prompt=pages.text(trace["prompt"]),
        tokens=token_strip(trace),
        chart_title="Alpha (up) and KL(fused‖strong) (down), step by step" if has_alpha else "KL(fused‖strong) by step",
        chart=_chart(trace, has_alpha),
        reading=_reading(has_alpha),
        table=_table(trace),
        footer="Made by <b>trimtab explain</b>. Divergences and entropies are in nats; probabilities in percent.",
        trace=pages.json_script({**trace, **_scales(trace), "opens_at": _most_moved(trace)}),
    )


def token_strip(trace: Trace) -> str:
    """The answer as coloured spans, every value of a step in data- attributes."""
    scales = _scales(trace)
    return "".join(_token(trace, scales, index, step) for index, step in enumerate(trace["steps"]))


def _token(trace: Trace, scales: Mapping[str, float], index: int, step: Step) -> str:
    speaker, alpha = speaker_of(step), total_alpha(step)
    moved = min(1.0, step["kl_nats"] / scales["kl_top"]) if scales["kl_top"] else 0.0
    loud = moved if alpha is None else min(1.0, abs(alpha) / scales["alpha_top"])
    attributes = {
        "class": f"token {who_class(trace, speaker)}",
        "style": f"--loud:{loud if speaker else 0:.3f};--moved:{moved:.3f}",
        "tabindex": "0",
        "data-step": index,
        "data-token-id": step["token_id"],
        "data-expert": speaker or "",
        "data-alpha": "" if alpha is None else f"{alpha:.6g}",
        "data-alphas": json.dumps(pages.finite(step["alpha"])),
        "data-kl-nats": f"{step['kl_nats']:.6g}",
        "data-reverse-kl-nats": f"{step['reverse_kl_nats']:.6g}",
        "data-entropy-nats": json.dumps(pages.finite(step["entropy_nats"])),
        "aria-label": f"{step['token']!r}, {speaker or 'nobody'} speaks" + (f", alpha {alpha:.2f}" if alpha else ""),
    }
    written = " ".join(f'{name}="{pages.text(value)}"' for name, value in attributes.items())
    return f"<span {written}>{_visible(step['token'])}</span>"


def speaker_of(step: Step) -> str | None:
    """The expert that speaks loudest at a step; None where no expert speaks."""
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
    """The colour of an expert, by its place among the names."""
    return f"who-{list(trace['expert_names']).index(name) % NUM_COLOURS}" if name else "nobody"


def _visible(token: str) -> str:
    """Line breaks and empty tokens need a mark to be seen at all."""
    shown = pages.text(token).replace("\n", '<span class="mark">⏎</span>\n')
    return shown or '<span class="mark">∅</span>'


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


def _chips(trace: Trace) -> str:
    strategy = trace["strategy"]
    settings = {k: v for k, v in strategy.get("settings", {}).items() if v is not None}
    parts = [("amount", strategy["amount"]), ("chooser", strategy.get("chooser", "paper")), *settings.items()]
    return "".join(f'<span class="chip">{pages.text(name)} <b>{pages.text(value)}</b></span>' for name, value in parts)


def _facts(trace: Trace) -> str:
    steps = trace["steps"]
    alphas = [alpha for alpha in map(total_alpha, steps) if alpha is not None]
    cards = [("tokens", str(len(steps)))]
    if alphas:
        cards.append(("mean alpha", pages.number(sum(alphas) / len(alphas), 2)))
    cards.append(("nats moved in all", pages.number(sum(step["kl_nats"] for step in steps), 2)))
    shown = [f'<div class="card fact"><b class="num">{value}</b><span>{name}</span></div>' for name, value in cards]
    return "".join(shown) + _shares(trace)


def _shares(trace: Trace) -> str:
    """Who spoke how often, as one bar."""
    speakers = [speaker_of(step) for step in trace["steps"]]
    counts = {name: speakers.count(name) for name in [*trace["expert_names"], None]}
    bars, words = [], []
    for name, count in counts.items():
        if count:
            bars.append(f'<i class="{who_class(trace, name)}" style="flex:{count}"></i>')
            words.append(f"{pages.text(name or 'nobody')} {count}")
    words_shown = " · ".join(words) or "no token"
    return f'<div class="card fact"><span>who spoke: {words_shown}</span><div class="share">{"".join(bars)}</div></div>'


def _legend(trace: Trace) -> str:
    scales = _scales(trace)
    experts = "".join(
        f'<span class="for-expert"><i class="dot {who_class(trace, name)}"></i>{pages.text(name)}</span>'
        for name in trace["expert_names"]
    )
    nobody = '<span class="for-expert"><i class="dot nobody"></i>nobody: the strong model alone</span>'
    alpha = f'<span class="for-alpha num">0<i class="ramp alpha"></i>{scales["alpha_top"]:g}</span>'
    kl = f'<span class="for-kl num">0<i class="ramp kl"></i>{pages.number(scales["kl_top"], 2)} nats</span>'
    return experts + nobody + alpha + kl


def _reading(has_alpha: bool) -> str:
    if has_alpha:
        return (
            "Alpha 0 leaves the strong model as it is; 1 adds the expert's whole difference to its base. "
            "The bar under a token grows with alpha."
        )
    return (
        "This strategy reweighs the strong model's law token by token; the bar under a token grows with the distance."
    )


def _chart(trace: Trace, has_alpha: bool) -> str:
    """Alpha upwards, KL(fused || strong) downwards, one column per step."""
    steps, scales = trace["steps"], _scales(trace)
    width = max(7.0, min(26.0, 640 / max(1, len(steps))))
    up, left = (CHART_HEIGHT if has_alpha else 0.0), 34.0
    floor = CHART_TOP + up
    total_width, total_height = left + width * len(steps) + 8, floor + KL_HEIGHT + 22
    parts = [f'<svg width="{total_width:.0f}" height="{total_height:.0f}" role="img">']
    if has_alpha:
        for mark in (0.0, scales["alpha_top"] / 2, scales["alpha_top"]):
            y = floor - up * mark / scales["alpha_top"]
            parts.append(f'<line x1="{left}" x2="{total_width}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for index, step in enumerate(steps):
        parts.append(_column(trace, scales, index, step, left + index * width, width, floor, up))
    parts.append(f'<text x="{left}" y="{total_height - 4}">step 1</text>')
    if len(steps) > 4:
        parts.append(f'<text x="{total_width - 8:.0f}" y="{total_height - 4}" text-anchor="end">{len(steps)}</text>')
    return "".join(parts) + "</svg>"


def _column(
    trace: Trace, scales: Mapping[str, float], index: int, step: Step, x: float, width: float, floor: float, up: float
) -> str:
    parts, bottom, bar = [], floor, width - 2
    for name, alpha in (step["alpha"] or {}).items():
        height = up * abs(alpha) / scales["alpha_top"]
        if height:
            bottom -= height
            colour = who_class(trace, name)
            parts.append(
                f'<rect class="bar {colour}" x="{x:.1f}" y="{bottom:.1f}" width="{bar:.1f}" height="{height:.1f}"/>'
            )
    drop = KL_HEIGHT * step["kl_nats"] / scales["kl_top"] if scales["kl_top"] else 0.0
    parts.append(f'<rect class="kl" x="{x:.1f}" y="{floor + 3:.1f}" width="{bar:.1f}" height="{drop:.1f}"/>')
    height = up + KL_HEIGHT + 3
    title = f"{step['token']!r} · KL {step['kl_nats']:.3f}"
    parts.append(
        f'<rect class="hit" data-step="{index}" x="{x - 1:.1f}" y="{CHART_TOP}" width="{width:.1f}" '
        f'height="{height:.1f}"><title>{pages.text(title)}</title></rect>'
    )
    return "".join(parts)


def _table(trace: Trace) -> str:
    """Every number of the page for those who do not hover, or have no scripts."""
    members = list(trace["steps"][0]["entropy_nats"]) if trace["steps"] else []
    experts = list(trace["expert_names"])
    heads = ["token", "id", *(f"alpha {name}" for name in experts), "KL(fused‖strong)", "KL(strong‖fused)"]
    heads += [f"entropy {name}" for name in members]
    rows = []
    for step in trace["steps"]:
        cells = [f"<code>{pages.text(repr(step['token']))}</code>", str(step["token_id"])]
        cells += [pages.number((step["alpha"] or {}).get(name) if step["alpha"] else None) for name in experts]
        cells += [pages.number(step["kl_nats"], 4), pages.number(step["reverse_kl_nats"], 4)]
        cells += [pages.number(step["entropy_nats"].get(name)) for name in members]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{pages.text(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
