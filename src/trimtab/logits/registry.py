"""Next-token logits: a small expert's difference to its base is added to the strong model's, at every step."""

from trimtab.core.registry import Entry, Family

PAGE = "strategies.md"
RENDER = "trimtab.logits.docs:render"
MEMBERS = "--strong zoo:strong --base zoo:small --expert facts=zoo:small/facts"

AMOUNTS = Family(
    name="amount",
    base="trimtab.logits.strategy.base:Amount",
    summary="How much of an expert's delta is added.",
    option="--strategy",
    example=f"trimtab fuse {MEMBERS} --strategy {{name}} -o runs/{{name}}",
    entries={
        "dynamic": Entry(
            "trimtab.logits.strategy.amounts.dynamic:Dynamic",
            "The alpha that moves the strong model as far as tuning moved the small one, solved exactly.",
        ),
        "grid": Entry(
            "trimtab.logits.strategy.amounts.grid:Grid",
            "The same alpha searched on a grid, as published: the slow reference.",
        ),
        "cautious": Entry(
            "trimtab.logits.strategy.amounts.cautious:Cautious",
            "The largest alpha at which neither divergence exceeds its target.",
        ),
        "static": Entry(
            "trimtab.logits.strategy.amounts.static:Static",
            "One fixed alpha per expert; 1 is Proxy-Tuning and Emulated Fine-Tuning.",
        ),
        "filter": Entry(
            "trimtab.logits.strategy.amounts.filter:Filter",
            "The expert rules tokens out, the strong model ranks the rest: a bounded weight per token.",
        ),
        "product": Entry(
            "trimtab.logits.strategy.amounts.product:Product",
            "Normalised weighted geometric mean of the strong model and the expert; the base is not used.",
        ),
        "mixture": Entry(
            "trimtab.logits.strategy.amounts.mixture:Mixture",
            "Weighted arithmetic mean of the strong model and the expert; the base is not used.",
        ),
        "contrastive": Entry(
            "trimtab.logits.strategy.amounts.contrastive:Contrastive",
            "Strong against base among the strong model's plausible tokens; no expert is used.",
        ),
    },
)

CHOOSERS = Family(
    name="chooser",
    base="trimtab.logits.strategy.base:Chooser",
    summary="Which experts speak at a step.",
    option="--chooser",
    example=f"trimtab fuse {MEMBERS} --chooser {{name}} -o runs/{{name}}",
    aliases={"paper": "joint_objective"},
    entries={
        "joint_objective": Entry(
            "trimtab.logits.strategy.choosers.joint_objective:JointObjective",
            "Each expert alone against the summed objective; the best one speaks.",
        ),
        "confident": Entry(
            "trimtab.logits.strategy.choosers.confident:Confident",
            "The expert of lowest entropy at this position speaks.",
        ),
        "sum": Entry(
            "trimtab.logits.strategy.choosers.sum:Sum",
            "All experts speak at once, for amounts that allow it.",
            example=f"trimtab fuse {MEMBERS} --strategy static --chooser sum -o runs/sum",
        ),
        "only": Entry(
            "trimtab.logits.strategy.choosers.only:Only",
            "One named expert speaks at every step.",
            example=f"trimtab fuse {MEMBERS} --chooser only --set expert=facts -o runs/only",
        ),
    },
)

FAMILIES = (AMOUNTS, CHOOSERS)

# Of a strategy that says nothing else; the chooser also of amounts that use no expert, and leave nothing to choose.
DEFAULT_AMOUNT = "dynamic"
DEFAULT_CHOOSER = "joint_objective"
