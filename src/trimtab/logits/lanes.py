"""Lanes: what is read in one forward. A lane reads the same number of new tokens for one or several runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from trimtab.core.errors import ContextTooLong
from trimtab.logits.linears import quick_linears, standing_in
from trimtab.logits.lora import switch_on
from trimtab.logits.members import Member
from trimtab.logits.turns import turn_of


@dataclass(frozen=True)
class Feed:
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


# What carries a lane's forward: from a model's inputs, for all runs run-major, to logits [copies * batch, kept, rows].
Body = Callable[..., Tensor]


class OneModel:
    """The body of a lane of one run: the model itself, with the run's adapter on."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._forwards = quick_linears(member.model)

    def __call__(self, **inputs: Any) -> Float[Tensor, "rows kept vocab"]:
        model = self._member.model
        with turn_of(model):
            switch = switch_on(model)  # another fused model may have put adapters onto this one since
            if switch is not None:
                switch.select(self._member.adapter)
            with standing_in(self._forwards):
                return model(**inputs).logits  # type: ignore[no-any-return]


class Lane:
    """One forward for one or several runs.

    runs       places in `Reader.runs`
    members    the runs themselves, in the same order; they agree in configuration and device
    kind       "alone", "adapters" (one model, several adapters) or "stacked" (several models of one architecture)
    reason     of a lane of one run: why no other is read with it; empty where there is no other
    """

    def __init__(
        self, runs: Sequence[int], members: Sequence[Member], body: Body, kind: str = "alone", reason: str = ""
    ) -> None:
        self.runs, self.members = tuple(runs), tuple(members)
        self.kind, self.reason = kind, reason
        self._body = body

    def new_view(self, max_tokens: int | None = None) -> Cache:
        """An empty cache for `len(runs)` copies of the batch, run-major [len(runs) * batch].

        max_tokens    room for so many tokens from the start; None: it grows with the text
        """
        config = self.members[0].model.config
        if max_tokens is None:
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=max_tokens)

    @torch.no_grad()
    def read(
        self, feeds: Sequence[Feed], view: Cache | None = None, logits_to_keep: int | Tensor = 0
    ) -> list[Float[Tensor, "batch kept rows"]]:
        """Every run's logits, on its own device, in the order of `runs`.

        feeds             one per run: the same number of new tokens; prompts of their own may differ in width, and
                          then only last positions can be kept
        view              what `new_view` gave; None: no cache
        logits_to_keep    how many last positions, or which ones; 0: all
        raises            ContextTooLong, naming the run
        """
        for member, feed in zip(self.members, feeds, strict=True):
            _check_context(member, feed)
        feed = feeds[0] if len(feeds) == 1 else _joined(feeds)
        device = self.members[0].model.device
        keep = logits_to_keep.to(device) if isinstance(logits_to_keep, Tensor) else logits_to_keep
        logits = self._body(**feed.to(device), past_key_values=view, use_cache=view is not None, logits_to_keep=keep)
        return list(logits.chunk(len(self.runs)))


def _joined(feeds: Sequence[Feed]) -> Feed:
    """All feeds one below the other, filled up on the left to the widest."""
    time, width = max(feed.input_ids.shape[1] for feed in feeds), max(feed.width for feed in feeds)
    batch = feeds[0].input_ids.shape[0]
    masks = [feed.attention_mask for feed in feeds]
    is_masked = any(mask is not None for mask in masks)
    full = [
        feed.input_ids.new_ones(batch, feed.width) if mask is None else mask
        for feed, mask in zip(feeds, masks, strict=True)
    ]
    return Feed(
        torch.cat([_filled(feed.input_ids, time) for feed in feeds]),
        torch.cat([_filled(mask, width) for mask in full]) if is_masked else None,
        torch.cat([_filled(feed.position_ids.expand(batch, -1), time) for feed in feeds]),
        width,
    )


def _filled(ids: Int[Tensor, "batch time"], width: int) -> Int[Tensor, "batch width"]:
    # Token 0 stands on padding: masked out, so that any token would do.
    return torch.nn.functional.pad(ids, (width - ids.shape[1], 0))


def _check_context(run: Member, feed: Feed) -> None:
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
