"""Options that choose methods of a space's families and their settings; the same for every space and command.

    --strategy dynamic --set alpha_max=1.5     one option per family, and --set for any setting of the chosen methods
    --settings FILE                            the same settings from YAML or JSON; --set wins
    --alpha-max 1.5                            short for --set alpha_max=1.5

None of these grows with the registry: `trimtab list FAMILY` has the names, `trimtab show NAME` the settings.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import InputError
from trimtab.core.registry import Family, find
from trimtab.core.settings import settings_of, texts_of_file

FORMER_FLAGS = {"--speaker": "expert"}  # settings that had a flag of another name


def add_methods(
    parser: argparse.ArgumentParser,
    title: str,
    promise: str,
    families: Sequence[Family],
    defaults: Sequence[str | None],
) -> None:
    """One option per family, --set and --settings.

    defaults    of each family: the method, or None where something else decides, such as a directory
    """
    group = parser.add_argument_group(title, promise)
    for family, default in zip(families, defaults, strict=True):
        text = f"{family.summary[0].lower()}{family.summary[1:].rstrip('.')}: see `trimtab list {family.name}s`"
        text += "" if default else "; by default that of the directory"
        group.add_argument(family.option, metavar=family.name.upper(), default=default, help=text)
    group.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the chosen methods, see `trimtab show NAME`; --NAME VALUE is short for it",
    )
    group.add_argument("--settings", metavar="FILE", type=Path, help="settings from YAML or JSON; --set wins")
    parser.set_defaults(families=tuple(families))


def chosen(args: argparse.Namespace, family: Family) -> str | None:
    """The method that was chosen for a family; None where the option was not given."""
    name: str | None = getattr(args, family.option.lstrip("-").replace("-", "_"))
    return name


def is_changed(args: argparse.Namespace) -> bool:
    """Whether any of these options was given."""
    return bool(args.set or args.settings or any(chosen(args, family) for family in args.families))


def texts_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that were given, still as texts; raises InputError for what cannot be read or was given twice."""
    found: dict[str, Any] = {}
    for word in args.set:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(
                f"--set {word[:100]} cannot be read.", "Expected: NAME=VALUE.", "for example --set alpha_max=1.5."
            )
        if name in found:
            raise InputError(f"the setting {name} was given twice.", fix="give it once.")
        found[name] = text
    return (texts_of_file(args.settings) if args.settings else {}) | found


def names_of_settings(families: Sequence[Family]) -> set[str]:
    """Every setting of every method of these families."""
    return {item.name for family in families for name in family for item in settings_of(find(family, name))}


def flag_of(setting: str) -> str:
    """The short form of --set for a setting."""
    former = {name: flag for flag, name in FORMER_FLAGS.items()}
    return former.get(setting, "--" + setting.replace("_", "-"))


def without_settings(words: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Words of a command line without `--NAME VALUE` of these settings, and the settings as NAME=VALUE.

    raises    InputError for a setting without a value
    """
    flags = {flag_of(name): name for name in names}
    left: list[str] = []
    found: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*left, word, *waiting], found
        if flag not in flags:
            left.append(word)
            continue
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise InputError(f"{flag} has no value.", f"It sets {flags[flag]}.", f"give one: {flag} VALUE.")
        found.append(f"{flags[flag]}={value}")
    return left, found
