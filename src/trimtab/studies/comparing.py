"""One comparison per pair of models: tables for a terminal, and a page with its pictures and its data beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure.comparison import Description
from trimtab.measure.stamps import versions
from trimtab.measure.statistics import SIGNIFICANT
from trimtab.measure.tables import Grid, Looks, markdown, paired_grid, score_grid
from trimtab.studies import Outcome, Tools

Found = Mapping[str, Description]  # pair -> what `Comparison.describe` gives, with "paired", "num_items" and "notes"


def grids_of(found: Found, looks: Looks) -> list[Grid]:
    """A table of scores per pair."""
    return [score_grid(f"The {pair} pair", own, looks, list(own["num_items"])) for pair, own in found.items()]


def findings(own: Description, looks: Looks) -> list[str]:
    """What the first condition beats and loses to on average over the tasks, and where no difference is shown."""
    rows = [row for row in own["paired"] if row["tasks"] == "average"]
    first = looks[rows[0]["first"]].label
    found = [f"{first} scores {own['average'][rows[0]['first']]:.1f} on average."]
    for verb, sign in (("It beats", 1), ("It loses to", -1), ("No difference is shown to", 0)):
        rivals = [f"{looks[r['second']].label} ({r['difference']:+.1f})" for r in rows if verdict(r) == sign]
        if rivals:
            found.append(f"{verb} {'; '.join(rivals)}.")
    return found


def verdict(row: Mapping[str, Any]) -> int:
    """1 or -1 if a paired difference is significant, else 0."""
    return 0 if row["p_value"] >= SIGNIFICANT else 1 if row["difference"] > 0 else -1


def page_text(found: Found, looks: Looks, head: str, stem: str) -> str:
    """The page; `stem` is the name of its file, without the suffix."""
    lines = [head.rstrip("\n"), ""]
    for grid, (pair, own) in zip(grids_of(found, looks), found.items(), strict=True):
        counts = ", ".join(f"{task} {count}" for task, count in own["num_items"].items())
        lines += [f"## {grid.title}", "", *(f"- {sentence}" for sentence in findings(own, looks)), ""]
        lines += [f"{own['notes']} Items: {counts}.", ""]
        lines += [f"![{grid.title}]({stem}-{pair}.png)", "", markdown(grid), ""]
        rows = [row for row in own["paired"] if row["tasks"] == "average"]
        first = looks[rows[0]["first"]].label
        lines += [f"{first} against the others, on the same items:", ""]
        lines += [markdown(paired_grid(grid.title, rows, lambda row: looks[row["second"]].label)), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_page(page: Path, found: Found, looks: Looks, head: str) -> None:
    """The page, one picture per pair, and the data as JSON."""
    from trimtab.measure.plots import score_plot

    for pair, own in found.items():
        picture = page.with_name(f"{page.stem}-{pair}.png")
        score_plot(f"The {pair} pair", own, looks, [*own["num_items"], "average"], picture)
    write_whole(page, page_text(found, looks, head, page.stem))
    write_whole(page.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


def claim_page(output: Path | None, tools: Tools) -> Path | None:
    """The page that may be written, with the data beside it."""
    return tools.claim(output) if output and tools.claim(output.with_suffix(".json")) else None


def outcome_of(found: Found, looks: Looks, page: Path | None, settings: Mapping[str, Sequence[Any] | Any]) -> Outcome:
    """Document, tables and the page's name."""
    document = {"result": dict(found), "settings": dict(settings), "seed": None, "versions": versions()}
    return Outcome(document, [*grids_of(found, looks), *([str(page)] if page else [])])
