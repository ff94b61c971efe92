"""How many tokens a model can read, from its configuration.

Rotary embeddings may be scaled beyond `max_position_embeddings`: YaRN (Peng et al. 2023, arXiv 2309.00071), linear
interpolation (Chen et al. 2023, arXiv 2306.15595), dynamic NTK, Llama 3's and LongRoPE. What each type does is
transformers' `modeling_rope_utils`.
"""

from collections.abc import Mapping
from typing import Any


def context_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can read at most; None: it sets no limit.

    config    of transformers; of a model with several parts the text part's is read
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, Mapping)]
    if by_layer_type:
        # Per layer type the limit already counts the scaling (Gemma 3: 131072 with factor 8), unless YaRN says more.
        return max([limit, *(_stretched(part, limit) for part in by_layer_type if part.get("rope_type") == "yarn")])
    if rope.get("rope_type") == "dynamic":
        return None  # frequencies are computed again for every longer text
    return max(limit, _stretched(rope, limit))


def _stretched(rope: Mapping[str, Any], limit: int) -> int:
    """The original context times the factor; 0 for types without a factor."""
    factor = rope.get("factor")
    if rope.get("rope_type") not in ("yarn", "linear", "longrope", "llama3") or not isinstance(factor, int | float):
        return 0
    return int((rope.get("original_max_position_embeddings") or limit) * factor)
