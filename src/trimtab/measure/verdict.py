"""What the numbers say, in sentences: written from the document alone, for the better and for the worse."""

from collections.abc import Mapping
from typing import Any

SIGNIFICANT = 0.05

NAMES = {
    "base": "small base",
    "expert": "small expert alone",
    "mixed": "small model tuned on all tasks",
    "strong": "strong model, untuned",
    "latent": "strong model, few-shot",
    "ceiling": "strong model, tuned",
    "static_0.5": "static, alpha 0.5",
    "static_1.0": "static, alpha 1",
    "static_1.5": "static, alpha 1.5",
    "static_sum": "static, all experts, alpha 1",
    "static_mean": "static, all experts, alpha 1/4",
    "grid": "DLF, grid (Algorithm 1)",
    "dynamic": "DLF, solved exactly",
    "dynamic_confident": "DLF, most confident expert",
    "cautious": "cautious (smaller root)",
    "filter": "posterior filter",
    "filter_confident": "posterior filter, most confident expert",
    "filter_sum": "posterior filter, all experts",
    "product": "product (geometric mean)",
    "mixture": "mixture (arithmetic mean)",
    "contrastive": "contrastive decoding, no expert",
}


def name_of(column: str) -> str:
    """A column's name for readers."""
    return NAMES.get(column, f"expert for {column.removeprefix('expert/')}" if "/" in column else column)


def sentences(document: Mapping[str, Any]) -> list[str]:
    """The findings of a summary (see `summary.summarise`), each a sentence with its figures."""
    found = []
    for table, weak in (("single", "expert"), ("multi", "mixed")):
        if "dynamic" in document["average"].get(table, {}):
            found.append(_headline(document, table, weak))
            best = document["best_static"].get(table)
            rows = [row for row in document["paired"] if row["table"] == table and row["tasks"] == "average"]
            found += [_against(row, is_best_static=row["second"] == best) for row in rows]
            found.append(_best(document, table))
    return found


def _headline(document: Mapping[str, Any], table: str, weak: str) -> str:
    average, ratio, pgr = (document[kind][table] for kind in ("average", "ratio", "pgr"))
    where = "With one expert per task" if table == "single" else "With all experts at once, the unseen task included"
    start = (
        f"{where}, DLF scores {average['dynamic']:.1f} on average: the untuned strong model {average['strong']:.1f}, "
        f"the {name_of(weak)} {average[weak]:.1f}, the tuned strong model {average['ceiling']:.1f}"
    )
    if ratio.get("dynamic") is None:
        return start + "."
    gap = (
        f"it recovers {100 * pgr['dynamic']:.0f}% of the gap" if pgr.get("dynamic") is not None else "no gap to recover"
    )
    printed = document["paper"]["ratio"][table].get(document.get("pair", ""), None)
    theirs = f" (the paper's models: {printed:.3f})" if printed else ""
    return f"{start}. Its ratio to the ceiling is {ratio['dynamic']:.3f}{theirs}; {gap}."


def _against(row: Mapping[str, Any], is_best_static: bool) -> str:
    """One paired comparison of averages."""
    rival, difference = name_of(row["second"]), row["difference"]
    if is_best_static:
        rival += ", the best static alpha in hindsight"
    interval = f" [{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}]" if row["interval"] else ""
    figures = f"{difference:+.1f} points{interval}, p = {row['p_value']:.2g}"
    if row["p_value"] >= SIGNIFICANT:
        return f"DLF against {rival}: {figures}. No difference is shown."
    return f"DLF {'beats' if difference > 0 else 'loses to'} {rival}: {figures}."


def _best(document: Mapping[str, Any], table: str) -> str:
    references = ("base", "expert", "mixed", "strong", "latent", "ceiling")
    average = {c: x for c, x in document["average"][table].items() if c not in references}
    best = max(average, key=lambda column: average[column])
    kind = "one expert" if table == "single" else "all experts"
    if best == "dynamic":
        return f"Of the strategies for {kind} measured here DLF has the best average."
    return (
        f"Of the strategies for {kind} measured here the best average is that of {name_of(best)}: {average[best]:.1f}."
    )
