"""The strategies that can be chosen by name: amounts and choosers. A new one is one file and one line here."""

from trimtab.core.registry import Entry, Table

AMOUNTS = Table(
    "amount",
    {
        "dynamic": Entry(
            "trimtab.logits.strategy.amounts.dynamic:Dynamic",
            "The alpha that moves the strong model as far as tuning moved the small one, solved exactly.",
            "Fan et al. 2024, arXiv 2406.15480",
        ),
        "grid": Entry(
            "trimtab.logits.strategy.amounts.grid:Grid",
            "The same alpha searched on a grid, as published: the slow reference.",
            "Fan et al. 2024, arXiv 2406.15480, Algorithm 1",
        ),
        "cautious": Entry(
            "trimtab.logits.strategy.amounts.cautious:Cautious",
            "The largest alpha at which neither divergence exceeds its target.",
            "ours, after Fan et al. 2024, arXiv 2406.15480",
        ),
        "static": Entry(
            "trimtab.logits.strategy.amounts.static:Static",
            "One fixed alpha per expert; 1 is Proxy-Tuning and Emulated Fine-Tuning.",
            "Liu et al. 2024, arXiv 2401.08565; Mitchell et al. 2024, arXiv 2310.12962",
        ),
        "filter": Entry(
            "trimtab.logits.strategy.amounts.filter:Filter",
            "The expert rules tokens out, the strong model ranks the rest: a bounded weight per token.",
            "ours: Bayes' rule on the base as a mixture of styles",
        ),
        "product": Entry(
            "trimtab.logits.strategy.amounts.product:Product",
            "Normalised weighted geometric mean of the strong model and the expert; the base is not used.",
            "Hinton 2002, products of experts; Shi et al. 2024, arXiv 2406.18853",
        ),
        "mixture": Entry(
            "trimtab.logits.strategy.amounts.mixture:Mixture",
            "Weighted arithmetic mean of the strong model and the expert; the base is not used.",
            "Stone 1961, the linear opinion pool",
        ),
        "contrastive": Entry(
            "trimtab.logits.strategy.amounts.contrastive:Contrastive",
            "Strong against base among the strong model's plausible tokens; no expert is used.",
            "Li et al. 2023, arXiv 2210.15097; O'Brien and Lewis 2023, arXiv 2309.09117",
        ),
    },
)

CHOOSERS = Table(
    "chooser",
    {
        "paper": Entry(
            "trimtab.logits.strategy.choosers.joint_objective:JointObjective",
            "Each expert alone against the summed objective; the best one speaks.",
            "Fan et al. 2024, arXiv 2406.15480, Algorithm 1",
        ),
        "confident": Entry(
            "trimtab.logits.strategy.choosers.confident:Confident",
            "The expert of lowest entropy at this position speaks.",
            "ours",
        ),
        "sum": Entry(
            "trimtab.logits.strategy.choosers.sum:Sum",
            "All experts speak at once, for amounts that allow it.",
            "Liu et al. 2024, arXiv 2401.08565, several experts",
        ),
        "only": Entry(
            "trimtab.logits.strategy.choosers.only:Only",
            "One named expert speaks at every step.",
            "ours",
        ),
    },
)
