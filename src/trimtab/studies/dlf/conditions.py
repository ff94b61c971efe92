"""The conditions of the study as data: names, colours, strategies, and who plays which part."""

from collections.abc import Mapping, Sequence

from trimtab.measure.evaluate import Condition, Subject
from trimtab.measure.tables import Look
from trimtab.studies.models import Fused, StudyModels

FIRST = "dynamic"
TABLES = ("single", "multi")  # one expert per task; all experts at once
TITLES = {"single": "One expert per task", "multi": "All experts at once"}
KINDS = {"single": "one expert", "multi": "all experts"}
WEAK = {"single": "expert", "multi": "mixed"}  # the zero of the recovered gap

SINGLE: Mapping[str, Fused] = {
    "static_0.5": Fused("static", settings={"alpha": 0.5}),
    "static_1.0": Fused("static", settings={"alpha": 1.0}),
    "static_1.5": Fused("static", settings={"alpha": 1.5}),
    "grid": Fused("grid"),
    "dynamic": Fused("dynamic"),
    "cautious": Fused("cautious"),
    "filter": Fused("filter"),
    "product": Fused("product"),
    "mixture": Fused("mixture"),
    "contrastive": Fused("contrastive"),
}
MULTI: Mapping[str, Fused] = {
    "static_sum": Fused("static", "sum", {"alpha": 1.0}),
    "static_mean": Fused("static", "sum", {"alpha": 0.25}),
    "static_0.5": Fused("static", settings={"alpha": 0.5}),
    "static_1.0": Fused("static", settings={"alpha": 1.0}),
    "static_1.5": Fused("static", settings={"alpha": 1.5}),
    "product": Fused("product", "sum"),
    "mixture": Fused("mixture", "sum"),
    "grid": Fused("grid"),
    "dynamic": Fused("dynamic"),
    "dynamic_confident": Fused("dynamic", "confident"),
    "cautious": Fused("cautious"),
    "filter": Fused("filter"),
    "filter_confident": Fused("filter", "confident"),
    "filter_sum": Fused("filter", "sum"),
}
# `quick` leaves these out of the table of all experts; the full study leaves out nothing.
SLOW = ("static_1.5", "filter", "filter_sum")
STRATEGIES = {"single": SINGLE, "multi": MULTI}

LOOKS: dict[str, Look] = {
    "base": Look("small base", "#cfd4d8", "reference"),
    "expert": Look("small expert alone", "#b9a27c", "reference"),
    "mixed": Look("small model tuned on all tasks", "#b9a27c", "reference"),
    "strong": Look("strong model, untuned", "#9aa5af", "reference"),
    "latent": Look("strong model, few-shot", "#7b8794", "reference"),
    "ceiling": Look("strong model, tuned", "#3a444d", "reference"),
    "static_0.5": Look("static, alpha 0.5", "#bcdcf2"),
    "static_1.0": Look("static, alpha 1", "#7fb8e0"),
    "static_1.5": Look("static, alpha 1.5", "#4a90c4"),
    "static_sum": Look("static, all experts, alpha 1", "#86a063"),
    "static_mean": Look("static, all experts, alpha 1/4", "#b8c9a3"),
    "grid": Look("DLF, grid (Algorithm 1)", "#f0c078"),
    "dynamic": Look("DLF, solved exactly", "#e08a14", "first"),
    "dynamic_confident": Look("DLF, most confident expert", "#c65f00"),
    "cautious": Look("cautious (smaller root)", "#b3431e"),
    "filter": Look("posterior filter", "#17936a"),
    "filter_confident": Look("posterior filter, most confident expert", "#0f6b4d"),
    "filter_sum": Look("posterior filter, all experts", "#6cc3a0"),
    "product": Look("product (geometric mean)", "#a99fe0"),
    "mixture": Look("mixture (arithmetic mean)", "#7a6fd0"),
    "contrastive": Look("contrastive decoding, no expert", "#c98bbf"),
}


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """How these conditions are shown; single experts on tasks that no expert was tuned on included."""
    return {n: LOOKS.get(n, Look(f"expert for {n.removeprefix('expert/')}", kind="reference")) for n in names}


def label(name: str) -> str:
    """A condition's name for readers."""
    return looks_of([name])[name].label


def conditions(
    models: StudyModels, tuned_tasks: Sequence[str], few_shot: Mapping[str, str], is_quick: bool = False
) -> list[Condition]:
    """Every column of both tables, in their order.

    tuned_tasks  tasks that have an expert; the others are unseen, and appear in the table of all experts only
    few_shot     task -> solved questions to put before the prompt: what the strong model knows but does not show
    """
    everyone = tuple(tuned_tasks)

    def single(name: str) -> Condition:
        def subject(task: str) -> Subject | None:
            if task not in everyone or (name == "latent" and task not in few_shot):
                return None
            if name in SINGLE:
                return models.fused(SINGLE[name], (task,))
            roles = {"expert": f"expert/{task}", "latent": "strong", "ceiling": f"ceiling/{task}"}
            return models.alone(roles.get(name, name), few_shot[task] if name == "latent" else "")

        return Condition("single", name, subject)

    def multi(name: str) -> Condition:
        def subject(task: str) -> Subject | None:
            if name in MULTI:
                return models.fused(MULTI[name], everyone)
            if name in ("mixed", "ceiling"):
                return models.alone({"ceiling": "ceiling/mixed"}.get(name, name))
            return None if task in everyone else models.alone(name)  # of seen tasks they stand in the other table

        return Condition("multi", name, subject)

    strategies = [name for name in MULTI if not (is_quick and name in SLOW)]
    alone = ("base", "strong", *(f"expert/{task}" for task in everyone))
    found = [single(name) for name in ("base", "expert", "strong", "latent", *SINGLE, "ceiling")]
    return found + [multi(name) for name in (*alone, *strategies, "mixed", "ceiling")]
