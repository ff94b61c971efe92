"""A fused directory as a model of lm-evaluation-harness.

Declared in the entry-point group `lm_eval.models`, for versions that read it: `lm_eval --model trimtab --model_args
pretrained=DIR`. Version 0.4.13 does not; there `trimtab eval` is the way.
"""

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM


@register_model("trimtab")
class TrimtabLM(HFLM):  # type: ignore[misc]
    """A fused model, opened from its directory or given loaded."""

    def __init__(self, pretrained: Any, strategy: str | None = None, batch_size: int | str = 64, **kwargs: Any) -> None:
        """
        pretrained  a fused directory, or a loaded FusedCausalLM
        strategy    another amount than the one that the directory names, with its default settings
        kwargs      dtype and device for opening; others go to HFLM
        """
        from trimtab.logits.model import FusedCausalLM

        if isinstance(pretrained, str):
            opening = {name: kwargs.pop(name) for name in ("dtype", "device") if kwargs.get(name) is not None}
            pretrained = FusedCausalLM.from_pretrained(pretrained, **opening)
        if strategy is not None:
            pretrained.strategy = strategy
        super().__init__(pretrained=pretrained, tokenizer=pretrained.tokenizer, batch_size=batch_size, **kwargs)
