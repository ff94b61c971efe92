"""Everything that trimtab raises on purpose.

    TrimtabError                     exit code 1: a stated reason, one message, no traceback
      NumericalError                 a member produced NaN, or a distribution that cannot be normalised
      InputError                     exit code 2: what came in cannot be used
        UnknownName                  a strategy, task, member or setting that does not exist
        BadSetting                   a setting out of its range or of the wrong type
        VocabularyMismatch           members whose ids do not mean the same tokens
        MemberMismatch               members that cannot stand together (no base, unrelated expert, ...)
        ContextTooLong               more tokens than a member can read
        EmptyPrompt                  nothing to continue
        UnreadableModel              a file or directory that is no model, or is damaged
          MissingPackage             a model that needs a package which is not installed
        OfflineError                 a reference that needs the network, which is switched off or away

Each message has three lines: what was found, what was expected, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TrimtabError(Exception):
    """A failure with a stated reason: what was found, what was expected, what to do about it."""

    exit_code = 1

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        lines = [found, f"  {expected}" if expected else "", f"  Fix: {fix}" if fix else ""]
        super().__init__("\n".join(line for line in lines if line))


class TrimtabWarning(UserWarning):
    """Something works, but not as it may seem: the message says what is lost."""


class NumericalError(TrimtabError):
    """A member produced NaN, or a distribution that cannot be normalised."""


class InputError(TrimtabError):
    """What came in cannot be used; the caller can mend it."""

    exit_code = 2


class UnknownName(InputError):
    """A strategy, task, member or setting that does not exist."""


class BadSetting(InputError):
    """A setting out of its range or of the wrong type."""


class VocabularyMismatch(InputError):
    """Members whose ids do not mean the same tokens."""


class MemberMismatch(InputError):
    """Members that cannot stand together."""


class ContextTooLong(InputError):
    """More tokens than a member can read."""


class EmptyPrompt(InputError):
    """Nothing to continue."""


class UnreadableModel(InputError):
    """A file or directory that is no model, or is damaged."""


class MissingPackage(UnreadableModel):
    """A model that needs a package which is not installed; the message has the line for pip."""


class OfflineError(InputError):
    """A reference that needs the network, which is switched off or away."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that is not in a table, with the nearest spelling that is."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    fix = f"did you mean '{near[0]}'?" if near else f"choose one of the {kind} names above."
    return UnknownName(f"there is no {kind} '{name}'.", f"Known: {', '.join(names)}.", fix)


READ_ON = ("For more information", "For more details")  # of HTTP libraries and the hub's


def lines_of(error: BaseException) -> list[str]:
    """What a foreign error says, without blank lines and links to read on; its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line and not line.startswith(READ_ON)] or [type(error).__name__]


def last_line(error: BaseException) -> str:
    """The end of what a foreign error says: of a long one from another process the only part that is its own."""
    return lines_of(error)[-1]
