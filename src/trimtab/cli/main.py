"""The entry point: finds the command, runs it, and turns what went wrong into a message and an exit code."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from trimtab import __version__
from trimtab.cli.commands import load_command
from trimtab.cli.parser import command_parser, top_help
from trimtab.core.errors import InputError, TrimtabError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    argv      words after `trimtab`; those of the process by default
    returns   0 done, 1 failed for a stated reason, 2 wrong usage or input, 130 interrupted
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debugging = "--debug" in words
    try:
        with _plain_warnings():
            _dispatch(words)
            sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse's own --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _complain("interrupted.", is_debugging)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout left (`trimtab list | head`): nobody to tell, and the flush at exit must not try.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TrimtabError as error:
        _complain(f"{type(error).__name__}: {error}", is_debugging)
        return error.exit_code
    except Exception as error:
        hint = (
            "" if is_debugging else "\n  This was not foreseen. Fix: run again with --debug and report the traceback."
        )
        _complain(f"{type(error).__name__}: {error}{hint}", is_debugging)
        return 1


def _dispatch(words: list[str]) -> None:
    if not words:
        print(top_help(), file=sys.stderr)
        raise InputError("no command was given.", fix="for example `trimtab demo`.")
    if words[0] in ("-h", "--help", "help"):
        print(top_help())
    elif words[0] == "--version":
        print(__version__)
    elif words[0].startswith("-"):
        raise InputError(f"trimtab has no option {words[0]}.", "A command comes first.", "see `trimtab --help`.")
    else:
        command = load_command(words[0])
        command.run(command_parser(words[0], command).parse_all(words[1:]))


def _complain(message: str, is_debugging: bool) -> None:
    if is_debugging:
        traceback.print_exc()
    print(message, file=sys.stderr)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the source line; what libraries tell their callers is not for users."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            return
        print(f"warning: {message}", file=file or sys.stderr)

    usual = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


if __name__ == "__main__":
    sys.exit(main())
