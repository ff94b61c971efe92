"""What vLLM calls in each of its processes before it reads a model's configuration."""

from importlib.util import find_spec
from typing import Any

# What config.json names: in a fused directory, and in one that `drafting` writes. The same code runs both.
ARCHITECTURES = ("FusedCausalLM", "FusedDrafter")
MODEL = "trimtab.serving.model:FusedForVllm"


def register() -> None:
    """Tells transformers and vLLM what a fused directory is; called again, it changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from trimtab.logits.config import FusedConfig

    deny_llvmlite_fields()
    AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            # By name: importing vLLM's model code here would start CUDA in processes that must not.
            ModelRegistry.register_model(architecture, MODEL)


def deny_llvmlite_fields() -> None:
    """Lets vLLM's CPU build start where llvmlite is imported, which the compiled solver does.

    Starting, vLLM 0.32 reads the `__dict__` of whatever any module holds. llvmlite's library object has none, but
    answers for any name with a function of its library, for `__dict__` too: the engine would die of that.
    """
    if find_spec("llvmlite") is None:
        return
    from llvmlite.binding import ffi

    if not hasattr(ffi.lib, "__dict__"):
        return
    library = type(ffi.lib)
    answer = library.__getattr__

    def answer_for_functions(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    library.__getattr__ = answer_for_functions
