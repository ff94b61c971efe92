"""trimtab turns a big language model with small ones.

Public names are loaded on first use, so `import trimtab` is light; `from trimtab import FusedCausalLM` also teaches
transformers' Auto classes to open fused directories.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.core.errors import InputError, TrimtabError
    from trimtab.logits.config import FusedConfig
    from trimtab.logits.model import FusedCausalLM
    from trimtab.logits.strategy.fusion import Fusion, Strategy, make_strategy
    from trimtab.logits.trace import Trace, TraceStep

__version__ = "0.1.0"

_HOMES = {
    "FusedCausalLM": "trimtab.logits.model",
    "FusedConfig": "trimtab.logits.config",
    "Fusion": "trimtab.logits.strategy.fusion",
    "InputError": "trimtab.core.errors",
    "Strategy": "trimtab.logits.strategy.fusion",
    "Trace": "trimtab.logits.trace",
    "TraceStep": "trimtab.logits.trace",
    "TrimtabError": "trimtab.core.errors",
    "make_strategy": "trimtab.logits.strategy.fusion",
}

__all__ = [
    "FusedCausalLM",
    "FusedConfig",
    "Fusion",
    "InputError",
    "Strategy",
    "Trace",
    "TraceStep",
    "TrimtabError",
    "__version__",
    "make_strategy",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
