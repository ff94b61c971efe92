"""argparse with the house's errors: what was found, what was expected, the nearest spelling."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from trimtab.cli import methods, output
from trimtab.cli.commands import COMMANDS, GROUPS, Command, load_command
from trimtab.core.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of leaving the process, and proposes near spellings."""

    passes_on = False  # whether words that no option takes are kept as `passed_on`, for another program

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}.", fix=f"see `{self.prog} --help`.")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """All arguments; an unknown option is answered with the nearest known one."""
        if self.passes_on:
            args, rest = self.parse_known_args(argv)
            args.passed_on = rest
            return args
        argv, given = self._without_settings(argv)
        args = self._parse_known(argv)
        if given:
            args.set = [*args.set, *given]
        return args

    def _without_settings(self, argv: Sequence[str]) -> tuple[Sequence[str], list[str]]:
        """The words without `--NAME VALUE` of settings, if the command chooses methods, and these as NAME=VALUE."""
        families = self.get_default("families")
        options = (word.split("=")[0] for word in argv if word.startswith("--") and word != "--")
        if not families or all(option in self._option_string_actions for option in options):
            return argv, []  # settings are described by the methods' own modules, which take a second to import
        names = methods.names_of_settings(families)
        return methods.without_settings(argv, {name for name in names if not self._takes(methods.flag_of(name))})

    def _takes(self, flag: str) -> bool:
        return flag in self._option_string_actions

    def _parse_known(self, argv: Sequence[str]) -> argparse.Namespace:
        known = {option for parser in _family(self) for option in parser._option_string_actions}
        for word in itertools.takewhile(lambda word: word != "--", argv):
            if word.startswith("--") and word.split("=")[0] not in known:
                raise self._unknown("option", word.split("=")[0], known)  # before argparse misses required ones
        # Prompts may stand before and after options; argparse can only do that where there are no subcommands.
        has_children = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        args, unknown = (self.parse_known_args if has_children else self.parse_known_intermixed_args)(argv)
        if unknown:
            raise self._unknown("option" if unknown[0].startswith("-") else "argument", unknown[0], known)
        return args

    def _unknown(self, kind: str, found: str, known: set[str]) -> InputError:
        families = self.get_default("families")
        flags = {methods.flag_of(name) for name in methods.names_of_settings(families)} if families else set()
        near = get_close_matches(found, sorted(known | flags), n=1)
        return InputError(
            f"{self.prog} has no {kind} {found}.",
            fix=f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`.",
        )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Defaults are printed where a help text does not name them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_default = not (action.default is False or action.default in (None, argparse.SUPPRESS, [], ()))
        return f"{text} (default: %(default)s)" if has_default and action.option_strings else text


def _family(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _family(child)


def command_parser(name: str, command: Command | None = None) -> Parser:
    """The parser of one command, opening with its promise and an example."""
    command = command or load_command(name)
    promise = (command.__doc__ or "").strip()
    description = f"{promise}\n\nexample:\n  {command.EXAMPLE}"
    parser = Parser(prog=f"trimtab {name}", description=description)
    parser.passes_on = getattr(command, "PASSES_ON", False)
    command.add_arguments(parser)
    output.add_common(parser)
    return parser


def top_help() -> str:
    """The help of `trimtab` itself; imports no command."""
    width = max(len(name) for name in COMMANDS)
    lines = []
    for group in GROUPS:
        listed = [f"  {name:<{width}}  {line.summary}" for name, line in COMMANDS.items() if line.group == group]
        lines += [f"{group}:", *listed, ""]
    return "\n".join(
        [
            "usage: trimtab COMMAND [options]",
            "",
            "Turn a big language model with small ones, by Dynamic Logits Fusion and its neighbours.",
            "",
            "example:",
            "  trimtab demo",
            "",
            *lines,
            "options:",
            "  -h, --help  this text; `trimtab COMMAND --help` for a command's own",
            "  --version   the version of trimtab",
            "",
            "Every command takes --json (one document on stdout) and --debug (tracebacks).",
            "Exit codes: 0 done, 1 failed for a stated reason, 2 wrong usage or input, 130 interrupted.",
        ]
    )
