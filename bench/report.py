"""docs/performance.md from the results: every figure on it comes out of their JSON."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness, shares
from bench.bars import BARS, MET, MISSED, Bar
from bench.decode import CENTRE
from bench.harness import Case, figures, listed, ratios, spread
from trimtab.core.errors import InputError
from trimtab.core.files import write_whole
from trimtab.measure.results import replace_between_markers

ORDER = ("decode", "solve", "memory", "onepass", "drafters")
START, END = "<!-- speed:start -->", "<!-- speed:end -->"
INTERVALS = (
    "Figures are medians over the repeats, in brackets the quartiles, or the least and the largest where there are "
    "fewer than four repeats. A promise is met where the whole interval keeps it."
)
Document = Mapping[str, Any]


def write(folder: Path, page: Path, readme: Path | None = None) -> None:
    """The page, and the table of promises between the README's marks.

    raises    InputError where the folder holds no results, or the README no marks
    """
    texts = {page: markdown(folder, page)}
    if readme is not None:
        texts[readme] = with_promises(readme, folder)
    for file, text in texts.items():
        write_whole(file, text)


def with_promises(readme: Path, folder: Path) -> str:
    """The README with the promises of speed and memory as they were measured on each machine.

    raises    InputError where it has no marks to put them between
    """
    lines: list[str] = []
    for name, files in by_machine(folder).items():
        documents = {bench: harness.read_json(file) for bench, file in files.items()}
        lines += [f"{name}:", "", *bar_rows(documents), *shares.costs(documents)]
    return renewed(readme, lines, START, END, "the measured speed")


def renewed(page: Path, lines: Iterable[str], start: str, end: str, what: str) -> str:
    """A page with these lines between two of its own.

    what      what they hold, for the message
    raises    InputError where the page does not have both marks once each
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
    """The whole page, as it is to stand at `page`."""
    machines = by_machine(folder)
    parts = [
        "# Speed and memory",
        "",
        "Written by `python -m bench report`; do not edit. `make bench-full` measures again. Alternatives run "
        "interleaved in one process (A B C A B C); a ratio is taken within each repeat, between runs that stood side "
        f"by side. {INTERVALS}",
        "",
    ]
    for name, files in machines.items():
        parts += _machine(name, files, page)
    return "\n".join(parts).rstrip() + "\n"


def by_machine(folder: Path) -> dict[str, dict[str, Path]]:
    """Machine -> bench -> its file; a long run goes before a quick one, parts of a bench are left out."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: (not file.stem.endswith("-quick"), file.stem)):
        document = harness.read_json(file)
        if not document["only"] and document["bench"] in ORDER:  # served benches stand on a page of their own
            found.setdefault(document["machine"]["name"], {})[document["bench"]] = file
    if not found:
        raise InputError(
            f"there are no results in {folder}.",
            "The page is made from what `python -m bench NAME` leaves there.",
            "run `make bench` first.",
        )
    return found


def _machine(name: str, files: Mapping[str, Path], page: Path) -> Iterator[str]:
    documents = {bench: harness.read_json(files[bench]) for bench in ORDER if bench in files}
    about = next(iter(documents.values()))["machine"]
    device = f", {about['accelerator']}" if about["accelerator"] else ""
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    yield f"## {name}: {about['cpu']}, {about['cores']} cores{device}, {about['memory_gib']} GiB"
    yield ""
    yield f"{about['threads']} threads; Python {about['python']}, {versions}."
    yield ""
    yield from bar_rows(documents)
    yield from shares.costs(documents)
    for bench, document in documents.items():
        yield from bench_rows(document, files[bench].with_suffix(".png"), page)


def bar_rows(documents: Mapping[str, Document], bars: Sequence[Bar] = BARS) -> Iterator[str]:
    """A table of what was promised, and what was measured: at the worst place, at how many it is met, at the centre.

    documents   bench -> what it found
    """
    yield "| promised | ratio | measured, worst | | where | met at | at the centre |"
    yield "|---|---|---|---|---|---|---|"
    for bar in bars:
        document = documents.get(bar.bench)
        worst = bar.worst(document) if document is not None else None
        if document is None or worst is None:
            yield f"| {bar.claim} | {bar.demand} | – | not measured | | | |"
        else:
            quick = ", quick form" if document["is_quick"] else ""
            found = list(bar.find(harness.cases_of(document)))
            met = sum(bar.verdict(ratio) == MET for _, ratio in found)
            centre = next((_ratio(ratio) for name, ratio in found if name == CENTRE), "")
            cells = [bar.claim, bar.demand, _ratio(worst[1]), _verdict(bar, worst[1]), f"{worst[0]}{quick}"]
            yield f"| {' | '.join(cells)} | {met} of {len(found)} | {centre} |"
    yield ""


def _ratio(ratio: harness.Spread) -> str:
    return ratio.text(digits=3 if ratio.median < 0.5 else 2)


def _verdict(bar: Bar, ratio: harness.Spread) -> str:
    verdict = bar.verdict(ratio)
    return f"**{verdict}**" if verdict == MISSED else verdict


def bench_rows(document: Document, picture: Path, page: Path) -> Iterator[str]:
    """A bench's section: how it was run, its picture, its cases.

    page   where this is to stand
    """
    form = "quick form" if document["is_quick"] else "long form"
    path = os.path.relpath(picture, page.parent)
    yield f"### {document['title']}"
    yield ""
    yield (
        f"`{document.get('command', 'python -m bench ' + document['bench'])}`, {form}, {document['date']} UTC, commit "
        f"{document['commit']}, "
        f"load of the machine at the end {document['machine']['load']}."
    )
    yield ""
    yield f"![{document['title']}]({path})"
    yield ""
    for note in document["notes"]:
        yield f"- {note}"
    yield ""
    cases = harness.cases_of(document)
    yield from shares.seconds_rows(cases)
    for case in cases:
        yield from _case(case)


def _case(case: Case) -> Iterator[str]:
    yield f"**{case.name}**: {listed(case.settings)}." + (f" Measured: {listed(case.facts)}." if case.facts else "")
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
