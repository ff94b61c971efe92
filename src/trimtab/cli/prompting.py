"""Options that say what is to be continued: prompts read exactly as they were written, and conversations."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trimtab.cli import options
from trimtab.core.errors import InputError

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
Prompt = str | list[dict[str, Any]]  # a text, or a conversation


def add_template_arguments(group: Any) -> None:
    """--template-arg, for an option group of any command that renders conversations."""
    group.add_argument(
        "--template-arg",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the chat template, such as enable_thinking=false; read as JSON if possible, else as text",
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """PROMPT arguments, and --escapes."""
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to continue, read as it is")
    parser.add_argument(
        "-e", "--escapes", action="store_true", help="in prompts, \\n is a line break, \\t a tab, \\\\ a backslash"
    )


def add_conversation(parser: argparse.ArgumentParser, is_always: bool = False) -> None:
    """What the chat template is given; `is_always` for commands that know nothing but conversations."""
    group = parser.add_argument_group("conversation", "as transformers' apply_chat_template takes it")
    if not is_always:
        group.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    group.add_argument("--system", metavar="TEXT", help="a system message that opens every conversation")
    group.add_argument("--tools", metavar="FILE", type=Path, help="tools that the model may call: a JSON list")
    add_template_arguments(group)
    if not is_always:
        group.add_argument(
            "--continue-final-message",
            action="store_true",
            help="continue the last message of a conversation; an assistant's is always continued",
        )


def template_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `encode`: what --tools, --template-arg and --continue-final-message say."""
    found = variables_of(args.template_arg)
    if args.tools is not None:
        found["tools"] = _tools(args.tools)
    if getattr(args, "continue_final_message", False):
        found["continue_final_message"] = True
    return found


def variables_of(texts: list[str]) -> dict[str, Any]:
    """What --template-arg says; values are JSON where they can be read as such, else texts."""
    found: dict[str, Any] = {}
    for text in texts:
        name, value = options.named(text, "--template-arg")
        if not name.isidentifier():
            raise InputError(f"--template-arg {text} cannot be read.", "Expected: NAME=VALUE.", "correct the name.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _tools(file: Path) -> list[Any]:
    try:
        tools = json.loads(_decoded(file.read_bytes(), str(file)))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.", fix="pass a JSON file with a list of tools.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no JSON: {error.msg}.", fix="write a list of tools.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(
            f"{file} holds no list of tools.",
            'Expected: [{"type": "function", "function": {"name": ...}}, ...].',
            "put the tools into a list.",
        )
    return tools


def as_asked(args: argparse.Namespace, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts as conversations where --chat asks for it, opened by --system.

    raises    InputError for options of conversations where there is none
    """
    talks = [[{"role": "user", "content": p}] if args.chat and isinstance(p, str) else p for p in prompts]
    given = {
        "--system": args.system,
        "--tools": args.tools,
        "--template-arg": args.template_arg,
        "--continue-final-message": args.continue_final_message,
    }
    asked = [name for name, value in given.items() if value]
    if asked and any(isinstance(talk, str) for talk in talks):
        raise InputError(
            f"{asked[0]} was given, but a prompt is a text.",
            "It is for conversations.",
            'add --chat, or use "messages".',
        )
    return [talk if isinstance(talk, str) else opened(talk, args.system) for talk in talks]


def opened(talk: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """A conversation with a system message first; raises InputError where it has one already."""
    if system is None:
        return talk
    if talk and talk[0].get("role") == "system":
        raise InputError("--system was given, but a conversation opens with a system message.", fix="keep one of them.")
    return [{"role": "system", "content": system}, *talk]


def prompts_from(args: argparse.Namespace, file: Path | None = None) -> list[Prompt]:
    """Prompts from the command line, else from a JSONL file, else one per line of a piped stdin.

    Lines end at a line feed (or carriage return and line feed) and nowhere else. Empty lines hold no prompt; everything
    else in a line belongs to it.
    """
    if args.prompts and file:
        raise InputError("prompts were given both as arguments and as a file.", fix="give one or the other.")
    if file is not None and args.escapes:
        raise InputError("--escapes was given with --file.", "JSON has escapes of its own.", "leave --escapes out.")
    if file is not None:
        return _prompts_of(file)
    if not args.prompts and sys.stdin.isatty():
        raise InputError("no prompt was given.", fix='add one: "Q: ...", or pipe one per line, or --file F.jsonl.')
    texts = list(args.prompts) or [line for line in lines_of_stdin() if line]
    if args.escapes:
        return [unescaped(text) for text in texts]
    if args.prompts and any("\\n" in text for text in texts):
        print("note: a prompt holds \\n and is read as it is; --escapes reads it as a line break.", file=sys.stderr)
    return texts


def unescaped(text: str) -> str:
    """The text with \\n, \\t and \\\\ read as a line break, a tab and a backslash; other backslashes stay."""
    made, at = [], 0
    while at < len(text):
        pair = text[at : at + 2]
        made.append(ESCAPES.get(pair, text[at]))
        at += 2 if pair in ESCAPES else 1
    return "".join(made)


def lines_of_stdin() -> list[str]:
    """The lines of stdin as they were sent: UTF-8, with or without a byte-order mark."""
    stream = getattr(sys.stdin, "buffer", None)
    return lines_in(_decoded(stream.read(), "stdin") if stream is not None else sys.stdin.read())


def lines_in(text: str) -> list[str]:
    """Lines that end with a line feed, or with carriage return and line feed; str.splitlines knows seven more ends."""
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{what}, line {line} is no UTF-8: byte {content[error.start]:#04x}.",
            "Prompts are read as UTF-8.",
            "convert it, for example with iconv.",
        ) from error


def _prompts_of(file: Path) -> list[Prompt]:
    try:
        lines = lines_in(_decoded(file.read_bytes(), str(file)))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error}.", fix="pass a text file of one JSON object per line."
        ) from error
    return [_prompt_of(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _prompt_of(file: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number} is no JSON: {error.msg}.", fix="write one object per line.") from error
    prompt: Any = row.get("prompt", row.get("messages")) if isinstance(row, dict) else row
    is_talk = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
    if not isinstance(prompt, str) and not is_talk:
        raise InputError(
            f'{file}, line {number} has no "prompt" and no "messages".',
            fix='write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} per line.',
        )
    found: Prompt = prompt
    return found
