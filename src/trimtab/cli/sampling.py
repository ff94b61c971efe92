"""Options that say how texts are drawn; what no flag says follows from the model's generation_config.json."""

import argparse
from typing import Any

from trimtab.cli.options import not_negative, positive, share
from trimtab.cli.prompting import unescaped
from trimtab.core.errors import InputError

MAX_NEW_TOKENS = 64  # where neither a flag nor the model's settings name a length


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Length and randomness of what is generated."""
    group = parser.add_argument_group(
        "generation", "by default as the model's generation_config.json says; greedy where that says nothing"
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        help=f"longest answer, in tokens; {MAX_NEW_TOKENS} where the model's settings name none",
    )
    group.add_argument("--temperature", type=not_negative, help="0 takes the likeliest token")
    group.add_argument("--top-p", type=share, metavar="SHARE", help="sample among the likeliest tokens of this mass")
    group.add_argument("--top-k", type=positive, metavar="N", help="sample among the N likeliest tokens")
    group.add_argument(
        "--repetition-penalty", type=above_0, metavar="X", help="above 1 makes tokens of the text so far less likely"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the sampling: gives the same texts on the same machine. For that `--speculate auto` samples with "
        "drafts of 4 tokens, or none, by the members' sizes",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer before this text; \\n is a line break, \\\\ a backslash",
    )


def sampling_of(args: argparse.Namespace, fused: Any) -> dict[str, Any]:
    """Keyword arguments for `generate`; sets torch's seed where something is drawn, which then repeats.

    What is in effect is named, so that a document of results says it, be it the model's setting or a flag's.
    """
    settings = fused.generation_config
    draws = bool(settings.do_sample) if args.temperature is None else args.temperature > 0
    found: dict[str, Any] = {"do_sample": draws, "max_new_tokens": _length(args, settings)}
    if args.repetition_penalty is not None:
        found["repetition_penalty"] = args.repetition_penalty
    if not draws:
        if args.top_p is not None or args.top_k is not None:
            raise InputError(
                "--top-p or --top-k was given without a temperature.",
                "At temperature 0 the likeliest token is taken, and they change nothing.",
                "add --temperature 1.",
            )
        return found
    import torch

    torch.manual_seed(args.seed)
    # A flag names the whole of what is drawn from: without one transformers would cut at its own top_k of 50.
    top_k = 0 if args.temperature is not None and settings.top_k is None else settings.top_k
    kinds = {"temperature": (args.temperature, settings.temperature), "top_p": (args.top_p, settings.top_p)}
    kinds |= {"top_k": (args.top_k, top_k)}
    found |= {name: flag if flag is not None else own for name, (flag, own) in kinds.items()}
    return {name: value for name, value in found.items() if value is not None} | {"repeatable": True}


def _length(args: argparse.Namespace, settings: Any) -> int:
    if args.max_new_tokens is not None:
        return int(args.max_new_tokens)
    return int(settings.max_new_tokens or MAX_NEW_TOKENS)


def stops_of(args: argparse.Namespace) -> list[str]:
    """The texts that end an answer."""
    stops = [unescaped(stop) for stop in args.stop]
    if not all(stops):
        raise InputError("--stop was given an empty text.", "It would end every answer at once.", "leave it out.")
    return stops


def stopping(tokenizer: Any, stops: list[str]) -> dict[str, Any]:
    """Keyword arguments for `generate` that end an answer at any of these texts."""
    return {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stops."""
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]


def above_0(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
