"""The embedded world, tasks and models: show what is there, or make it again from seeds."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.cli import output
from trimtab.cli.study import run_study
from trimtab.core.errors import TrimtabError
from trimtab.studies.regime.study import add_arguments as add_regime_arguments

EXAMPLE = "trimtab zoo info"

# Read by glibc when a process starts. Without them training loses half of its time to page faults.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """info | check | build."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="info|check|build")
    info = actions.add_parser("info", help="what is there, with sizes and checksums")
    regime = actions.add_parser("check", help="whether there is anything to transfer, on validation items")
    add_regime_arguments(regime)
    build = actions.add_parser(
        "build", help="make world, tasks and models again from seeds; goes on where it was stopped"
    )
    build.add_argument(
        "-o", "--output", type=Path, default=Path("runs/zoo"), help="folder of the new zoo; use it with TRIMTAB_ZOO=DIR"
    )
    build.add_argument("--seed", type=int, default=0, help="other seeds give other worlds")
    build.add_argument(
        "--quick", action="store_true", help="a tiny zoo in about a minute: to see that it works, not to measure"
    )
    for action in (info, regime, build):
        output.add_common(action)


def run(args: argparse.Namespace) -> None:
    if args.action == "info":
        result = inventory()
        output.emit(args.json, output.document(result), lambda: show(result))
        refuse_damage(result["damaged"])
    elif args.action == "check":
        run_study("regime", args)
    else:
        build(args)


def refuse_damage(damaged: list[str]) -> None:
    """Raise TrimtabError where files are missing or are not what the manifest says."""
    if damaged:
        raise TrimtabError(
            f"{len(damaged)} file(s) of the zoo are missing or changed: {', '.join(damaged)}.",
            "Expected: the checksums of manifest.json.",
            "install the package again, or make the zoo again with `trimtab zoo build`.",
        )


def inventory() -> dict[str, Any]:
    """The zoo in use: its folder, models with what made them, items per task and split, and damaged files."""
    from trimtab.zoo.store import check_files, read_manifest, root
    from trimtab.zoo.tasks import TASKS

    manifest, checks = read_manifest(), check_files()
    sizes = {
        name: sum(check.size_bytes for check in checks if _belongs(check.path, name)) for name in manifest["models"]
    }
    items = {
        task: {
            split: _count_lines(root() / "items" / f"{task}-{split}.jsonl") for split in ("train", "validation", "test")
        }
        for task in TASKS
    }
    return {
        "folder": str(root()),
        "seed": manifest["plan"]["seed"],
        "models": {name: {**made_by, "bytes": sizes[name]} for name, made_by in manifest["models"].items()},
        "items": items,
        "files": {check.path: manifest["files"][check.path] for check in checks},
        "bytes": sum(check.size_bytes for check in checks),
        "damaged": [check.path for check in checks if not check.is_intact],
    }


def _belongs(path: str, name: str) -> bool:
    size, _, tuned = name.partition("/")
    return path.startswith(f"models/{size}/{tuned or 'base'}/")


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def show(result: dict[str, Any]) -> None:
    """Two tables and the state of the checksums."""
    from rich.table import Table

    console = output.console()
    models = Table("member", "how", "steps", "KB", title=f"zoo of seed {result['seed']} in {result['folder']}")
    for name, model in result["models"].items():
        rank = model["recipe"]["lora_rank"]
        how = (
            f"{f'LoRA rank {rank}' if rank else 'all weights'} on {model['task']}" if model["parent"] else "pretrained"
        )
        models.add_row(f"zoo:{name}", how, str(model["recipe"]["steps"]), f"{model['bytes'] / 1024:.0f}")
    console.print(models)
    items = Table("task", "train", "validation", "test")
    for task, counts in result["items"].items():
        items.add_row(task, *(str(count) for count in counts.values()))
    console.print(items)
    damaged = result["damaged"]
    state = (
        f"{len(damaged)} files are NOT what was built: {', '.join(damaged)}" if damaged else "every checksum is right"
    )
    console.print(f"{len(result['files'])} files, {result['bytes'] / 2**20:.1f} MiB; {state}.")


def build(args: argparse.Namespace) -> None:
    """Make a zoo, or what is missing of one."""
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "trimtab", *sys.argv[1:]], {**os.environ, **_MALLOC})
    from dataclasses import asdict, replace

    from trimtab.zoo.build import QUICK_PLAN, Plan
    from trimtab.zoo.build import build as make

    plan = replace(QUICK_PLAN if args.quick else Plan(), seed=args.seed)
    with output.progress() as advance:
        manifest = make(args.output, plan, _bars(advance))
    result = {"folder": str(args.output), "models": manifest["models"]}
    done = (
        f"Made {len(manifest['models'])} models in {args.output}. Use them: export TRIMTAB_ZOO={args.output.resolve()}"
    )
    output.emit(args.json, output.document(result, asdict(plan), args.seed), lambda: print(done))


def _bars(advance: Callable[[str, int, int], None]) -> Callable[[str, int], Any]:
    @contextmanager
    def bar(what: str, steps: int) -> Iterator[Callable[[int, float], None]]:
        print(f"zoo: {what} ({steps} steps)", file=sys.stderr)
        yield lambda done, loss: advance(f"{what} loss {loss:.3f}", done, steps)

    return bar
