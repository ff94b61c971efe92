"""docs/serving-load.md from the results: every figure on it comes out of their JSON.

python -m bench.serving_page
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from bench.report import INTERVALS, bench_rows, target_rows
from bench.serving import TARGETS
from trimtab.core.errors import InputError, TrimtabError
from trimtab.core.files import write_whole

RESULTS, PAGE = Path("bench/results"), Path("docs/serving-load.md")


def markdown(folder: Path, page: Path) -> str:
    """The whole page, as it is to stand at `page`; raises InputError if the folder holds no results."""
    return "\n".join(_lines(folder, page)).rstrip() + "\n"


def _lines(folder: Path, page: Path) -> Iterator[str]:
    file, drafts = (_latest(folder, bench) for bench in ("serving", "served_drafts"))
    if file is None and drafts is None:
        raise InputError(f"there are no results of a server in {folder}.", fix="run `make bench-serving`.")
    yield "# Served under load"
    yield ""
    yield "Written by `python -m bench.serving_page`; do not edit. `make bench-serving` measures again."
    yield ""
    if file is not None:
        document = harness.read_json(file)
        yield INTERVALS
        yield ""
        yield from target_rows({"serving": document}, TARGETS)
        yield from _measured(file, document, page)
    if drafts is not None:
        yield from _measured(drafts, harness.read_json(drafts), page)
    yield "### Soak"
    yield ""
    yield "`make soak` is a test: random clients for ten minutes, some of which leave, hang up or send nonsense."
    yield ""
    yield "It fails if an answer is 500 or above or missing, if a request or a cache block stays behind, if memory"
    yield "grows by more than 5%, or if a full server does not refuse at once (503 with `Retry-After`)."


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
        f"Measured on {about['name']}: {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB. {engine} of "
        f"them for the model's threads, {others} for vLLM's scheduler, HTTP and clients. {versions}."
    )


def main(words: Sequence[str] | None = None) -> int:
    """Writes the page; exit code 2 if there are no results."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving_page", description="Write docs/serving-load.md.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    asked = parser.parse_args(words)
    try:
        write_whole(asked.page, markdown(asked.output, asked.page))
    except TrimtabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
