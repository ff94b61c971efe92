"""trimtab turns a big language model with small ones.

Public names are loaded on first use, so `import trimtab` is light; `from trimtab import FusedCausalLM` also teaches
transformers' Auto classes to open fused directories.
"""

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
