"""The whole story on the embedded zoo: what small experts teach a strong model that is never trained.

Every task with its own expert, all experts at once, and a task that none of them knows; each strategy beside the small
expert alone, static alphas, plain ensembles and the ceiling, with intervals and paired tests. Writes a report folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from trimtab.cli import options, output
from trimtab.core.errors import InputError

EXAMPLE = "trimtab demo --items 40"
REPORTS = Path("reports")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, which items, where to write."""
    parser.add_argument("--pair", choices=("far", "close"), default="far", help="how much smaller the small model is")
    parser.add_argument("--items", type=options.positive, default=200, metavar="N", help="test items per task")
    parser.add_argument("--seed", type=int, default=0, help="which items, and the draws of the intervals")
    parser.add_argument("--tasks", metavar="NAMES", help="comma-separated; all tasks of the zoo by default")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="report folder (default: reports/demo-PAIR; none with --json)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the report."""
    from trimtab import zoo

    started = perf_counter()
    tasks = options.names_of(args.tasks, zoo.TASKS, "task")
    folder = args.output or (None if args.json else REPORTS / f"demo-{args.pair}")
    if folder is not None:
        folder = output.claim_folder(folder, args.force)
    panel, scores = measure(args.pair, tasks, args.items, args.seed)
    document = describe(args, scores, perf_counter() - started)
    page = None
    if folder is not None:
        from trimtab.measure.report import write_report

        page = write_report(folder, document, scores, explained(panel, scores))
    output.emit(args.json, document, lambda: show(document, page))


def measure(pair: str, tasks: Sequence[str], limit: int, seed: int) -> tuple[Any, Any]:
    """The loaded models and the scores of every column on test items of the zoo."""
    from trimtab import zoo
    from trimtab.cli.panel import draw_items
    from trimtab.measure.study import DEMO_MULTI

    items = draw_items(tasks, limit, seed)
    if not any(items.values()):
        raise InputError("there are no items.", fix="name other tasks.")
    return study(pair, {name: zoo.TASKS[name] for name in tasks}, items, DEMO_MULTI)


def study(pair: str, tasks: Mapping[str, Any], items: Mapping[str, Any], multi: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load the models of a pair once and run every column; `multi` are the strategies for all experts at once."""
    from trimtab import zoo
    from trimtab.cli.panel import load_panel, solved_examples
    from trimtab.measure.study import run_study

    with output.progress() as advance:
        advance("loading models", 0, 1)
        panel = load_panel(pair, zoo.TUNED_TASKS)
        context = panel.models["strong"].config.max_position_embeddings
        tuned = {name: chosen for name, chosen in items.items() if name in zoo.TUNED_TASKS}
        shots = solved_examples(panel.tokenizer, tasks, tuned, context)
        scores = run_study(
            panel,
            tasks,
            items,
            zoo.TUNED_TASKS,
            shots,
            on_job=lambda job, done, total: advance(f"{job.task}: {job.column}", done, total),
            multi=multi,
        )
    return panel, scores


def describe(args: argparse.Namespace, scores: Any, seconds: float) -> dict[str, Any]:
    """The document: figures first, then what they depend on."""
    from trimtab import zoo
    from trimtab.measure.summary import summarise

    summary = summarise(scores, zoo.TUNED_TASKS, seed=args.seed)
    settings = {"pair": args.pair, "items": args.items, "tasks": list(scores.items)}
    return {
        **summary,
        "pair": args.pair,
        "items": summary["items"],
        "seconds": round(seconds, 1),
        "settings": settings,
        "seed": args.seed,
        "versions": output.versions(),
    }


def explained(panel: Any, scores: Any) -> list[Any]:
    """For every task with written answers one that the fused model got right and the strong one did not, in steps."""
    from trimtab import zoo
    from trimtab.measure.report import Shown
    from trimtab.measure.study import SINGLE_STRATEGIES

    found = []
    for name, items in scores.items.items():
        task = zoo.TASKS[name]
        if task.kind != "generate" or name not in zoo.TUNED_TASKS:
            continue
        points = scores.points["single"]
        place = int((points["dynamic"][name] - points["strong"][name]).argmax())
        fused = panel.fuse((name,))
        fused.strategy = panel.strategy(SINGLE_STRATEGIES["dynamic"], (name,))
        trace = fused.trace(items[place].prompt, max_new_tokens=task.max_new_tokens, do_sample=False)
        found.append(Shown(name, items[place].target, trace.to_dict()))
    return found


def show(document: Mapping[str, Any], page: Path | None) -> None:
    """The tables and findings for a terminal."""
    from trimtab.measure import report, tables, verdict

    if document["single"]:
        print_grid(tables.single_grid(document))
    if document["multi"]:
        print_grid(tables.multi_grid(document))
    for grid in tables.unseen_grids(document):
        print_grid(grid)
    print_grid(report.paper_grid(document))
    console = output.console()
    for sentence in verdict.sentences(document):
        console.print(f"- {sentence}", markup=False)
    where = f" Report: {page}" if page is not None else ""
    console.print(
        f"\n{document['items']} items per task, {document['seconds']:.0f} s.{where}", markup=False, soft_wrap=True
    )


def print_grid(grid: Any) -> None:
    """One grid as a rich table; intervals stand in the average only, the page has them all."""
    from rich.table import Table

    table = Table(title=grid.title, title_justify="left", title_style="bold")
    table.add_column("")
    for head in grid.heads:
        table.add_column(head, justify="right")
    for row in grid.rows:
        cells = [
            (f"[bold]{cell.text}[/bold]" if cell.is_best else cell.text)
            + (f" [dim]({cell.interval.replace(' ', '')})[/dim]" if cell.interval and _has_room(grid, head) else "")
            for head, cell in zip(grid.heads, row.cells, strict=True)
        ]
        style = "cyan" if row.column == "dynamic" else "dim" if row.is_reference else None
        table.add_row(row.name, *cells, style=style)
    output.console().print(table)


def _has_room(grid: Any, head: str) -> bool:
    return head == "average" or len(grid.heads) <= 2
