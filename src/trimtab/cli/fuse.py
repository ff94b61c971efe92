"""Write a fused model: references to strong, base and experts, the strategy and the tokenizer, as one directory.

No weights are copied. The directory opens with `AutoModelForCausalLM.from_pretrained` once `FusedCausalLM` is imported
from trimtab.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.cli import options, output

EXAMPLE = "trimtab fuse --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts -o runs/facts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Members, strategy, and where to write."""
    options.add_members(parser)
    options.add_strategy(parser, has_directory=False)
    options.add_speculation(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the directory to write")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="load all members and compare what they compute, as the first opening does",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: argparse.Namespace) -> None:
    """Compare the members by their files, so that what does not fit is said now, and write the directory."""
    members = options.members_of(args)
    strategy = options.strategy_of(args, tuple(members["experts"]))
    options.quiet_transformers()
    folder = output.check_folder(args.output, args.force)
    if args.probe:
        from trimtab import FusedCausalLM

        fused = FusedCausalLM.from_members(**members, strategy=strategy, **options.one_pass_of(args))
        options.set_speculation(args, fused)
        fused.save_pretrained(folder)
    else:
        from trimtab.logits.writing import write_fused

        drafts = options.speculation_of(args, options.AUTO)
        given: dict[str, Any] = {
            name: value
            for name, value in zip(("speculate", "speculate_draft"), drafts, strict=True)
            if value is not None
        }
        write_fused(folder, **members, strategy=strategy, **options.one_pass_of(args), **given)
    settings = {**{name: members[name] for name in ("strong", "base", "experts")}, "strategy": strategy.to_dict()}
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result = {
        "directory": str(folder),
        "files": sorted(file.name for file in folder.iterdir()),
        "vocab_size": written["vocab_size"],
        "vocabulary": written.get("vocabulary"),
    }
    output.emit(args.json, output.document(result, settings), lambda: show(result, settings))


def show(result: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Where it is, what it is, and what to do next."""
    folder, strategy = result["directory"], settings["strategy"]
    print(f"{folder}: {settings['strong']} + {strategy['amount']} of {', '.join(settings['experts'])}")
    print(f"vocabulary: {result['vocab_size']} tokens; other rows of the members are cut")
    print(f'next: trimtab generate {folder} "..."   or   trimtab explain {folder} "..."')
