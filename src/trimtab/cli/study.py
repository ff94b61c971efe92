"""Run a study on the embedded zoo: what is measured, with intervals, tables, pictures and a page."""

import argparse

from trimtab.cli import output
from trimtab.core.errors import TrimtabError
from trimtab.studies import Tools, find_study, known_studies

EXAMPLE = "trimtab study task_arithmetic --items 10 --seeds 0 --pairs far"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per study, with the study's own options."""
    names = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name in known_studies():
        study = find_study(name)
        promise = (study.__doc__ or "").strip()
        description = f"{promise}\n\nexample:\n  {study.EXAMPLE}"
        child = names.add_parser(name, help=promise.splitlines()[0], description=description)
        study.add_arguments(child)
        output.add_common(child)


def run(args: argparse.Namespace) -> None:
    """Run the study that was named."""
    run_study(args.study, args)


def run_study(name: str, args: argparse.Namespace) -> None:
    """Run a study, print what it found, and fail where it says so."""
    with output.progress() as advance:
        outcome = find_study(name).run(args, Tools(advance, lambda path: output.claim(path, args.force)))
    output.emit(args.json, outcome.document, lambda: output.show(outcome.shown))
    if outcome.failure:
        raise TrimtabError(outcome.failure, fix="see the figures above.")
