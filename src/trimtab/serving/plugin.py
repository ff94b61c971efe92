"""What vLLM calls in each of its processes before it reads a model's configuration."""

ARCHITECTURE = "FusedCausalLM"  # what config.json of a fused directory names
MODEL = "trimtab.serving.model:FusedForVllm"


def register() -> None:
    """Tells transformers and vLLM what a fused directory is; called again, it changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from trimtab.logits.config import FusedConfig

    AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: importing vLLM's model code here would start CUDA in processes that must not.
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
