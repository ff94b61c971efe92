"""Talk with a fused model; answers stream. /reset forgets what was said, /quit ends.

What was said before is part of the next prompt as long as the members can read it; then the oldest turns are dropped,
and a line on stderr says so. Works with piped input too: one message per line.
"""

import argparse
import io
import sys
from typing import Any

from trimtab.cli import options, output, prompting, sampling
from trimtab.core.errors import InputError

EXAMPLE = "trimtab chat --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, sampling, strategy."""
    options.add_directory(parser)
    prompting.add_conversation(parser, is_always=True)
    sampling.add_sampling(parser)
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """Read a message, stream the answer, until /quit or the end of stdin."""
    chat = prompting.template_arguments(args)
    fused = options.open_fused(args)
    drawing, stops = sampling.sampling_of(args, fused), sampling.stops_of(args)
    opening = prompting.opened([], args.system)
    if sys.stdin.isatty():
        print("/quit ends, /reset forgets what was said.", file=sys.stderr)
    elif isinstance(sys.stdin, io.TextIOWrapper):  # piped: lines as they were sent
        sys.stdin.reconfigure(encoding="utf-8", newline="\n")
    messages: list[dict[str, str]] = list(opening)
    said: list[dict[str, str]] = []
    while (line := read_line()) is not None:
        if line.strip() == "/quit":
            break
        if line.strip() == "/reset":
            messages = list(opening)
            print("forgotten.", file=sys.stderr)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            encoded = encode_within(fused, messages, len(opening), drawing["max_new_tokens"], chat)
            text = answer(fused, encoded, stops, drawing, is_silent=args.json)
            messages.append({"role": "assistant", "content": text})
            said += messages[-2:]
    if args.json:
        settings = {"strategy": fused.strategy.to_dict(), "system": args.system, "template": chat, "stop": stops}
        settings |= drawing
        output.emit(True, output.document(said, settings, args.seed), lambda: None)


def read_line() -> str | None:
    """The next message as it was typed; None at the end of input. A terminal gets a prompt sign, on stderr."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise InputError("a message is no UTF-8.", "Messages are read as UTF-8.", "convert the input.") from error
    return line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff") if line else None


def encode_within(
    fused: Any, messages: list[dict[str, str]], num_opening: int, max_new_tokens: int, chat: dict[str, Any]
) -> dict[str, Any]:
    """The conversation as tokens; drops its oldest turns from `messages` while there is no room for an answer."""
    dropped = 0
    while True:
        encoded: dict[str, Any] = dict(fused.encode([messages], **chat))
        longest = max(ids.shape[-1] for name, ids in encoded.items() if name.endswith("ids"))
        limit = fused.config.max_position_embeddings
        if not limit or longest + max_new_tokens <= limit or len(messages) <= num_opening + 1:
            break
        del messages[num_opening : num_opening + 2]
        dropped += 1
    if dropped:
        print(f"warning: the {dropped} oldest turns no longer fit and were dropped.", file=sys.stderr)
    return encoded


def answer(fused: Any, encoded: dict[str, Any], stops: list[str], drawing: dict[str, Any], is_silent: bool) -> str:
    """One answer, shown while it is written."""
    import torch
    from transformers import TextStreamer

    streamer = None if is_silent else TextStreamer(fused.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        ends = sampling.stopping(fused.tokenizer, stops)
        token_ids = fused.generate(**encoded, streamer=streamer, **ends, **drawing)
    written = token_ids[0, encoded["input_ids"].shape[1] :]
    return sampling.cut(str(fused.tokenizer.decode(written, skip_special_tokens=True)), stops).strip()
