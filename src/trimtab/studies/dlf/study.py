"""Dynamic Logits Fusion beside its rivals: one expert per task, all at once, and a task that none of them knows.

Each strategy stands beside the small expert alone, static alphas, plain ensembles and the ceiling, with intervals and
paired tests. With -o PAGE.md several pairs and draws of items are measured, every distinct item once, and the page is
written with its data in a .json beside it; with -o DIR one pair and one draw, as a report folder.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from trimtab.core.errors import InputError, UnreadableModel
from trimtab.core.files import write_whole
from trimtab.measure.pages import finite, replace_between_markers
from trimtab.measure.stamps import versions
from trimtab.studies import Outcome, Tools
from trimtab.studies.models import SMALL_OF
from trimtab.studies.options import add_draws, names_of, numbers_of

EXAMPLE = "trimtab study dlf --items 20 --seeds 0,1 --pairs far -o runs/results.md"


def add_arguments(parser: Any) -> None:
    """How much to measure, where to write."""
    add_draws(parser, 500, "0,1,2", Path("docs/results.md"), "page (.md), or report folder of one pair and draw")
    parser.add_argument("--tasks", metavar="NAMES", help="comma-separated; all tasks of the zoo by default")
    parser.add_argument("--quick", action="store_true", help="leave out the strategies that `trimtab demo` leaves out")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing; write page and pictures again from the JSON beside"
    )
    parser.add_argument(
        "--update-readme", metavar="MD", type=Path, help="only put the headline table between this file's markers"
    )


def run(args: Namespace, tools: Tools) -> Outcome:
    """Measure and write, or write again what was measured."""
    is_page = args.output is not None and args.output.suffix == ".md"
    if args.update_readme is not None or args.redraw:
        if not is_page:
            raise InputError("no page was named.", "Its data lies beside it.", "pass -o PAGE.md.")
        return update_readme(args.update_readme, args.output) if args.update_readme else redraw(args.output, tools)
    seeds, pairs = numbers_of(args.seeds, "--seeds"), names_of(args.pairs, SMALL_OF, "pair")
    if is_page:
        return run_page(args, pairs, seeds, tools)
    if len(seeds) * len(pairs) > 1:
        raise InputError(f"{args.output} is no page.", "A folder holds one pair and one draw.", "pass -o PAGE.md.")
    return run_report(args, pairs[0], seeds[0], tools)


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(args: Namespace, pair: str, seeds: Sequence[int], tools: Tools) -> dict[str, Any]:
    """Load the models of a pair once and answer every distinct item of the draws; documents are made from the rest."""
    from trimtab import zoo
    from trimtab.measure.evaluate import run_conditions
    from trimtab.studies.dlf.conditions import conditions
    from trimtab.studies.models import distinct, draw_items, load_models, solved_examples

    names = names_of(args.tasks, zoo.TASKS, "task")
    draws = draw_items(names, args.items, seeds)
    items, seed_of = distinct(draws)
    if not items:
        raise InputError("there are no items.", fix="name other tasks.")
    started = perf_counter()
    tools.advance("loading models", 0, 1)
    models = load_models(pair)
    tuned = {name: chosen for name, chosen in items.items() if name in zoo.TUNED_TASKS}
    shots = solved_examples(models.tokenizer, zoo.TASKS, tuned, models.context)
    records = run_conditions(
        conditions(models, zoo.TUNED_TASKS, shots, args.quick),
        models.models,
        models.tokenizer,
        zoo.TASKS,
        items,
        seed_of,
        tools.on_cell,
    )
    return {"models": models, "draws": draws, "items": items, "records": records, "seconds": perf_counter() - started}


def run_report(args: Namespace, pair: str, seed: int, tools: Tools) -> Outcome:
    """One pair and one draw: a report folder, and tables for the terminal."""
    from trimtab import zoo
    from trimtab.studies.dlf import findings
    from trimtab.studies.dlf.conditions import TABLES
    from trimtab.studies.dlf.report import write_report
    from trimtab.studies.dlf.summary import summarise

    folder = tools.claim(args.output) if args.output else None
    found = measure(args, pair, [seed], tools)
    document = {
        **summarise(found["records"], zoo.TUNED_TASKS, seed=seed),
        "pair": pair,
        "seconds": round(found["seconds"], 1),
        "settings": {"pair": pair, "items": args.items, "tasks": list(found["items"])},
        "seed": seed,
        "versions": versions(),
    }
    page = write_report(folder, document, found["records"], found["items"], explained(found)) if folder else None
    grids = [findings.table_grid(document, table) for table in TABLES if document[table]]
    shown: list[Any] = [*grids, *findings.unseen_grids(document), findings.paper_grid(document)]
    shown += [f"- {sentence}" for sentence in findings.key_findings(document)]
    where = f" Report: {page}" if page else ""
    return Outcome(document, [*shown, f"\n{document['items']} items per task, {document['seconds']:.0f} s.{where}"])


def explained(found: Mapping[str, Any]) -> list[Any]:
    """For every task with written answers one that the fused model got right and the strong one did not, in steps."""
    from trimtab import zoo
    from trimtab.measure.records import points_of
    from trimtab.studies.dlf.conditions import FIRST, SINGLE
    from trimtab.studies.dlf.report import Shown

    shown, models, points = [], found["models"], points_of(found["records"], "single")
    for name, items in found["items"].items():
        task = zoo.TASKS[name]
        if task.kind != "generate" or name not in zoo.TUNED_TASKS:
            continue
        item = items[int((points[FIRST][name] - points["strong"][name]).argmax())]
        fused = models.fuse((name,))
        fused.strategy = models.strategy(SINGLE[FIRST], (name,))
        trace = fused.trace(item.prompt, max_new_tokens=task.max_new_tokens, do_sample=False)
        shown.append(Shown(name, item.target, trace.to_dict()))
    return shown


def run_page(args: Namespace, pairs: Sequence[str], seeds: Sequence[int], tools: Tools) -> Outcome:
    """For each pair all distinct items of the draws measured once, then a document per draw and one of all."""
    from trimtab import zoo
    from trimtab.measure.records import only_items
    from trimtab.studies.dlf.page import collect, write_page
    from trimtab.studies.dlf.summary import summarise

    page, beside = tools.claim(args.output), tools.claim(args.output.with_suffix(".json"))
    documents: dict[str, list[dict[str, Any]]] = {}
    pooled: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        found = measure(args, pair, seeds, tools)
        records = found["records"]
        common = {"pair": pair, "seconds": round(found["seconds"], 1), "versions": versions()}
        documents[pair] = []
        for seed, drawn in found["draws"].items():
            some = only_items(records, {task: [item.id for item in items] for task, items in drawn.items()})
            summary = summarise(some, zoo.TUNED_TASKS, seed=seed, num_draws=500)
            documents[pair].append({**summary, **common, "seed": seed})
        pooled[pair] = {**summarise(records, zoo.TUNED_TASKS), **common, "seed": 0}
    measured = collect(documents, pooled)
    write_page(page, measured)
    write_whole(beside, json.dumps(finite(measured), indent=1, allow_nan=False) + "\n")
    settings = {"pairs": list(measured), "items": args.items, "seeds": list(seeds)}
    result = {"page": str(page), "data": str(beside), "pairs": measured}
    document = {"result": result, "settings": settings, "seed": None, "versions": versions()}
    return Outcome(document, [str(page), str(beside)])


# --- what was measured before --------------------------------------------------------------------------------------


def read_measured(beside: Path) -> dict[str, Any]:
    """What an earlier run measured."""
    try:
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnreadableModel(f"{beside} cannot be read: {error}.", fix="run `trimtab results` first.") from error
    return found


def redraw(output: Path, tools: Tools) -> Outcome:
    """Page and pictures again from the data beside."""
    from trimtab.studies.dlf.page import write_page

    page, beside = tools.claim(output), output.with_suffix(".json")
    write_page(page, read_measured(beside))
    return _written({"page": str(page), "data": str(beside)}, page)


def update_readme(readme: Path, output: Path) -> Outcome:
    """The headline table between the markers of a README."""
    from trimtab.studies.dlf.page import END, START, headline_table

    beside = output.with_suffix(".json")
    found = read_measured(beside)
    try:
        text = readme.read_text(encoding="utf-8")
        write_whole(readme, replace_between_markers(text, headline_table(found), START, END))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{readme}: {error}.", "The table goes between two comments.", f"add the lines {START} and {END}."
        ) from error
    return _written({"updated": str(readme), "from": str(beside)}, readme)


def _written(result: Mapping[str, str], file: Path) -> Outcome:
    document = {"result": dict(result), "settings": {}, "seed": None, "versions": versions()}
    return Outcome(document, [str(file)])
