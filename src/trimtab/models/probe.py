"""A few fixed tokens, on which two ways to compute the same model are compared.

Members are compared at opening: as they are read here with the model as it computes by itself, and the base before
adapters are attached with the base afterwards. A model is read for some tokens only, so this costs little.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import MemberMismatch

PROBE_TOKENS = 8
# Two computations of the same logits may differ by so much of the largest one: each rounds, and in another order.
MOST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Layers that round what they read to 8 bits choose the scale by all rows of a batch.
MOST_DIFFERENCE_QUANTIZED = 0.2


def probe_ids(rows: int) -> Int[Tensor, "1 time"]:
    """The tokens: low ids, since placeholders for images have high ones and cannot be read alone.

    rows    of the smallest embedding among the models
    """
    return (torch.arange(PROBE_TOKENS) * 7 + 3).remainder(rows).unsqueeze(0)


def embedded_rows(model: Any) -> int:
    """Rows of a model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def own_logits(name: str, model: Any) -> Float[Tensor, "1 time rows"]:
    """What a model, as it was handed in, computes on the probe's tokens; float32 on the CPU.

    raises    MemberMismatch for a model that needs more than tokens
    """
    device = next(model.parameters()).device
    try:
        logits = model(input_ids=probe_ids(embedded_rows(model)).to(device), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise MemberMismatch(
            f"member '{name}' ({type(model).__name__}) does not compute on tokens alone: {_last_line(error)}",
            "A member gives next-token logits for token ids.",
            "try model(input_ids=...) yourself; merge an adapter that needs more into its model.",
        ) from error
    return logits.float().cpu()  # type: ignore[no-any-return]


def most_difference(model: Any) -> float:
    """By how much of the largest logit two computations of this model may differ."""
    is_quantized = getattr(model, "is_quantized", False) or any(
        "quantized" in type(module).__module__ for module in model.modules()
    )
    rounding = MOST_DIFFERENCE.get(model.dtype, MOST_DIFFERENCE[torch.bfloat16])
    return max(rounding, MOST_DIFFERENCE_QUANTIZED) if is_quantized else rounding


def difference(found: Tensor, expected: Tensor, model: Any) -> float | None:
    """The largest difference of two logits tensors; None when it is rounding. NaN in both at once is no difference.

    model    that computed them: its number type says how much rounding is
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.float().cpu(), expected.float().cpu()
    largest = float((found - expected).nan_to_num().abs().max()) if _same_nans(found, expected) else float("nan")
    return None if largest <= most_difference(model) * float(expected.nan_to_num().abs().max()) else largest


def _same_nans(found: Tensor, expected: Tensor) -> bool:
    return bool((found.isfinite() == expected.isfinite()).all())


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
