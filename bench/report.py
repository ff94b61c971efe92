"""docs/performance.md and docs/performance-points.md from the results: every figure on them comes out of their JSON.

The first page is a summary of one screen: targets, verdicts, and which bench measured what. The second has every point.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import harness, time_breakdown
from bench.decode import CENTRE
from bench.harness import Case, figures, listed, ratios, spread
from bench.targets import MET, MISSED, TARGETS, Target
from trimtab.core.errors import InputError
from trimtab.core.files import write_whole
from trimtab.measure.pages import replace_between_markers

ORDER = ("decode", "solve", "memory", "onepass", "draft_sources")
README_BENCH = "decode"  # the README shows the targets of speed; the page has all
START, END = "<!-- speed:start -->", "<!-- speed:end -->"
INTERVALS = (
    "Figures are medians over the repeats. Brackets hold the quartiles, or the least and the largest of fewer than "
    "four repeats. A target is met if the whole interval meets it."
)
Document = Mapping[str, Any]


def write(folder: Path, page: Path, readme: Path | None = None) -> None:
    """The summary at `page`, all points beside it, and the table of targets between the README's marks.

    raises    InputError if the folder holds no results, or the README no marks
    """
    texts = {page: markdown(folder, page), points_page(page): points(folder, page)}
    if readme is not None:
        texts[readme] = with_targets(readme, folder)
    for file, text in texts.items():
        write_whole(file, text)


def points_page(page: Path) -> Path:
    """docs/performance.md -> docs/performance-points.md"""
    return page.with_name(f"{page.stem}-points{page.suffix}")


def with_targets(readme: Path, folder: Path) -> str:
    """The README with the targets of speed as they were measured on each machine.

    raises    InputError if it has no marks to put them between
    """
    lines: list[str] = []
    for name, documents in by_machine(folder).items():
        lines += [
            f"{name}:",
            "",
            *target_rows(documents, [target for target in TARGETS if target.bench == README_BENCH]),
        ]
    return renewed(readme, lines, START, END, "the measured speed")


def renewed(page: Path, lines: Iterable[str], start: str, end: str, what: str) -> str:
    """A page with these lines between two of its own.

    what      what they hold, for the message
    raises    InputError if the page does not have both marks once each
    """
    try:
        content = "\n".join(["", *lines]).rstrip() + "\n"
        return replace_between_markers(page.read_text(encoding="utf-8"), content, start, end)
    except ValueError as error:
        raise InputError(
            f"{page} has no place for {what}.",
            f"It stands between the lines {start} and {end}, once each.",
            "put both where it should be.",
        ) from error


def markdown(folder: Path, page: Path) -> str:
    """The summary, as it is to stand at `page`."""
    parts = [
        "# Speed and memory",
        "",
        "Written by `python -m bench report`; do not edit. `make bench-full` measures again. "
        f"[All points]({points_page(page).name}) have a page of their own.",
        "",
        "Alternatives run interleaved in one process (A B C A B C). A ratio is taken within each repeat, between "
        "neighbouring runs.",
        "",
        INTERVALS,
        "",
    ]
    for name, documents in by_machine(folder).items():
        parts += _summary(name, documents, page)
    return "\n".join(parts).rstrip() + "\n"


def points(folder: Path, page: Path) -> str:
    """All points of all benches, as they are to stand beside `page`."""
    parts = [
        "# All points of speed and memory",
        "",
        f"Written by `python -m bench report`; do not edit. The summary is [{page.stem}]({page.name}). "
        "The JSON files in `bench/results` hold every repeat, setting and fact.",
        "",
        INTERVALS,
        "",
    ]
    for name, documents in by_machine(folder).items():
        parts += [*_machine(name, documents)]
        for bench, document in documents.items():
            parts += bench_rows(document, _picture(folder, bench, document), page)
    return "\n".join(parts).rstrip() + "\n"


def by_machine(folder: Path) -> dict[str, dict[str, Document]]:
    """Machine -> bench -> what it found; a long run goes before a quick one, parts of a bench are left out."""
    found: dict[str, dict[str, Document]] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: (not file.stem.endswith("-quick"), file.stem)):
        document = harness.read_json(file)
        if not document["only"] and document["bench"] in ORDER:  # served benches stand on a page of their own
            found.setdefault(document["machine"]["name"], {})[document["bench"]] = document
    if not found:
        raise InputError(
            f"there are no results in {folder}.",
            "The page is made from what `python -m bench NAME` leaves there.",
            "run `make bench` first.",
        )
    return {name: {bench: benches[bench] for bench in ORDER if bench in benches} for name, benches in found.items()}


def _picture(folder: Path, bench: str, document: Document) -> Path:
    return harness.file_of(folder, bench, document["is_quick"], "png")


def _machine(name: str, documents: Mapping[str, Document]) -> Iterator[str]:
    about = next(iter(documents.values()))["machine"]
    device = f", {about['accelerator']}" if about["accelerator"] else ""
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    yield f"## {name}: {about['cpu']}, {about['cores']} cores{device}, {about['memory_gib']} GiB"
    yield ""
    yield f"{about['threads']} threads; Python {about['python']}, {versions}."
    yield ""


def _summary(name: str, documents: Mapping[str, Document], page: Path) -> Iterator[str]:
    yield from _machine(name, documents)
    yield "### Targets and measurements"
    yield ""
    yield from target_rows(documents)
    yield from time_breakdown.costs(documents)
    yield "### What was measured"
    yield ""
    yield "| bench | command | date (UTC) | commit | points |"
    yield "|---|---|---|---|--:|"
    for document in documents.values():
        title = f"[{document['title']}]({points_page(page).name}#{_anchor(document['title'])})"
        cells = [title, f"`{_command(document)}`", document["date"].removesuffix(" UTC"), document["commit"]]
        yield f"| {' | '.join(cells)} | {len(document['cases'])} |"
    yield ""


def _anchor(title: str) -> str:
    """The heading's anchor, as code hosts and the site make it."""
    words = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return words.replace(" ", "-")


def _command(document: Document) -> str:
    return str(document.get("command", f"python -m bench {document['bench']}"))


def target_rows(documents: Mapping[str, Document], targets: Sequence[Target] = TARGETS) -> Iterator[str]:
    """A table of targets: the worst case, how many of the cases meet the target, the central case.

    documents   bench -> what it found
    """
    yield "| | target | worst case | | where | cases that meet it | central case |"
    yield "|---|--:|--:|---|---|---|--:|"
    for target in targets:
        document = documents.get(target.bench)
        worst = target.worst(document) if document is not None else None
        if document is None or worst is None:
            yield f"| {target.claim} | {target.demand} | – | not measured | | | |"
        else:
            quick = ", quick form" if document["is_quick"] else ""
            found = list(target.find(harness.cases_of(document)))
            met = sum(target.verdict(ratio) == MET for _, ratio in found)
            centre = next((_ratio(ratio) for name, ratio in found if name == CENTRE), "")
            cells = [target.claim, target.demand, _ratio(worst[1]), _verdict(target, worst[1]), f"{worst[0]}{quick}"]
            yield f"| {' | '.join(cells)} | {met} of {len(found)} | {centre} |"
    yield ""


def _ratio(ratio: harness.Spread) -> str:
    return ratio.text(digits=3 if ratio.median < 0.5 else 2)


def _verdict(target: Target, ratio: harness.Spread) -> str:
    verdict = target.verdict(ratio)
    return f"**{verdict}**" if verdict == MISSED else verdict


def bench_rows(document: Document, picture: Path, page: Path) -> Iterator[str]:
    """A bench's section: how it was run, its picture, its cases.

    page   where this is to stand
    """
    form = "quick form" if document["is_quick"] else "long form"
    yield f"### {document['title']}"
    yield ""
    yield (
        f"`{_command(document)}`, {form}, {document['date']} UTC, commit {document['commit']}, "
        f"load of the machine at the end {document['machine']['load']}."
    )
    yield ""
    yield f"![{document['title']}]({os.path.relpath(picture, page.parent)})"
    yield ""
    for note in document["notes"]:
        yield f"- {note}"
    yield ""
    cases = harness.cases_of(document)
    yield from time_breakdown.seconds_rows(cases)
    for _, alike in groupby(cases, key=_columns):
        group = list(alike)
        yield from _grid(group) if len(group) > 1 and not group[0].beside else (row for c in group for row in _case(c))


def _columns(case: Case) -> tuple[object, ...]:
    """Cases of which this is equal fit into one table."""
    return case.unit, case.reference, tuple(case.runs), case.beside, tuple(case.left_out)


def _grid(cases: Sequence[Case]) -> Iterator[str]:
    """Cases of the same arms: a row for each, the figure of the reference, and the other arms' ratios to it."""
    first = cases[0]
    others = [arm for arm in first.runs if arm != first.reference]
    yield f"A row for each case: {first.reference} in {first.unit}, and the others' ratios to it."
    yield ""
    yield f"| | {' | '.join([f'{first.reference}, {first.unit}', *(f'× {arm}' for arm in others)])} |"
    yield f"|---|{'---:|' * (len(others) + 1)}"
    for case in cases:
        cells = [spread(figures(case, first.reference)).text(), *(_ratio(spread(ratios(case, arm))) for arm in others)]
        yield f"| {case.name} | {' | '.join(cells)} |"
    yield ""


def _case(case: Case) -> Iterator[str]:
    yield f"**{case.name}**: {listed(case.settings)}."
    yield ""
    if case.facts:
        yield f"Measured: {listed(case.facts)}."
        yield ""
    has_reference = case.reference in case.runs
    heads = ["", case.unit, *([f"× {case.reference}"] if has_reference else []), *case.beside]
    yield f"| {' | '.join(head.replace('_', ' ') for head in heads)} |"
    yield f"|---|{'---:|' * (len(heads) - 1)}"
    for arm in case.runs:
        cells = [spread(figures(case, arm)).text()]
        if has_reference:
            cells.append(_ratio(spread(ratios(case, arm))))
        yield f"| {arm} | {' | '.join([*cells, *harness.beside(case, arm)])} |"
    for arm, reason in case.left_out.items():
        yield f"| {arm} | left out: {reason} |{' |' * (len(heads) - 2)}"
    yield ""
