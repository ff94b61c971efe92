"""Talk with a fused model; answers stream. /reset forgets what was said, /quit ends.

What was said before is part of the next prompt as long as the members can read it; then the oldest turns are dropped,
and a line on stderr says so. Works with piped input too: one message per line.
"""

import argparse
import sys
from typing import Any

from trimtab.cli import options, output

EXAMPLE = "trimtab chat --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, sampling, strategy."""
    options.add_directory(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message that opens every conversation")
    options.add_sampling(parser)
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """Read a message, stream the answer, until /quit or the end of stdin."""
    fused = options.open_fused(args)
    sampling, stops = options.sampling_of(args), options.stops_of(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    if sys.stdin.isatty():
        print("/quit ends, /reset forgets what was said.", file=sys.stderr)
    messages: list[dict[str, str]] = list(opening)
    said: list[dict[str, str]] = []
    while (line := read_line()) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
            print("forgotten.", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            encoded = encode_within(fused, messages, len(opening), args.max_new_tokens)
            text = answer(fused, encoded, stops, sampling, is_silent=args.json)
            messages.append({"role": "assistant", "content": text})
            said += messages[-2:]
    if args.json:
        settings = {"strategy": fused.strategy.to_dict(), "system": args.system, "stop": stops, **sampling}
        output.emit(True, output.document(said, settings, args.seed), lambda: None)


def read_line() -> str | None:
    """The next message; None at the end of input. The prompt sign stands on stderr, and only on a terminal."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def encode_within(fused: Any, messages: list[dict[str, str]], num_opening: int, max_new_tokens: int) -> dict[str, Any]:
    """The conversation as tokens; drops its oldest turns from `messages` while there is no room for an answer."""
    dropped = 0
    while True:
        encoded: dict[str, Any] = dict(fused.encode([messages]))
        longest = max(ids.shape[-1] for name, ids in encoded.items() if name.endswith("ids"))
        limit = fused.config.max_position_embeddings
        if not limit or longest + max_new_tokens <= limit or len(messages) <= num_opening + 1:
            break
        del messages[num_opening : num_opening + 2]
        dropped += 1
    if dropped:
        print(f"warning: the {dropped} oldest turns no longer fit and were dropped.", file=sys.stderr)
    return encoded


def answer(fused: Any, encoded: dict[str, Any], stops: list[str], sampling: dict[str, Any], is_silent: bool) -> str:
    """One answer, shown while it is written."""
    import torch
    from transformers import TextStreamer

    streamer = None if is_silent else TextStreamer(fused.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        token_ids = fused.generate(**encoded, streamer=streamer, **options.stopping(fused.tokenizer, stops), **sampling)
    written = token_ids[0, encoded["input_ids"].shape[1] :]
    return options.cut(str(fused.tokenizer.decode(written, skip_special_tokens=True)), stops).strip()
