"""Whether there is anything to transfer: every model of both pairs alone, on validation items.

The study fails where no room is left between the experts and the tuned strong model.
"""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.core.files import write_whole
from trimtab.measure.stamps import versions
from trimtab.studies import Outcome, Tools
from trimtab.studies.options import positive

EXAMPLE = "trimtab study regime --items 20"
VALIDATION_ITEMS = 240


def add_arguments(parser: Any) -> None:
    """How many items, where to write."""
    parser.add_argument(
        "--items", type=positive, default=VALIDATION_ITEMS, metavar="N", help="validation items per task at most"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="MD", help="also write the table as Markdown")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: Namespace, tools: Tools) -> Outcome:
    """Measure, judge every demand, write the page."""
    from trimtab import zoo
    from trimtab.studies.models import SMALL_OF, load_models, solved_examples
    from trimtab.studies.regime import criteria as judge

    target = tools.claim(args.output) if args.output else None
    items = {task: zoo.load_items(task, "validation", limit=args.items) for task in zoo.TASKS}
    forced = {task: zoo.in_own_style(task, chosen) for task, chosen in items.items()}
    found: dict[str, list[judge.TaskRegime]] = {}
    for pair in SMALL_OF:
        models, found[pair] = load_models(pair), []
        shots = solved_examples(models.tokenizer, zoo.TASKS, items, models.context)
        for done, (name, task) in enumerate(zoo.TASKS.items()):
            tools.advance(f"{pair} pair: {name}", done, len(zoo.TASKS))
            about = (name in zoo.TUNED_TASKS, shots.get(name), forced[name])
            found[pair].append(judge.task_regime(models, task, items[name], *about))
    text = judge.as_markdown(found)
    if target:
        write_whole(target, text)
    result = {
        pair: {"tasks": [asdict(r) for r in regimes], "criteria": [asdict(c) for c in judge.criteria(pair, regimes)]}
        for pair, regimes in found.items()
    }
    settings = {"items": {task: len(chosen) for task, chosen in items.items()}}
    poor = [pair for pair, regimes in found.items() if not judge.is_transferable(pair, regimes)]
    failure = f"there is nothing to transfer in the {' and the '.join(poor)} pair." if poor else ""
    document = {"result": result, "settings": settings, "seed": None, "versions": versions()}
    return Outcome(document, [text.rstrip("\n")], failure)
