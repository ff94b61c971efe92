"""Measure both pairs on several draws of test items and write docs/results.md, with docs/results.json beside it.

Every distinct item is answered once per column, however many draws it stands in. --update-readme puts the headline
table of a results.json that is already there between the README's markers, and measures nothing.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

from trimtab.cli import options, output
from trimtab.core.errors import InputError, UnreadableModel
from trimtab.core.files import write_whole
from trimtab.measure.pages import finite

EXAMPLE = "trimtab results --items 20 --seeds 0,1 --pairs far -o runs/results.md"
PAIRS = {"far": "far", "close": "close"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much to measure, where to write."""
    parser.add_argument("--pairs", metavar="NAMES", help="comma-separated: far, close; both by default")
    parser.add_argument("--items", type=options.positive, default=500, metavar="N", help="items per task and draw")
    parser.add_argument("--seeds", metavar="NUMBERS", default="0,1,2", help="comma-separated, one draw of items each")
    parser.add_argument("--tasks", metavar="NAMES", help="comma-separated; all tasks of the zoo by default")
    parser.add_argument("-o", "--output", metavar="MD", type=Path, default=Path("docs/results.md"), help="the page")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing; write page and pictures again from the JSON beside"
    )
    parser.add_argument(
        "--update-readme", metavar="MD", type=Path, help="only put the headline table between this file's markers"
    )


def run(args: argparse.Namespace) -> None:
    """Measure and write, or update the README."""
    beside = args.output.with_suffix(".json")
    if args.update_readme is not None:
        update_readme(args.update_readme, beside)
        result: dict[str, Any] = {"updated": str(args.update_readme), "from": str(beside)}
        output.emit(args.json, output.document(result), lambda: print(args.update_readme))
        return
    from trimtab.measure.results import write_page

    page = output.claim_file(args.output, args.force)
    if args.redraw:
        write_page(page, read_measured(beside))
        output.emit(args.json, output.document({"page": str(page), "data": str(beside)}), lambda: print(page))
        return
    beside = output.claim_file(beside, args.force)
    seeds = seeds_of(args.seeds)
    found = measure(args, seeds)
    write_page(page, found)
    write_whole(beside, json.dumps(finite(found), indent=1, allow_nan=False) + "\n")
    settings = {"pairs": list(found), "items": args.items, "seeds": seeds}
    result = {"page": str(page), "data": str(beside), "pairs": found}
    output.emit(args.json, output.document(result, settings), lambda: print(f"{page}\n{beside}"))


def seeds_of(text: str) -> list[int]:
    """Whole numbers from a comma-separated list."""
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--seeds {text} cannot be read.", "Expected: whole numbers.", "for example 0,1,2.") from error
    return seeds


def measure(args: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    """For each pair: all distinct items of the draws measured once, then a document per draw and one of all."""
    from trimtab import zoo
    from trimtab.cli import demo
    from trimtab.cli.panel import draw_items
    from trimtab.measure.results import collect
    from trimtab.measure.study import MULTI_STRATEGIES
    from trimtab.measure.summary import summarise

    tasks = options.names_of(args.tasks, zoo.TASKS, "task")
    draws = {seed: draw_items(tasks, args.items, seed) for seed in seeds}
    every = {task: list({item.id: item for drawn in draws.values() for item in drawn[task]}.values()) for task in tasks}
    documents: dict[str, list[dict[str, Any]]] = {}
    pooled: dict[str, dict[str, Any]] = {}
    for pair in options.names_of(args.pairs, PAIRS, "pair"):
        started = perf_counter()
        _, scores = demo.study(pair, {name: zoo.TASKS[name] for name in tasks}, every, MULTI_STRATEGIES)
        common = {"pair": pair, "seconds": round(perf_counter() - started, 1), "versions": output.versions()}
        documents[pair] = [
            {**summarise(scores.only(drawn), zoo.TUNED_TASKS, seed=seed, num_draws=500), **common, "seed": seed}
            for seed, drawn in draws.items()
        ]
        pooled[pair] = {**summarise(scores, zoo.TUNED_TASKS), **common, "seed": 0}
    return collect(documents, pooled)


def read_measured(beside: Path) -> dict[str, Any]:
    """What an earlier run measured."""
    try:
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnreadableModel(f"{beside} cannot be read: {error}.", fix="run `trimtab results` first.") from error
    return found


def update_readme(readme: Path, beside: Path) -> None:
    """The headline table between the markers."""
    from trimtab.measure.results import END, START, headline_table, replace_between_markers

    found = read_measured(beside)
    try:
        text = readme.read_text(encoding="utf-8")
        write_whole(readme, replace_between_markers(text, headline_table(found)))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{readme}: {error}.", "The table goes between two comments.", f"add the lines {START} and {END}."
        ) from error
