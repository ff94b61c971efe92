"""Fusion of next-token logits: a strong model steered by the deltas of small experts.

What users may import is exported here; the other modules and names of this package are internal.
"""

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazily

if TYPE_CHECKING:
    from trimtab.logits.config import FusedConfig
    from trimtab.logits.model import FusedCausalLM
    from trimtab.logits.registry import AMOUNTS, CHOOSERS
    from trimtab.logits.solver.deltas import DeltaTargets
    from trimtab.logits.strategy.base import Amount, Chooser
    from trimtab.logits.strategy.fusion import Fusion, Strategy, describe_settings, make_strategy, strategy_from_dict
    from trimtab.logits.strategy.step import Step
    from trimtab.logits.trace import Trace, TraceStep

_HOMES = {
    "AMOUNTS": "trimtab.logits.registry",
    "Amount": "trimtab.logits.strategy.base",
    "CHOOSERS": "trimtab.logits.registry",
    "Chooser": "trimtab.logits.strategy.base",
    "DeltaTargets": "trimtab.logits.solver.deltas",
    "FusedCausalLM": "trimtab.logits.model",
    "FusedConfig": "trimtab.logits.config",
    "Fusion": "trimtab.logits.strategy.fusion",
    "Step": "trimtab.logits.strategy.step",
    "Strategy": "trimtab.logits.strategy.fusion",
    "Trace": "trimtab.logits.trace",
    "TraceStep": "trimtab.logits.trace",
    "describe_settings": "trimtab.logits.strategy.fusion",
    "make_strategy": "trimtab.logits.strategy.fusion",
    "strategy_from_dict": "trimtab.logits.strategy.fusion",
}

__all__ = [
    "AMOUNTS",
    "CHOOSERS",
    "Amount",
    "Chooser",
    "DeltaTargets",
    "FusedCausalLM",
    "FusedConfig",
    "Fusion",
    "Step",
    "Strategy",
    "Trace",
    "TraceStep",
    "describe_settings",
    "make_strategy",
    "strategy_from_dict",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
