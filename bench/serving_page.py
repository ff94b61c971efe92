"""The section "Under load" of docs/serving.md from the results: every figure in it comes out of their JSON.

python -m bench.serving_page
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from bench.report import INTERVALS, bar_rows, bench_rows, renewed
from bench.serving import BARS
from trimtab.core.errors import InputError, TrimtabError
from trimtab.core.files import write_whole

START, END = "<!-- load:start -->", "<!-- load:end -->"
RESULTS, PAGE = Path("bench/results"), Path("docs/serving.md")


def section(folder: Path, page: Path) -> Iterator[str]:
    """Lines of the section, as it is to stand on `page`; raises InputError where the folder holds no results."""
    file, drafts = (_latest(folder, bench) for bench in ("serving", "served_drafts"))
    soak = folder / "soak.json"
    if file is None and drafts is None and not soak.exists():
        raise InputError(f"there are no results of a server in {folder}.", fix="run `make bench-serving`, `make soak`.")
    yield "Written by `python -m bench.serving_page`; do not edit. `make bench-serving` and `make soak` measure again."
    yield ""
    if file is not None:
        document = harness.read_json(file)
        yield INTERVALS
        yield ""
        yield from bar_rows({"serving": document}, BARS)
        yield from _measured(file, document, page)
    if drafts is not None:
        yield from _measured(drafts, harness.read_json(drafts), page)
    if soak.exists():
        yield from _soak(harness.read_json(soak))


def _measured(file: Path, document: Mapping[str, Any], page: Path) -> Iterator[str]:
    yield from bench_rows(document, file.with_suffix(".png"), page)
    yield _machine(document)
    yield ""


def _latest(folder: Path, bench: str) -> Path | None:
    """The results of a bench's long form, or of its quick one where there are no others."""
    files = (harness.file_of(folder, bench, quick) for quick in (False, True))
    return next((file for file in files if file.exists()), None)


def _machine(document: Mapping[str, Any]) -> str:
    about, told = document["machine"], document["settings"]
    versions = ", ".join(f"{package} {number}" for package, number in (about["versions"] | told["versions"]).items())
    engine, others = (len(told["cores"][who]) for who in ("engine", "others"))
    return (
        f"Measured on {about['name']}: {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; {engine} for "
        f"the model's threads, {others} for vLLM's scheduler, HTTP and clients; {versions}."
    )


def _soak(found: Mapping[str, Any]) -> Iterator[str]:
    told = found["settings"]
    yield "### Soak"
    yield ""
    yield (
        f"`python -m bench.soak --seconds {told['seconds']:g}`, {found['date']} UTC, commit {found['commit']}: "
        f"{told['visitors']} visitors at a time made {found['requests']:,} visits to `{found['server']}` on the zoo, "
        f"after {told['warm_up']:g} s of the same for warming up. They asked for answers whole and streamed, of any "
        "length, with several choices, stop strings, settings of their own; left in the middle; hung up before a "
        "request was complete; sent what is no request."
    )
    yield ""
    yield "| afterwards | found | expected | |"
    yield "|---|---|---|---|"
    for check in found["checks"]:
        verdict = "held" if check["is_met"] else "**failed**"
        yield f"| {check['name']} | {check['found']} | {check['expected']} | {verdict} |"
    yield ""
    looks = ", ".join(f"{mib:,.0f} ({seconds:g} s)" for seconds, mib in found["memory_mib"])
    yield f"Memory of the quiet server, MiB, after so many seconds of visits: {looks}."
    yield ""
    yield (
        "What visitors were told, 0 where they had left: "
        + ", ".join(f"{visit} ({count:,})" for visit, count in found["statuses"].items())
        + "."
    )


def with_section(page: Path, folder: Path) -> str:
    """The page with its section made anew; raises InputError where it has no marks to put it between."""
    return renewed(page, section(folder, page), START, END, "what was measured under load")


def main(words: Sequence[str] | None = None) -> int:
    """Writes the section; exit code 2 where there are no results or no marks."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving_page", description="Write docs/serving.md, 'Under load'."
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that holds the section")
    asked = parser.parse_args(words)
    try:
        write_whole(asked.page, with_section(asked.page, asked.output))
    except TrimtabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
