"""Score a fused model through lm-evaluation-harness: the zoo's tasks by their short names, and all of its own.

The zoo's items are drawn as `trimtab demo` draws them: the same --limit and --seed give the same items. Tasks of the
harness itself may need the network for their data.
"""

import argparse
import contextlib
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.cli import options, output
from trimtab.core.errors import InputError, OfflineError, UnknownName, lines_of, unknown_name
from trimtab.core.stderr import captured_stderr

EXAMPLE = "trimtab eval --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts --tasks facts --limit 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, tasks, strategy."""
    options.add_directory(parser)
    parser.add_argument(
        "--tasks", metavar="NAMES", required=True, help="comma-separated: of the zoo, or of the harness"
    )
    parser.add_argument("--limit", type=options.positive, metavar="N", help="items per task; all by default")
    parser.add_argument("--seed", type=int, default=0, help="which items of the zoo, and the draws of the intervals")
    parser.add_argument("--batch-size", type=options.positive, default=64, metavar="N", help="prompts at once")
    parser.add_argument(
        "--write-tasks",
        metavar="DIR",
        type=Path,
        help="only write the zoo's tasks as YAML and JSONL, for lm_eval itself",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """Write the task files, run the harness, print scores with intervals."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.write_tasks is not None:
        folder = output.claim_folder(args.write_tasks, args.force)
        written = write_zoo_tasks(folder, names, args.limit, args.seed)
        result = {"directory": str(folder.resolve()), "tasks": sorted(written.values())}
        line = f"lm_eval --include_path {folder} --tasks {','.join(sorted(written.values()))} ..."
        output.emit(args.json, output.document(result, {"limit": args.limit}, args.seed), lambda: print(line))
        return
    prepare_harness(args.debug)
    fused = options.open_fused(args)
    is_talking = args.debug or sys.stderr.isatty()
    aside = contextlib.nullcontext() if is_talking else captured_stderr()
    with tempfile.TemporaryDirectory(prefix="trimtab-eval-") as folder_name, aside:
        found, speculation = evaluate(fused, names, Path(folder_name), args.limit, args.seed, args.batch_size)
    settings = {"tasks": names, "limit": args.limit, "strategy": fused.strategy.to_dict(), "speculation": speculation}
    document = output.document(found, settings, args.seed, "lm_eval")
    output.emit(args.json, document, lambda: show(found, speculation))


def prepare_harness(is_debugging: bool) -> None:
    """The harness's log only under --debug."""
    if not is_debugging:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "lm-evaluation-harness is not installed.", "It is an extra.", "pip install 'trimtab[eval]'."
        ) from error


def write_zoo_tasks(folder: Path, names: Sequence[str], limit: int | None, seed: int) -> dict[str, str]:
    """The task files of those names that are the zoo's; returns name -> the harness's name."""
    from trimtab import zoo
    from trimtab.measure.lm_eval_export import PREFIX, write_tasks

    short = {name: name.removeprefix(PREFIX) for name in names}
    mine = {name: task for name, task in short.items() if task in zoo.TASKS}
    items = {task: zoo.load_items(task, "test", limit=limit, seed=seed) for task in mine.values()}
    written = write_tasks(folder, zoo.TASKS, items)
    return {name: written[task] for name, task in mine.items()}


def evaluate(
    fused: Any, names: Sequence[str], folder: Path, limit: int | None, seed: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of a fused model on tasks of the zoo and of the harness.

    folder    where the task files of this run are written
    returns   {task: {"items", "metrics": {name: {"score", "interval"}}}}; scores are in points of 100 where the
              harness gives a share, with a 95% interval where it gives a value per item. And what drafts did in the
              batches of generated answers, see `summed`
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from requests import RequestException

    from trimtab import zoo
    from trimtab.logits.lm_eval import TrimtabLM
    from trimtab.logits.speculation.report import summed
    from trimtab.models.references import http_error

    mine = write_zoo_tasks(folder, names, limit, seed)
    needs_defaults = len(mine) < len(names)
    manager = TaskManager(include_path=str(folder), include_defaults=needs_defaults)
    asked = {name: mine.get(name, name) for name in names}
    unknown = [name for name, task in asked.items() if not manager.match_tasks([task])]
    if unknown:
        error = unknown_name("task", unknown[0], zoo.TASKS)
        raise UnknownName(error.found, f"{error.expected} Beside them what `lm-eval ls tasks` lists.", error.fix)
    model = TrimtabLM(fused, batch_size=batch_size)
    try:
        done = simple_evaluate(
            model=model, tasks=list(asked.values()), task_manager=manager, limit=limit, bootstrap_iters=0
        )
    except (ConnectionError, RequestException, http_error()) as error:  # raised by datasets, by tasks, by the hub
        is_answered = getattr(error, "response", None) is not None
        fix = "try again later, or see to the name of the data and to your access to it" if is_answered else "connect"
        raise OfflineError(
            f"the data of a task cannot be had: {' '.join(lines_of(error))}",
            "Tasks of lm-evaluation-harness bring their data from the hub; those of the zoo need no network.",
            f"{fix}, or ask for one of {', '.join(zoo.TASKS)}.",
        ) from error
    back = {task: name for name, task in mine.items()}
    found = {
        back.get(task, task): _metrics(values, done["samples"].get(task, []), seed)
        for task, values in done["results"].items()
    }
    return found, summed(model.speculation)


def _metrics(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    import torch

    from trimtab.measure.statistics import measured, resample

    metrics: dict[str, Any] = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if not isinstance(value, (int, float)) or not kind or name.endswith("_stderr"):
            continue
        shown = name if kind == "none" else key
        per_item = [sample.get(name) for sample in samples if sample.get("filter", "none") == kind]
        metrics[shown] = {"score": value, "interval": None}
        if per_item and all(isinstance(point, (int, float)) and 0 <= point <= 1 for point in per_item):
            points = 100.0 * torch.tensor([float(point) for point in per_item if point is not None])
            generator = torch.Generator().manual_seed(seed)
            where = measured(resample({"model": {"task": points}}, generator)["model"]["task"]).interval
            span = [round(where.low, 4), round(where.high, 4)] if where else None
            metrics[shown] = {"score": round(100.0 * value, 4), "interval": span}
    return {"items": len(samples) or None, "metrics": metrics}


def show(found: Mapping[str, Any], speculation: Mapping[str, Any]) -> None:
    """One line per task and metric, and one on drafts where answers were generated."""
    from rich.table import Table

    table = Table()
    for head in ("task", "metric", "score", "95% interval", "items"):
        table.add_column(head, justify="left" if head in ("task", "metric") else "right")
    for task, values in found.items():
        for metric, value in values["metrics"].items():
            span = value["interval"]
            interval = f"{span[0]:.1f} – {span[1]:.1f}" if span else ""
            table.add_row(task, metric, f"{value['score']:.1f}", interval, str(values["items"] or ""))
    output.console().print(table)
    if speculation["generations"]:
        output.console().print(_drafts(speculation), markup=False)


def _drafts(speculation: Mapping[str, Any]) -> str:
    """What drafts did, in a line."""
    if not speculation["drafted_in"]:
        return f"drafts: none ({'; '.join(speculation['reasons'])})"
    stood, drafted = speculation["accepted"], speculation["drafted"]
    return f"drafts: {stood} of {drafted} tokens stood, in {speculation['rounds']} rounds"
