"""Measure both pairs on several draws of test items and write docs/results.md, with docs/results.json beside it.

Every distinct item is answered once per column, however many draws it stands in. --update-readme puts the headline
table of a results.json that is already there between the README's markers, and measures nothing.
The same as `trimtab study dlf`.
"""

import argparse

from trimtab.cli.study import run_study
from trimtab.studies.dlf import study

EXAMPLE = "trimtab results --items 20 --seeds 0,1 --pairs far -o runs/results.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the study."""
    study.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the study."""
    run_study("dlf", args)
