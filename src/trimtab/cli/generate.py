"""Continue prompts with a fused model: given as arguments, as JSONL, or one per line on stdin.

Only the continuation is printed, without the prompt. Prompts run in one batch.
"""

import argparse
from pathlib import Path
from typing import Any

from trimtab.cli import options, output
from trimtab.core.errors import InputError

EXAMPLE = (
    "trimtab generate --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts "
    '--chat "Where does Ada Moss live?"'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, sampling, strategy."""
    options.add_directory(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to continue; \\n stands for a line break")
    parser.add_argument("--file", type=Path, metavar="JSONL", help='prompts from a file of {"prompt": "..."} lines')
    parser.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    parser.add_argument("--samples", type=options.positive, default=1, metavar="N", help="continuations per prompt")
    options.add_sampling(parser)
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """All prompts as one batch; continuations in the order of the prompts."""
    take_prompt_from_model(args)
    options.check_pointed(args)
    if args.samples > 1 and not args.temperature:
        raise InputError(
            f"--samples {args.samples} was given without a temperature.",
            "At temperature 0 all continuations are the same.",
            "add --temperature 1.",
        )
    prompts = options.prompts_from(args.prompts, args.file)
    fused = options.open_fused(args)
    sampling = options.sampling_of(args)
    stops = options.stops_of(args)
    texts = continuations(fused, prompts, args.chat, args.samples, stops, sampling)
    result = [{"prompt": prompt, "texts": found} for prompt, found in zip(prompts, texts, strict=True)]
    settings = {
        "strategy": fused.strategy.to_dict(),
        "chat": args.chat,
        "samples": args.samples,
        "stop": stops,
        "speculation": fused.last_speculation.to_dict(),
        **sampling,
    }
    output.emit(args.json, output.document(result, settings, args.seed), lambda: show(texts))


def take_prompt_from_model(args: argparse.Namespace) -> None:
    """With members inline there is no DIR: what argparse took for one is the first prompt."""
    if args.model is not None and options.is_inline(args):
        args.prompts = [args.model, *args.prompts]
        args.model = None


def continuations(
    fused: Any, prompts: list[str], is_chat: bool, samples: int, stops: list[str], sampling: dict[str, Any]
) -> list[list[str]]:
    """For each prompt its continuations as text."""
    import torch

    asked: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts] if is_chat else list(prompts)
    encoded = fused.encode(asked)
    with torch.inference_mode():
        token_ids = fused.generate(
            **encoded, num_return_sequences=samples, **options.stopping(fused.tokenizer, stops), **sampling
        )
    written = token_ids[:, encoded["input_ids"].shape[1] :]
    texts = [options.cut(text, stops) for text in fused.tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def show(texts: list[list[str]]) -> None:
    """One continuation after the other."""
    for found in texts:
        for text in found:
            print(text.strip("\n"))
