"""The whole story on the embedded zoo: what small experts teach a strong model that is never trained.

Every task with its own expert, all experts at once, and a task that none of them knows; each strategy beside the small
expert alone, static alphas, plain ensembles and the ceiling, with intervals and paired tests. Writes a report folder.
Short for `trimtab study dlf --quick` with one pair and one draw of items.
"""

import argparse
from pathlib import Path

from trimtab.cli.study import run_study
from trimtab.studies.options import positive

EXAMPLE = "trimtab demo --items 40"
REPORTS = Path("reports")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, which items, where to write."""
    parser.add_argument("--pair", choices=("far", "close"), default="far", help="how much smaller the small model is")
    parser.add_argument("--items", type=positive, default=200, metavar="N", help="test items per task")
    parser.add_argument("--seed", type=int, default=0, help="which items, and the draws of the intervals")
    parser.add_argument("--tasks", metavar="NAMES", help="comma-separated; all tasks of the zoo by default")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="report folder (default: reports/demo-PAIR; none with --json)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: argparse.Namespace) -> None:
    """Run the study in its quick form."""
    folder = args.output or (None if args.json else REPORTS / f"demo-{args.pair}")
    asked = {"pairs": args.pair, "seeds": str(args.seed), "quick": True, "redraw": False, "update_readme": None}
    run_study("dlf", argparse.Namespace(**{**vars(args), **asked, "output": folder}))
