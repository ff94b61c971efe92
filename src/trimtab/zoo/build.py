"""Make a zoo from a seed: world, tokenizer, items, bases, experts, adapters and ceilings.

Every finished model is kept with the recipe that made it, and a long pretraining leaves checkpoints, so that a build
that was stopped goes on where it was. The same seed gives the same world and items on every machine, and the same
models up to the rounding of its arithmetic.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.core.files import write_whole
from trimtab.zoo.corpus import Corpus
from trimtab.zoo.store import MANIFEST, PREFIX, model_path, sha256
from trimtab.zoo.tasks import TASKS, TUNED_TASKS, Item, draw_items, write_items
from trimtab.zoo.tokens import VOCABULARY, train_tokenizer
from trimtab.zoo.training import Progress, Recipe, Size, make_model, pack_rows, pretrain, tune
from trimtab.zoo.world import QUICK, Sizes, World, make_world

# Opens a progress bar: (what is made, number of steps) -> context that gives the callback for each step.
Bar = Callable[[str, int], AbstractContextManager[Progress]]


# How each task is tuned, all weights; chosen on validation items. A style is unlocked in some fifty steps (longer
# tuning learns the training answers by heart and forgets the others), a skill wants more.
TUNING = (
    ("arithmetic", Recipe(300, 1e-3, 64)),
    ("facts", Recipe(60, 3e-4, 64)),
    ("truth", Recipe(60, 3e-4, 64)),
    ("summary", Recipe(250, 6e-4, 64)),
    ("mixed", Recipe(400, 6e-4, 64)),
)
LORA_RANK = {"small": 8, "strong": 16}
LORA_RATE = 4.0  # an adapter's learning rate, relative to all weights'


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a build makes."""

    seed: int = 0
    sizes: Sizes = Sizes()  # noqa: RUF009 - frozen
    vocabulary: int = VOCABULARY
    tokens: int = 11_000_000
    strong: Size = Size(256, 6)  # noqa: RUF009
    medium: Size = Size(160, 4)  # noqa: RUF009
    small: Size = Size(96, 2)  # noqa: RUF009
    rates: tuple[float, float, float] = (1.5e-3, 2e-3, 2.5e-3)  # strong, medium, small
    passes: tuple[float, float, float] = (1.0, 0.75, 1.0)  # over the corpus; the medium one is to know less
    again: Recipe | None = Recipe(1600, 2e-3, 16)  # noqa: RUF009 - the strong model's second cycle, in another order
    tuning: tuple[tuple[str, Recipe], ...] = TUNING


QUICK_PLAN = Plan(
    sizes=QUICK,
    vocabulary=600,
    tokens=300_000,
    strong=Size(64, 2),
    medium=Size(48, 2),
    small=Size(32, 1),
    again=Recipe(20, 1e-3, 16),
    tuning=tuple((task, Recipe(20, 2e-3, 16)) for task in (*TUNED_TASKS, "mixed")),
)


@dataclass(frozen=True)
class Job:
    """One model to make: a base (no parent), or a parent tuned on a task (`mixed` is all tasks at once)."""

    name: str
    recipe: Recipe
    again: Recipe | None = None  # a base's second cycle
    parent: str = ""
    task: str = ""


def jobs(plan: Plan, rows: int) -> Iterator[Job]:
    """All models of a zoo, parents first."""
    batch = 16
    for size, rate, passes in zip(("strong", "medium", "small"), plan.rates, plan.passes, strict=True):
        yield Job(size, Recipe(int(rows * passes) // batch, rate, batch), plan.again if size == "strong" else None)
        for task, recipe in plan.tuning:
            yield Job(f"{size}/{task}", _as_adapter(recipe, size) if size == "strong" else recipe, None, size, task)
            if size == "small" and task != "mixed":
                yield Job(f"{size}/{task}-lora", _as_adapter(recipe, size), None, size, task)


def _as_adapter(recipe: Recipe, size: str) -> Recipe:
    return replace(recipe, learning_rate=recipe.learning_rate * LORA_RATE, lora_rank=LORA_RANK[size])


def build(folder: Path, plan: Plan, bar: Bar) -> dict[str, Any]:
    """Make what is missing of a zoo in `folder`; returns the manifest, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(plan.seed, plan.sizes)
    tokenizer = _make_tokenizer(folder, world, plan)
    items = {task: draw_items(world, task) for task in TASKS}
    for task, splits in items.items():
        for split, drawn in splits.items():
            write_items(folder / "items" / f"{task}-{split}.jsonl", drawn)
    train = {task: items[task]["train"] for task in TUNED_TASKS}
    rows = _make_rows(folder, world, tokenizer, plan, bar)
    for job in jobs(plan, len(rows)):
        _make_model(folder, job, plan, tokenizer, rows, train, bar)
    return _write_manifest(folder, plan, [job.name for job in jobs(plan, len(rows))])


def _make_tokenizer(folder: Path, world: World, plan: Plan) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer"
    if not (path / "tokenizer.json").exists():
        train_tokenizer(islice(Corpus(world, seed=1).documents(), 40_000), plan.vocabulary).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _make_rows(folder: Path, world: World, tokenizer: PreTrainedTokenizerFast, plan: Plan, bar: Bar) -> torch.Tensor:
    """The pretraining rows, kept beside the zoo until the build is complete."""
    path = folder / "rows.safetensors"
    if not path.exists():
        with bar("corpus", 1) as progress:
            save_file({"rows": pack_rows(Corpus(world), tokenizer, plan.tokens)}, path)
            progress(1, 0.0)
    return load_file(path)["rows"]


def _make_model(
    folder: Path,
    job: Job,
    plan: Plan,
    tokenizer: PreTrainedTokenizerFast,
    rows: torch.Tensor,
    train: dict[str, list[Item]],
    bar: Bar,
) -> None:
    """Make one model unless the same recipe has made it already."""
    path = model_path(job.name, folder)
    receipt = path / "built.json"
    made_by = {**asdict(job), "seed": plan.seed}
    if receipt.exists() and {**json.loads(receipt.read_text()), "seconds": None} == {**made_by, "seconds": None}:
        return
    started = time.monotonic()
    if job.parent:
        model = AutoModelForCausalLM.from_pretrained(model_path(job.parent, folder), dtype=torch.float32)
        items = train[job.task] if job.task in train else [item for drawn in train.values() for item in drawn]
        with bar(job.name, job.recipe.steps) as progress:
            tuned = tune(model, tokenizer, items, job.recipe, seed=plan.seed, progress=progress)
    else:
        tuned = _make_base(folder, job, plan, tokenizer, rows, bar)
    tuned.to(torch.bfloat16)
    if job.recipe.lora_rank:
        tuned.peft_config["default"].base_model_name_or_path = PREFIX + job.parent
        tuned.save_pretrained(path, save_embedding_layers=False)  # "auto" would look for zoo:NAME on a hub
    else:
        tokenizer.save_pretrained(path)
        tuned.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)  # peft's empty model card
    write_whole(receipt, json.dumps({**made_by, "seconds": round(time.monotonic() - started, 1)}, indent=2) + "\n")


def _make_base(
    folder: Path, job: Job, plan: Plan, tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, bar: Bar
) -> LlamaForCausalLM:
    """A base, pretrained in one cycle or two; a finished first cycle is kept until the second is done."""
    base = make_model(getattr(plan, job.name), tokenizer, plan.seed)
    first = folder / f"{job.name}.first-cycle"
    if first.exists():
        base = LlamaForCausalLM.from_pretrained(first, dtype=torch.float32)
    else:
        with bar(job.name, job.recipe.steps) as progress:
            checkpoint = folder / f"{job.name}.checkpoint"
            pretrain(base, rows, job.recipe, seed=plan.seed, progress=progress, checkpoint=checkpoint)
    if job.again:
        base.save_pretrained(first)
        with bar(f"{job.name}, second cycle", job.again.steps) as progress:
            checkpoint = folder / f"{job.name}.second-checkpoint"
            pretrain(base, rows, job.again, seed=plan.seed + 1, progress=progress, checkpoint=checkpoint)
        shutil.rmtree(first)
    return base


def _write_manifest(folder: Path, plan: Plan, models: list[str]) -> dict[str, Any]:
    shipped = [
        path
        for part in ("tokenizer", "items", "models")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    ]
    manifest = {
        "plan": asdict(plan),
        "models": {name: json.loads((model_path(name, folder) / "built.json").read_text()) for name in models},
        "files": {str(path.relative_to(folder)): sha256(path) for path in shipped},
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (folder / "rows.safetensors").unlink(missing_ok=True)
    return manifest
