"""A package of somebody else's on disk: a toy space with a family, and an amount for the family of trimtab's own."""

from pathlib import Path

REGISTRY = '''"""Toy: a number is changed."""

from trimtab.core.registry import Entry, Family

TURNS = Family(
    name="turn",
    base="toy.base:Turn",
    summary="How a number is turned.",
    option="--turn",
    example="trimtab show {name}",
    entries={"flip": Entry("toy.flip:Flip", "The number with the other sign.")},
)
FAMILIES = (TURNS,)
METHODS = {"amount": {"halved": Entry("toy.halved:Halved", "Half of each expert's delta.")}}
'''
BASE = '''"""What a turn is."""

from abc import ABC, abstractmethod

from trimtab.core.settings import Configurable


class Turn(Configurable, ABC):
    """Changes a number."""

    @abstractmethod
    def __call__(self, number: float) -> float:
        """The number, changed."""
'''
FLIP = '''"""The number with the other sign, times a factor.

Source: ours; a toy.
"""

from dataclasses import dataclass

from toy.base import Turn
from trimtab.core.settings import setting


@dataclass(frozen=True)
class Flip(Turn):
    """The other sign."""

    flip_factor: float = setting(1.0, "what it is multiplied with", "factor", low=0.0, high=9.0)

    def __call__(self, number: float) -> float:
        return -self.flip_factor * number
'''
HALVED = '''"""Half of each expert's delta, strong + share * (expert - base).

Source: ours; a toy.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Halved(Amount):
    """A fixed share of the delta."""

    has_alpha: ClassVar[bool] = True

    kept_share: float = setting(0.5, "how much of the delta is added", "share", low=0.0, high=1.0)

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """The same share everywhere. [expert, batch]"""
        return torch.full_like(deltas.forward[0], self.kept_share)
'''
ENTRY_POINTS = "[trimtab.families]\ntoy = toy.registry\n"
METADATA = "Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n"


def install(folder: Path) -> Path:
    """The package `toy` as pip leaves it in `folder`, which only has to be on the path."""
    files = {"__init__": "", "registry": REGISTRY, "base": BASE, "flip": FLIP, "halved": HALVED}
    for name, text in files.items():
        write(folder / "toy" / f"{name}.py", text)
    write(folder / "toy-0.1.dist-info" / "entry_points.txt", ENTRY_POINTS)
    write(folder / "toy-0.1.dist-info" / "METADATA", METADATA)
    return folder


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
