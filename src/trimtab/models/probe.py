"""A few fixed tokens, on which two ways to compute the same model are compared.

Members are compared at opening: as they are read here with the model as it computes by itself, and the base before
adapters are attached with the base afterwards. A model is read for some tokens only, so this costs little.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import MemberMismatch
from trimtab.models.locks import model_lock

PROBE_TOKENS = 8
# The same computation in the same shapes may differ by so much of the largest logit: what two roundings move it.
SAME_SHAPES_FLOOR = 1e-3
# In other shapes (a batch, a cache, several members in one forward) sums are rounded in another order, and in narrow
# types a mixture of experts may route a token elsewhere. Logits of another model differ by far more.
OTHER_SHAPES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}
# Layers that round what they read to 8 bits choose the scale by all rows of a batch.
OTHER_SHAPES_QUANTIZED = 0.3


def probe_ids(model: Any) -> Int[Tensor, "1 time"]:
    """The tokens: low ids, since placeholders for images have high ones and cannot be read alone."""
    text = model.config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    time = min(PROBE_TOKENS, context) if isinstance(context, int) and context > 0 else PROBE_TOKENS
    return (torch.arange(time) * 7 + 3).remainder(int(text.vocab_size)).unsqueeze(0)


def inner_model(model: Any) -> Any:
    """The transformers model inside peft's wrapper; the model itself where there is none."""
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def own_logits(name: str, model: Any) -> Float[Tensor, "1 time rows"]:
    """What a model, as it was handed in, computes on the probe's tokens; float32 on the CPU.

    raises    MemberMismatch for a model that needs more than tokens
    """
    device = next(model.parameters()).device
    try:
        with model_lock(inner_model(model)):  # another fused model may be reading it with other forwards
            logits = model(input_ids=probe_ids(inner_model(model)).to(device), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise MemberMismatch(
            f"member '{name}' ({type(model).__name__}) does not compute on tokens alone: {_last_line(error)}",
            "A member gives next-token logits for token ids.",
            "try model(input_ids=...) yourself; merge an adapter that needs more into its model.",
        ) from error
    return logits.float().cpu()  # type: ignore[no-any-return]


def same_shapes_tolerance(model: Any) -> float:
    """By how much of the largest logit the same computation in the same shapes may differ."""
    return max(SAME_SHAPES_FLOOR, 2 * torch.finfo(model.dtype).eps)


def other_shapes_tolerance(model: Any) -> float:
    """By how much of the largest logit the same computation in other shapes may differ."""
    rounding = OTHER_SHAPES.get(model.dtype, OTHER_SHAPES[torch.bfloat16])
    return max(rounding, OTHER_SHAPES_QUANTIZED) if is_quantized(model) else rounding


def is_quantized(model: Any) -> bool:
    """Whether any layer computes with rounded numbers."""
    modules = (type(module).__module__ for module in model.modules())
    return getattr(model, "is_quantized", False) or any("quantized" in name for name in modules)


def difference(found: Tensor, expected: Tensor, most: float) -> float | None:
    """The largest difference of two logits tensors; None up to `most` times the largest of the expected ones.

    Numbers that are not finite in both are equal: a damaged model is reported at the token where it matters.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.float().cpu(), expected.float().cpu()
    if not bool((found.isfinite() == expected.isfinite()).all()):
        return float("nan")
    finite = expected.isfinite()
    found, expected = found[finite], expected[finite]
    largest = float((found - expected).abs().max()) if len(found) else 0.0
    return largest if len(found) and largest > most * float(expected.abs().max()) else None


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
