"""Continue prompts with a fused model: given as arguments, as JSONL, or one per line on stdin.

Only the continuation is printed, without the prompt. Prompts run in one batch, and are read as they are written. A
conversation that ends with the assistant's turn is continued.
"""

import argparse
from pathlib import Path
from typing import Any

from trimtab.cli import options, output, prompting, sampling
from trimtab.core.errors import InputError

EXAMPLE = (
    "trimtab generate --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts "
    '--chat "Where does Ada Moss live?"'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, sampling, strategy."""
    options.add_directory(parser)
    prompting.add_prompts(parser)
    parser.add_argument(
        "--file",
        type=Path,
        metavar="JSONL",
        help='prompts from a file of {"prompt": "..."} or {"messages": [...]} lines',
    )
    prompting.add_conversation(parser)
    parser.add_argument("--samples", type=options.positive, default=1, metavar="N", help="continuations per prompt")
    sampling.add_sampling(parser)
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """All prompts as one batch; continuations in the order of the prompts."""
    take_prompt_from_model(args)
    options.check_pointed(args)
    prompts = prompting.prompts_from(args, args.file)
    asked, chat = prompting.as_asked(args, prompts), prompting.template_arguments(args)
    fused = options.open_fused(args)
    drawing = sampling.sampling_of(args, fused)
    if args.samples > 1 and not drawing["do_sample"]:
        raise InputError(
            f"--samples {args.samples} was given without a temperature.",
            "At temperature 0 all continuations are the same.",
            "add --temperature 1.",
        )
    stops = sampling.stops_of(args)
    texts = continuations(fused, asked, chat, args.samples, stops, drawing)
    result = [{"prompt": prompt, "texts": found} for prompt, found in zip(prompts, texts, strict=True)]
    settings = {
        "strategy": fused.strategy.to_dict(),
        "chat": args.chat,
        "system": args.system,
        "template": chat,
        "samples": args.samples,
        "stop": stops,
        "speculation": fused.last_speculation.to_dict(),
        **drawing,
    }
    output.emit(args.json, output.document(result, settings, args.seed), lambda: show(texts))


def take_prompt_from_model(args: argparse.Namespace) -> None:
    """With members inline there is no DIR: what argparse took for one is the first prompt."""
    if args.model is not None and options.is_inline(args):
        args.prompts = [args.model, *args.prompts]
        args.model = None


def continuations(
    fused: Any,
    prompts: list[prompting.Prompt],
    chat: dict[str, Any],
    samples: int,
    stops: list[str],
    drawing: dict[str, Any],
) -> list[list[str]]:
    """For each prompt its continuations as text.

    chat      arguments of the chat template, see `FusedCausalLM.encode`
    drawing   arguments of `generate`
    """
    import torch

    encoded = fused.encode(prompts, **chat)
    ends = sampling.stopping(fused.tokenizer, stops)
    with torch.inference_mode():
        token_ids = fused.generate(**encoded, num_return_sequences=samples, **ends, **drawing)
    written = token_ids[:, encoded["input_ids"].shape[1] :]
    texts = [sampling.cut(text, stops) for text in fused.tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def show(texts: list[list[str]]) -> None:
    """One continuation after the other."""
    for found in texts:
        for text in found:
            print(text.strip("\n"))
