"""What `generate` does where a call says nothing: the strong model's `generation_config.json`, and where a text ends.

    from_members       the strong model's settings
    save_pretrained    writes the fused model's settings, whatever the user has set in them meanwhile
    from_pretrained    reads the file in the fused directory; one that has none (older than the file) gets the strong's

Ends of text are those of all members, since a chat expert may end its turns with a token of its own. A file that names
other ends is followed: its user wrote them.
"""

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from trimtab.core.errors import UnreadableModel
from trimtab.logits.config import FusedConfig

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# About one model's own memory and outputs. The caches that a fused model has are in `_prepare_cache_for_generation`.
NOT_TAKEN_OVER = ("cache_implementation", "cache_config", "compile_config", "prefill_chunk_size")
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NEVER_OUTPUT = ("output_attentions", "output_hidden_states")


def from_strong(strong: Any, config: FusedConfig) -> GenerationConfig:
    """The strong model's settings with the fused model's tokens of beginning, end and padding.

    strong    the strong model's generation_config
    """
    settings = copy.deepcopy(strong)
    for name in TOKENS:
        setattr(settings, name, getattr(config, name))
    for name in NOT_TAKEN_OVER:
        setattr(settings, name, None)
    for name in NEVER_OUTPUT:
        setattr(settings, name, False)
    settings._from_model_config = False
    return settings


def completed(settings: GenerationConfig, config: FusedConfig) -> GenerationConfig:
    """These settings, with the fused model's tokens where they name none."""
    settings = copy.deepcopy(settings)
    for name in TOKENS:
        if getattr(settings, name, None) is None:
            setattr(settings, name, getattr(config, name))
    return settings


def read(directory: Path, config: FusedConfig) -> GenerationConfig | None:
    """The settings in a fused directory; None where it has no such file.

    raises    UnreadableModel for a file that cannot be read
    """
    file = directory / GENERATION_CONFIG_NAME
    if not file.is_file():
        return None
    try:
        found = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnreadableModel(
            f"'{file}' cannot be read: {error}",
            "It holds what `generate` does where a call says nothing.",
            "correct it, or delete it for the strong model's settings.",
        ) from error
    return completed(found, config)


def sampling_defaults(settings: GenerationConfig | None) -> dict[str, Any]:
    """What requests of OpenAI's interface get where they say nothing, as vLLM reads it from the file.

    settings    None: nothing is set
    returns     {temperature, top_p, top_k, min_p, repetition_penalty, max_tokens}, those that are set
    """
    found = {name: getattr(settings, name, None) for name in SAMPLED}
    found["max_tokens"] = getattr(settings, "max_new_tokens", None)
    return {name: value for name, value in found.items() if value is not None}


def write(settings: GenerationConfig, directory: Path) -> None:
    """Writes the file, also where settings contradict one another, as published ones often do."""
    settings.to_json_file(str(directory / GENERATION_CONFIG_NAME), use_diff=True, keys_to_pop=["compile_config"])
