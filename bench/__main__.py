"""Runs a bench and leaves its table on stdout, its JSON and plot in a folder, its progress on stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import Options
from trimtab.core.errors import InputError, TrimtabError

BENCHES = ("decode", "solve", "memory", "onepass", "draft_sources")
IN_VLLM = ("serving", "served_drafts")  # in the environment of the vLLM plug-in; not part of `all`
EXAMPLE = "python -m bench decode --quick"


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed for a stated reason, 2 wrong usage."""
    asked = _parser().parse_args(words)
    try:
        if asked.name == "report":
            import_module("bench.report").write(asked.output, asked.page, asked.readme)
            return 0
        for name in BENCHES if asked.name == "all" else (asked.name,):
            run(name, _options(asked), as_json=asked.json)
    except TrimtabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(name: str, options: Options, as_json: bool = False) -> dict[str, Any]:
    """One bench from start to end; returns the document that it wrote."""
    known = (*BENCHES, *IN_VLLM)
    if name not in known or find_spec(f"bench.{name}") is None:
        raise InputError(f"there is no bench '{name}'.", f"Known: {', '.join(known)}.", f"for example {EXAMPLE}.")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # its remarks on settings would drown the progress
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench = import_module(f"bench.{name}")
    findings = bench.measure(options, _progress(name))
    if not findings.cases:
        asked = f"no case of bench '{name}' is called '{options.only}', or none could be had."
        raise InputError(asked, findings.notes[-1] if findings.notes else "", "leave --only out, or change the sizes.")
    found = harness.document(name, findings, options)
    # An interrupted or partial run leaves the whole one alone.
    label = f"{name}-{options.only}" if options.only else name
    file = harness.file_of(options.output, label, options.is_quick)
    harness.write_json(file, found)
    getattr(bench, "plot", harness.plot)(findings, file.with_suffix(".png"))
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        harness.show(findings)
    print(f"written: {file} and {file.with_suffix('.png').name}", file=sys.stderr)
    return found


def _progress(name: str) -> harness.Progress:
    """One line that is written over on a terminal; elsewhere one line per case."""
    shown = [""]

    def show(text: str) -> None:
        case = text.partition(":")[0]
        if sys.stderr.isatty():
            print(f"\r\x1b[Kbench {name}: {text}", end="", file=sys.stderr, flush=True)
        elif case != shown[0]:
            print(f"bench {name}: {case}", file=sys.stderr, flush=True)
        shown[0] = case

    return show


def _options(asked: argparse.Namespace) -> Options:
    return Options(**{setting.name: getattr(asked, setting.name) for setting in fields(Options)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure alternatives side by side, as ratios. Example: {EXAMPLE}",
    )
    parser.add_argument(
        "name", choices=(*BENCHES, *IN_VLLM, "all", "report"), help="which bench; report writes the page"
    )
    parser.add_argument(
        "--quick",
        dest="is_quick",
        action="store_true",
        help="a small form, under two minutes; five where servers start",
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--threads", type=_count, help="threads of torch (default: one per core)")
    parser.add_argument("--repeats", type=_count, help="how often each arm runs (default: the bench's own)")
    parser.add_argument("--only", default="", help="part of a case's name: other cases are left out")
    parser.add_argument("--machine", default="", help="what to call this machine (default: its host name)")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"), help="where `report` writes")
    parser.add_argument("--readme", type=Path, help="a README in which `report` renews the table of promises")
    parser.add_argument("--device", default="cpu", help="where the members of decode run, such as cuda (default: cpu)")
    parser.add_argument("--strong", type=_count, help="parameters of the strong model of decode (default: its own)")
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of tables")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; expected at least 1")
    return count


if __name__ == "__main__":
    sys.exit(main())
