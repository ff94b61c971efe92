"""Groups: what is read in one forward. A group reads the same number of new tokens for one or several runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from trimtab.core.errors import ContextTooLong
from trimtab.logits.forward.linears import patched, quick_linears
from trimtab.models.adapters import switch_on
from trimtab.models.loading import Member
from trimtab.models.locks import model_lock


@dataclass(frozen=True)
class ForwardInputs:
    """What one run reads: tokens, positions, a mask that covers the cache, too, and the width of the whole text."""

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Int[Tensor, "batch all"] | None
    position_ids: Int[Tensor, "rows time"]
    width: int

    def to(self, device: torch.device) -> dict[str, Any]:
        """As keyword arguments for a model there."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return {
            "input_ids": self.input_ids.to(device),
            "attention_mask": mask,
            "position_ids": self.position_ids.to(device),
        }


# What carries a group's forward: from a model's inputs, for all runs run-major, to logits [copies * batch, kept, rows].
ForwardFn = Callable[..., Tensor]


class OneModel:
    """The body of a group of one run: the model itself, with the run's adapter on."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._forwards = quick_linears(member.model)

    def __call__(self, **inputs: Any) -> Float[Tensor, "rows kept vocab"]:
        model = self._member.model
        with model_lock(model):
            switch = switch_on(model)  # another fused model may have put adapters onto this one since
            if switch is not None:
                switch.select(self._member.adapter)
            with patched(self._forwards):
                return model(**inputs).logits  # type: ignore[no-any-return]


class ForwardGroup:
    """One forward for one or several runs.

    runs       places in `Reader.runs`
    members    the runs themselves, in the same order; they agree in configuration and device
    kind       "alone", "adapters" (one model, several adapters) or "stacked" (several models of one architecture)
    reason     of a group of one run: why no other is read with it; empty where there is no other
    """

    def __init__(
        self,
        runs: Sequence[int],
        members: Sequence[Member],
        forward_fn: ForwardFn,
        kind: str = "alone",
        reason: str = "",
    ) -> None:
        self.runs, self.members = tuple(runs), tuple(members)
        self.kind, self.reason = kind, reason
        self._forward_fn = forward_fn

    def new_group_cache(self, max_tokens: int | None = None) -> Cache:
        """An empty cache for `len(runs)` copies of the batch, run-major [len(runs) * batch].

        max_tokens    room for so many tokens from the start; None: it grows with the text
        """
        config = self.members[0].model.config
        if max_tokens is None:
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=max_tokens)

    @torch.no_grad()
    def read(
        self, all_inputs: Sequence[ForwardInputs], view: Cache | None = None, logits_to_keep: int | Tensor = 0
    ) -> list[Float[Tensor, "batch kept rows"]]:
        """Every run's logits, on its own device, in the order of `runs`.

        feeds             one per run: the same number of new tokens; prompts of their own may differ in width, and
                          then only last positions can be kept
        view              what `new_group_cache` gave; None: no cache
        logits_to_keep    how many last positions, or which ones; 0: all
        raises            ContextTooLong, naming the run
        """
        for member, feed in zip(self.members, all_inputs, strict=True):
            _check_context(member, feed)
        all_inputs = [
            replace(feed, input_ids=member.read_ids(feed.input_ids))
            for member, feed in zip(self.members, all_inputs, strict=True)
        ]
        feed = all_inputs[0] if len(all_inputs) == 1 else _joined(all_inputs)
        device = self.members[0].model.device
        keep = logits_to_keep.to(device) if isinstance(logits_to_keep, Tensor) else logits_to_keep
        logits = self._forward_fn(
            **feed.to(device), past_key_values=view, use_cache=view is not None, logits_to_keep=keep
        )
        return list(logits.chunk(len(self.runs)))


def _joined(all_inputs: Sequence[ForwardInputs]) -> ForwardInputs:
    """All feeds one below the other, filled up on the left to the widest."""
    time, width = max(feed.input_ids.shape[1] for feed in all_inputs), max(feed.width for feed in all_inputs)
    batch = all_inputs[0].input_ids.shape[0]
    masks = [feed.attention_mask for feed in all_inputs]
    is_masked = any(mask is not None for mask in masks)
    full = [
        feed.input_ids.new_ones(batch, feed.width) if mask is None else mask
        for feed, mask in zip(all_inputs, masks, strict=True)
    ]
    return ForwardInputs(
        torch.cat([_filled(feed.input_ids, time) for feed in all_inputs]),
        torch.cat([_filled(mask, width) for mask in full]) if is_masked else None,
        torch.cat([_filled(feed.position_ids.expand(batch, -1), time) for feed in all_inputs]),
        width,
    )


def _filled(ids: Int[Tensor, "batch time"], width: int) -> Int[Tensor, "batch width"]:
    # Token 0 stands on padding: masked out, so that any token would do.
    return torch.nn.functional.pad(ids, (width - ids.shape[1], 0))


def _check_context(run: Member, feed: ForwardInputs) -> None:
    # Padding does not count, so positions decide; they are looked at only where the padded width leaves a doubt.
    if run.context is None or feed.width <= run.context:
        return
    tokens = int(feed.position_ids.max()) + 1
    if tokens > run.context:
        raise too_long(run.name, tokens, run.context)


def too_long(member: str, tokens: int, limit: int) -> ContextTooLong:
    """The error for more tokens than a member can read."""
    return ContextTooLong(
        f"the text has {tokens} tokens, member '{member}' can read {limit}.",
        "All members read the whole text.",
        f"shorten the prompt or generate less, or leave '{member}' out.",
    )
