"""Task arithmetic: small experts merged into one, which steers the strong model, beside all experts at once.

base + scale * sum of (expert - base), one scale for all tasks, chosen on validation items of the merged model alone.
Sources: Ilharco et al. 2023, arXiv 2212.04089, section 4.2; together with logit fusion: Fan et al. 2024, arXiv
2406.15480. The control is a random vector of the same norm per tensor: if it helped as much, merging would be nothing.
"""

import copy
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from trimtab.measure.tables import Look
from trimtab.studies import Outcome, Tools
from trimtab.studies.comparing import claim_page, outcome_of, write_page
from trimtab.studies.models import SMALL_OF, Fused, StudyModels
from trimtab.studies.options import add_draws, names_of, numbers_of

EXAMPLE = "trimtab study task_arithmetic --items 10 --seeds 0 --pairs far"
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # lambda in the paper
VALIDATION_ITEMS = 60
STUDY, FIRST, WEAK, CEILING = "task_arithmetic", "dlf_merged", "mixed", "ceiling/mixed"
FUSED = {  # condition -> strategy, and the experts that it fuses; None: one for each task
    "static_merged": (Fused("static", settings={"alpha": 1.0}), ("merged",)),
    "dlf_merged": (Fused("dynamic"), ("merged",)),
    "dlf_random": (Fused("dynamic"), ("random",)),
    "static_experts": (Fused("static", "sum", {"alpha": 0.25}), None),
    "dlf_experts": (Fused("dynamic"), None),
}
LOOKS = {
    "base": Look("small base", "#cfd4d8", "reference"),
    "strong": Look("strong model, untuned", "#9aa5af", "reference"),
    "mixed": Look("small model tuned on all tasks", "#b9a27c", "reference"),
    "expert/merged": Look("merged small expert alone", "#d9b36c", "reference"),
    "dlf_random": Look("DLF, random vector of equal norm", "#c98bbf", "reference"),
    "static_merged": Look("static alpha 1, merged expert", "#7fb8e0"),
    "dlf_merged": Look("DLF, merged expert", "#e08a14", "first"),
    "static_experts": Look("static alpha 1/4, all experts", "#b8c9a3"),
    "dlf_experts": Look("DLF, all experts", "#17936a"),
    "ceiling/mixed": Look("strong model, tuned on all tasks", "#3a444d", "reference"),
}
PRINTED = "Fan et al. print that DLF is 5.7% above task arithmetic overall, and 7.2% with both together (Llama-2)."
HEAD = f"""# Task arithmetic and logit fusion

Written by `trimtab study task_arithmetic --pairs NAMES -o docs/task-arithmetic.md`; do not edit. The small experts'
task vectors are merged into one small expert, which steers the strong model.

- Scores are points of 100 on test items, in brackets 95% bootstrap intervals over items.
- The average gives the seen tasks together and the unseen one the same weight; PGR counts from the small model tuned on
  all tasks.
- {PRINTED}
"""


def add_arguments(parser: Any) -> None:
    """How much to measure, where to write."""
    add_draws(parser, 100, "0", None, "also write a page (.md), its data and pictures")


def merge(base: Any, experts: Sequence[Any], scale: float, seed: int | None = None) -> Any:
    """base + scale * sum of (expert - base); with a seed, a random vector of the same norm per tensor in its place."""
    import torch

    merged = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for name, own in merged.named_parameters():  # tied matrices once
            vector = torch.stack([expert.get_parameter(name) - own for expert in experts]).sum(dim=0)
            noise = torch.randn(own.shape, generator=generator)
            own += scale * (vector if seed is None else noise * vector.norm() / noise.norm())
    return merged


def choose_scale(models: StudyModels) -> dict[str, float]:
    """Scale -> the merged small expert's average on validation items of the seen tasks; the first is the best one."""
    from trimtab import zoo
    from trimtab.measure.evaluate import Answering

    found: dict[float, float] = {}
    experts = [models.models[f"expert/{task}"] for task in zoo.TUNED_TASKS]
    for scale in SCALES:
        models.models["expert/merged"] = merge(models.models["base"], experts, scale)
        points = []
        for name in zoo.TUNED_TASKS:
            items = zoo.load_items(name, "validation", limit=VALIDATION_ITEMS)
            answering = Answering(models.models, models.tokenizer, zoo.TASKS[name], items)
            own = answering.ask(models.alone("expert/merged"))[1]
            points.append(sum(own) / len(own))
        found[scale] = sum(points) / len(points)
    best = sorted(found, key=lambda scale: -found[scale])
    for name, seed in (("expert/merged", None), ("expert/random", 0)):
        models.models[name] = merge(models.models["base"], experts, best[0], seed)
    return {f"{scale:g}": round(found[scale], 2) for scale in best}


def measure(pair: str, limit: int, seeds: Sequence[int], tools: Tools) -> dict[str, Any]:
    """One pair: every condition on all distinct items of the draws, compared."""
    import torch

    from trimtab import zoo
    from trimtab.measure.comparison import Comparison, Parts
    from trimtab.measure.evaluate import Condition, run_conditions
    from trimtab.measure.records import points_of
    from trimtab.studies.models import distinct, draw_items, load_models

    def condition(name: str) -> Condition:
        spec, experts = FUSED.get(name, (None, ()))
        subject = models.fused(spec, experts or zoo.TUNED_TASKS) if spec else models.alone(name)
        return Condition(STUDY, name, lambda task: subject)

    models = load_models(pair)
    scales = choose_scale(models)
    items, seed_of = distinct(draw_items(list(zoo.TASKS), limit, seeds))
    told = (models.models, models.tokenizer, zoo.TASKS, items, seed_of)
    records = run_conditions([condition(name) for name in LOOKS], *told, tools.on_cell)
    groups = [zoo.TUNED_TASKS, [task for task in zoo.TASKS if task not in zoo.TUNED_TASKS]]
    rivals = [name for name in LOOKS if name not in (FIRST, CEILING, "base")]
    generator = torch.Generator().manual_seed(0)
    compared = Comparison(points_of(records, STUDY), groups, Parts(FIRST, WEAK, CEILING, rivals), generator)
    notes = f"Scale {next(iter(scales))}, the best of {len(SCALES)} on validation items."
    counts = {"num_items": {task: len(own) for task, own in items.items()}, "notes": notes, "scales": scales}
    return {**counts, **compared.describe(), "paired": compared.paired(generator)}


def run(args: Namespace, tools: Tools) -> Outcome:
    """Measure the pairs, show their tables, write the page."""
    page = claim_page(args.output, tools)
    seeds, pairs = numbers_of(args.seeds, "--seeds"), names_of(args.pairs, SMALL_OF, "pair")
    found = {pair: measure(pair, args.items, seeds, tools) for pair in pairs}
    if page:
        write_page(page, found, LOOKS, HEAD)
    return outcome_of(found, LOOKS, page, {"pairs": pairs, "items": args.items, "seeds": seeds})
