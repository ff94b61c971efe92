"""What can be chosen by name, and where it lives. Imports nothing heavy, so `trimtab list` answers at once.

A new strategy ingredient is one file and one line here.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trimtab.core.errors import unknown_name


@dataclass(frozen=True)
class Entry:
    """One line of a table: where the object lives, what it does in one sentence, and who described it first."""

    where: str  # "module:object"
    summary: str
    source: str


class Table(dict[str, Entry]):
    """Names of one kind -> entries, in the order in which they are listed."""

    def __init__(self, kind: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.kind = kind


AMOUNTS = Table(
    "amount",
    {
        "dynamic": Entry(
            "trimtab.logits.amounts.dynamic:Dynamic",
            "The alpha that moves the strong model as far as tuning moved the small one, solved exactly.",
            "Fan et al. 2024, arXiv 2406.15480",
        ),
        "grid": Entry(
            "trimtab.logits.amounts.grid:Grid",
            "The same alpha searched on a grid, as published: the slow reference.",
            "Fan et al. 2024, arXiv 2406.15480, Algorithm 1",
        ),
        "cautious": Entry(
            "trimtab.logits.amounts.cautious:Cautious",
            "The largest alpha at which neither divergence exceeds its target.",
            "ours, after Fan et al. 2024, arXiv 2406.15480",
        ),
        "static": Entry(
            "trimtab.logits.amounts.static:Static",
            "One fixed alpha per expert; 1 is Proxy-Tuning and Emulated Fine-Tuning.",
            "Liu et al. 2024, arXiv 2401.08565; Mitchell et al. 2024, arXiv 2310.12962",
        ),
        "filter": Entry(
            "trimtab.logits.amounts.filter:Filter",
            "The expert rules tokens out, the strong model ranks the rest: a bounded weight per token.",
            "ours: Bayes' rule on the base as a mixture of styles",
        ),
        "product": Entry(
            "trimtab.logits.amounts.product:Product",
            "Normalised weighted geometric mean of the strong model and the expert; the base is not used.",
            "Hinton 2002, products of experts; Shi et al. 2024, arXiv 2406.18853",
        ),
        "mixture": Entry(
            "trimtab.logits.amounts.mixture:Mixture",
            "Weighted arithmetic mean of the strong model and the expert; the base is not used.",
            "Stone 1961, the linear opinion pool",
        ),
        "contrastive": Entry(
            "trimtab.logits.amounts.contrastive:Contrastive",
            "Strong against base among the strong model's plausible tokens; no expert is used.",
            "Li et al. 2023, arXiv 2210.15097; O'Brien and Lewis 2023, arXiv 2309.09117",
        ),
    },
)

CHOOSERS = Table(
    "chooser",
    {
        "paper": Entry(
            "trimtab.logits.choosers.paper:Paper",
            "Each expert alone against the summed objective; the best one speaks.",
            "Fan et al. 2024, arXiv 2406.15480, Algorithm 1",
        ),
        "confident": Entry(
            "trimtab.logits.choosers.confident:Confident",
            "The expert of lowest entropy at this position speaks.",
            "ours",
        ),
        "sum": Entry(
            "trimtab.logits.choosers.sum:Sum",
            "All experts speak at once, for amounts that allow it.",
            "Liu et al. 2024, arXiv 2401.08565, several experts",
        ),
        "only": Entry(
            "trimtab.logits.choosers.only:Only",
            "One named expert speaks at every step.",
            "ours",
        ),
    },
)


def find(table: Table, name: str) -> Any:
    """The object that `name` stands for in `table`, imported on first use.

    raises    UnknownName with the nearest spelling when the table has no such name
    """
    if name not in table:
        raise unknown_name(table.kind, name, table)
    module, attribute = table[name].where.split(":")
    return getattr(import_module(module), attribute)
