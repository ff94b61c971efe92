"""Which of transformers' classes reads a checkpoint as a text model: causal models, and the text part of others.

A vision-language checkpoint is opened whole: its tower for pictures is a small part of it, and never read.
"""

import json
from pathlib import Path
from typing import Any

from trimtab.core.errors import MemberMismatch, UnreadableModel, lines_of
from trimtab.models import checkpoint

FUSED = "trimtab"
OPENS_ALONE = "AutoModelForCausalLM.from_pretrained"


def read_config(name: str, directory: Path) -> Any:
    """The configuration of a member, as transformers reads it; `directory` may be a .gguf file.

    raises    UnreadableModel for an architecture that transformers does not have, MemberMismatch for a fused model
    """
    from transformers import AutoConfig

    if directory.is_file():
        folder, options = directory.parent, {"gguf_file": directory.name}
    else:
        folder, options = directory, {}
        content = checkpoint.read_json(directory / "config.json")
        if content.get("model_type") == FUSED:
            raise _mismatch(name, "a fused model", "pass its members, or another model.")
        check_known(name, directory, content)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, from KeyError to validation errors
        raise UnreadableModel(
            f"the configuration of member '{name}' ({directory}) cannot be read: {lines_of(error)[0]}",
            "config.json is what save_pretrained writes.",
            "bring back the checkpoint's own config.json.",
        ) from error


def check_known(name: str, directory: Path, content: dict[str, Any]) -> None:
    """Refuses a model type that transformers does not have: it has code of its own, is newer, or is not named.

    content    config.json
    """
    from transformers import CONFIG_MAPPING, __version__

    kind = content.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if content.get("auto_map"):
        raise UnreadableModel(
            f"member '{name}' ({directory}) is a '{kind}', which comes with code of its own (auto_map in config.json).",
            f"Code of others is never run, and transformers {__version__} has no '{kind}' itself.",
            "take a checkpoint that was converted to one of transformers' architectures (often named -hf), or a "
            "transformers that has it: pip install -U transformers.",
        )
    if kind is None:
        raise UnreadableModel(
            f"the config.json of member '{name}' ({directory}) does not say which model it is.",
            'It names the architecture in "model_type".',
            "bring back the checkpoint's own config.json.",
        )
    raise UnreadableModel(
        f"member '{name}' ({directory}) is a {json.dumps(kind)}, which transformers {__version__} does not have.",
        "A member's architecture is one of transformers'.",
        "pip install -U transformers, if a newer one has it.",
    )


def auto_class(name: str, config: Any) -> Any:
    """The Auto class of transformers that opens a checkpoint of this configuration as a text model.

    raises    MemberMismatch for encoder-decoders and for models that give no text
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise _mismatch(name, f"an encoder-decoder model ({kind})", "take a decoder-only model, such as Llama or Qwen.")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    for opener in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in opener._model_mapping:
            return opener
    raise _mismatch(name, f"a '{kind}' model, which writes no text", "take a causal language model.")


def check_loaded(name: str, model: Any) -> None:
    """Refuses a loaded model that is no causal language model."""
    if model.config.model_type == FUSED:
        raise _mismatch(name, "a fused model", "pass its members, or another model.")
    if model.config.is_encoder_decoder:
        raise _mismatch(name, f"an encoder-decoder model ({model.config.model_type})", "take a decoder-only model.")


def _mismatch(name: str, what: str, fix: str) -> MemberMismatch:
    return MemberMismatch(
        f"member '{name}' is {what}.",
        "A member is a causal language model: it reads prompt and answer as one text, token by token.",
        fix,
    )
