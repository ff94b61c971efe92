"""Score a fused model through lm-evaluation-harness: the zoo's tasks by their short names, and all of its own.

The zoo's items are drawn as `trimtab demo` draws them: the same --limit and --seed give the same items. Tasks of the
harness itself may need the network for their data.
"""

import argparse
import contextlib
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.cli import options, output, prompting
from trimtab.core.errors import InputError, OfflineError, TrimtabWarning, UnknownName, lines_of, unknown_name
from trimtab.core.stderr import captured_stderr

EXAMPLE = "trimtab eval --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts --tasks facts --limit 20"

EXAMPLES = 64  # training items that few-shot examples of the zoo's tasks are drawn from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, tasks, strategy."""
    options.add_directory(parser)
    parser.add_argument(
        "--tasks", metavar="NAMES", required=True, help="comma-separated: of the zoo, or of the harness"
    )
    parser.add_argument("--limit", type=options.positive, metavar="N", help="items per task; all by default")
    parser.add_argument("--seed", type=int, default=0, help="which items of the zoo, and the draws of the intervals")
    parser.add_argument(
        "--batch-size", type=batch_size, default=64, metavar="N|auto", help="prompts at once; auto for as many as fit"
    )
    parser.add_argument(
        "--write-tasks",
        metavar="DIR",
        type=Path,
        help="only write the zoo's tasks as YAML and JSONL, for lm_eval itself",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    add_prompting(parser)
    options.add_strategy(parser)


def add_prompting(parser: argparse.ArgumentParser) -> None:
    """How the harness makes prompts of items, and what it generates with; names and meanings are lm_eval's."""
    group = parser.add_argument_group("harness", "as lm_eval's options of these names")
    group.add_argument(
        "--apply-chat-template",
        metavar="NAME",
        nargs="?",
        const=True,
        help="put items into the tokenizer's chat template; of several templates the named one",
    )
    group.add_argument(
        "--system-instruction", metavar="TEXT", help="opens every prompt; with a chat template as system"
    )
    group.add_argument("--num-fewshot", type=count, metavar="N", help="examples before each item; else the task's own")
    group.add_argument(
        "--fewshot-as-multiturn",
        metavar="true|false",
        nargs="?",
        const=True,
        type=truth,
        help="examples as turns of the conversation; with a chat template true unless said otherwise",
    )
    group.add_argument(
        "--gen-kwargs",
        metavar="NAME=VALUE,...",
        action="append",
        default=[],
        help="arguments of generate, such as temperature=0.8,do_sample=true; also JSON",
    )
    prompting.add_template_arguments(group)


@dataclass(frozen=True)
class Prompting:
    """How the harness makes prompts of items, and generates.

    chat_template    True, the name of one of several templates, or None for none
    is_multiturn     whether few-shot examples are turns of the conversation
    values           variables of the chat template
    """

    chat_template: str | bool | None = None
    system: str | None = None
    num_fewshot: int | None = None
    is_multiturn: bool = False
    generation: Mapping[str, Any] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the document of results, by the names of the options."""
        return {
            "apply_chat_template": self.chat_template,
            "system_instruction": self.system,
            "num_fewshot": self.num_fewshot,
            "fewshot_as_multiturn": self.is_multiturn,
            "gen_kwargs": self.generation,
            "template": dict(self.values),
        }


def prompting_of(args: argparse.Namespace) -> Prompting:
    """What the options say; raises InputError for those that need a chat template."""
    is_chat = args.apply_chat_template is not None
    needing = {"--fewshot-as-multiturn": args.fewshot_as_multiturn, "--template-arg": args.template_arg}
    for name, value in needing.items():
        if value and not is_chat:
            raise InputError(
                f"{name} was given without a chat template.", "It is for conversations.", "add --apply-chat-template."
            )
    return Prompting(
        args.apply_chat_template,
        args.system_instruction,
        args.num_fewshot,
        is_chat if args.fewshot_as_multiturn is None else args.fewshot_as_multiturn,
        generation_arguments(args.gen_kwargs) or None,
        prompting.variables_of(args.template_arg),
    )


def described(asked: Prompting, batch_size: int | str) -> str:
    """What was done otherwise than by default, in words; empty where nothing was."""
    template = (
        "" if isinstance(asked.chat_template, bool) or asked.chat_template is None else f" '{asked.chat_template}'"
    )
    parts = [
        f"in the chat template{template}" if asked.chat_template is not None else "",
        "with a system instruction" if asked.system else "",
        f"after {asked.num_fewshot} examples" if asked.num_fewshot else "",
        "with generation arguments " + json.dumps(dict(asked.generation)) if asked.generation else "",
        "in batches as large as fit" if isinstance(batch_size, str) else "",
    ]
    return ", ".join(part for part in parts if part)


def generation_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs or JSON as keyword arguments, with the types that lm_eval gives them."""
    from lm_eval.utils import simple_parse_args_string

    found: dict[str, Any] = {}
    for text in texts:
        try:
            part = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
        except ValueError as error:
            raise InputError(
                f"--gen-kwargs {text} cannot be read.", "Expected: NAME=VALUE,NAME=VALUE, or JSON.", "correct it."
            ) from error
        found |= part
    return found


def batch_size(text: str) -> int | str:
    """A number of prompts, auto, or auto:N."""
    return text if re.fullmatch(r"auto(:[1-9]\d*)?", text) else options.positive(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def truth(text: str) -> bool:
    """true or false, as lm_eval reads them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


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
    take_directory_from_template(args)
    options.check_pointed(args)
    prepare_harness(args.debug)
    asked = prompting_of(args)
    fused = options.open_fused(args)
    is_talking = args.debug or sys.stderr.isatty()
    aside = contextlib.nullcontext() if is_talking else captured_stderr()
    # The harness prints what batch size it finds; stdout is for the result.
    with (
        contextlib.redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory(prefix="trimtab-eval-") as folder_name,
        aside,
    ):
        found, speculation = evaluate(fused, names, Path(folder_name), args.limit, args.seed, args.batch_size, asked)
    if note := described(asked, args.batch_size):
        print(f"note: items were asked {note}.", file=sys.stderr)
    for task, values in found.items():
        if asked.num_fewshot not in (None, values["num_fewshot"]):
            warnings.warn(
                f"'{task}' was asked with {values['num_fewshot']} examples: its own configuration fixes that.",
                TrimtabWarning,
                stacklevel=1,
            )
    settings = {"tasks": names, "limit": args.limit, "strategy": fused.strategy.to_dict(), "speculation": speculation}
    settings |= asked.to_dict() | {"batch_size": args.batch_size}
    document = output.document(found, settings, args.seed, "lm_eval")
    output.emit(args.json, document, lambda: show(found, speculation))


def take_directory_from_template(args: argparse.Namespace) -> None:
    """`--apply-chat-template DIR`: argparse takes the directory for the template's name."""
    name = args.apply_chat_template
    if args.model is None and not options.is_inline(args) and isinstance(name, str) and Path(name).is_dir():
        args.model, args.apply_chat_template = name, True


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


def write_zoo_tasks(
    folder: Path, names: Sequence[str], limit: int | None, seed: int, has_examples: bool = False
) -> dict[str, str]:
    """The task files of those names that are the zoo's; returns name -> the harness's name.

    has_examples    whether few-shot examples are asked for: they come from the training items
    """
    from trimtab import zoo
    from trimtab.measure.lm_eval_export import PREFIX, write_tasks

    short = {name: name.removeprefix(PREFIX) for name in names}
    mine = {name: task for name, task in short.items() if task in zoo.TASKS}
    items = {task: zoo.load_items(task, "test", limit=limit, seed=seed) for task in mine.values()}
    examples = {task: zoo.load_items(task, "train", limit=EXAMPLES, seed=seed) for task in items if has_examples}
    written = write_tasks(folder, zoo.TASKS, items, examples)
    return {name: written[task] for name, task in mine.items()}


def evaluate(
    fused: Any,
    names: Sequence[str],
    folder: Path,
    limit: int | None,
    seed: int,
    batch_size: int | str,
    asked: Prompting,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of a fused model on tasks of the zoo and of the harness.

    folder    where the task files of this run are written
    asked     how prompts are made of items
    returns   {task: {"items", "num_fewshot", "metrics": {name: {"score", "interval"}}}}; scores are in points of 100
              where the harness gives a share, with a 95% interval where it gives a value per item. And what drafts did
              in the batches of generated answers, see `summed`
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from requests import RequestException

    from trimtab import zoo
    from trimtab.logits.lm_eval import TrimtabLM
    from trimtab.logits.speculation.report import summed
    from trimtab.models.references import http_error

    mine = write_zoo_tasks(folder, names, limit, seed, has_examples=bool(asked.num_fewshot))
    needs_defaults = len(mine) < len(names)
    manager = TaskManager(include_path=str(folder), include_defaults=needs_defaults)
    tasks = {name: mine.get(name, name) for name in names}
    unknown = [name for name, task in tasks.items() if not manager.match_tasks([task])]
    if unknown:
        error = unknown_name("task", unknown[0], zoo.TASKS)
        raise UnknownName(error.found, f"{error.expected} Beside them what `lm-eval ls tasks` lists.", error.fix)
    name = asked.chat_template if isinstance(asked.chat_template, str) else None
    model = TrimtabLM(fused, batch_size=batch_size, template_name=name, chat_template_args=dict(asked.values))
    try:
        done = simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            num_fewshot=asked.num_fewshot,
            system_instruction=asked.system,
            apply_chat_template=asked.chat_template is not None,
            fewshot_as_multiturn=asked.is_multiturn,
            gen_kwargs=None if asked.generation is None else dict(asked.generation),
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
        back.get(task, task): {
            "num_fewshot": done["n-shot"].get(task),
            **_metrics(values, done["samples"].get(task, []), seed),
        }
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
    return f"drafts: {stood} of {drafted} tokens were accepted, in {speculation['rounds']} rounds"
