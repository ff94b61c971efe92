"""Groups: what is read in one forward. A group reads the same number of new tokens for one or several runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from trimtab.core.errors import BadSetting, ContextTooLong
from trimtab.logits.forward.linears import patched, quick_linears
from trimtab.logits.forward.memories import Memory, StateCache, is_recurrent
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

    @property
    def past(self) -> int:
        """Tokens that the cache holds already."""
        return self.width - self.input_ids.shape[1]

    def at(self, index: int) -> "ForwardInputs":
        """One of the new tokens, after those before it."""
        one, width = slice(index, index + 1), self.past + index + 1
        mask = None if self.attention_mask is None else self.attention_mask[:, :width]
        return ForwardInputs(self.input_ids[:, one], mask, self.position_ids[:, one], width)

    @property
    def is_real(self) -> Tensor | None:
        """[batch, time] 1 on new tokens that are no padding; None when none of them is."""
        mask = None if self.attention_mask is None else self.attention_mask[:, self.past :]
        return None if mask is None or bool((mask != 0).all()) else mask

    def row(self, index: int, is_real: Tensor) -> "ForwardInputs":
        """One row without its padding, as a batch of its own."""
        kept = is_real[index].nonzero().flatten().to(self.input_ids.device)
        ids, positions = self.input_ids[index, kept].unsqueeze(0), self.position_ids.expand(len(is_real), -1)
        return ForwardInputs(ids, None, positions[index, kept.to(positions.device)].unsqueeze(0), len(kept))


# What carries a group's forward: from a model's inputs, for all members one below the other, to the model's output,
# whose logits are [copies * batch, kept, rows].
ForwardFn = Callable[..., Any]


@dataclass
class Limits:
    """What a model cannot do as others do, found by reading it at opening, see `checks`.

    no_cache      why it cannot be read with a cache; empty when it can
    one_by_one    after a cached text it reads only one token at a time rightly
    rows_alone    it takes padding for text, so padded rows are read one by one
    one_row       with a cache it reads only one row at a time rightly
    """

    no_cache: str = ""
    one_by_one: bool = False
    rows_alone: bool = False
    one_row: bool = False


class OneModel:
    """The forward of a group of one member: the model itself, with the member's adapter on."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._forwards = quick_linears(member.model)

    def __call__(self, **inputs: Any) -> Any:
        model = self._member.model
        with model_lock(model):
            switch = switch_on(model)  # another fused model may have put adapters onto this one since
            if switch is not None:
                switch.select(self._member.adapter)
            with patched(self._forwards):
                return model(**inputs)


class ForwardGroup:
    """One forward for one or several members.

    runs       indices in `Reader.runs`
    members    the members themselves, in the same order; they agree in configuration and device
    kind       "alone", "adapters" (one model, several adapters) or "stacked" (several models of one architecture)
    reason     of a group of one: why no other member is read with it; empty when there is no other
    limits     what its models cannot do
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
        self.memory, self.limits = Memory(members[0].model), Limits()
        self._forward_fn = forward_fn

    def new_group_cache(self, max_tokens: int | None = None) -> Cache:
        """An empty cache for `len(runs)` copies of the batch, one below the other [len(runs) * batch].

        max_tokens    room for so many tokens from the start; None: it grows with the text
        raises        BadSetting for a model that cannot be read with a cache
        """
        if self.limits.no_cache:
            raise BadSetting(
                f"member '{self.members[0].name}' cannot be read with a cache: {self.limits.no_cache}.",
                "With a cache each member reads every token once.",
                "pass use_cache=False, or set fused.config.use_cache = False: each step then reads the whole text.",
            )
        return self.memory.new_cache(max_tokens)

    @torch.no_grad()
    def read(
        self, all_inputs: Sequence[ForwardInputs], view: Cache | None = None, logits_to_keep: int | Tensor = 0
    ) -> list[Float[Tensor, "batch kept rows"]]:
        """Every member's logits, on its own device, in the order of `runs`.

        all_inputs        one per member: the same number of new tokens; prompts of their own may differ in width, and
                          then only last positions can be kept
        view              what `new_group_cache` gave; None: no cache
        logits_to_keep    how many last positions, or which ones; 0: all
        raises            ContextTooLong, naming the member; BadSetting for padding that a model cannot tell from text
        """
        for member, feed in zip(self.members, all_inputs, strict=True):
            _check_context(member, feed)
        all_inputs = [
            replace(feed, input_ids=member.read_ids(feed.input_ids))
            for member, feed in zip(self.members, all_inputs, strict=True)
        ]
        feed = all_inputs[0] if len(all_inputs) == 1 else _joined(all_inputs)
        return list(self._read(feed, view, logits_to_keep).chunk(len(self.runs)))

    def _read(self, feed: ForwardInputs, cache: Cache | None, keep: int | Tensor) -> Float[Tensor, "rows kept vocab"]:
        if cache is not None and feed.past > 0:
            self._check_padding(feed, cache)
        is_real = feed.is_real if self.limits.rows_alone else None
        if self.limits.rows_alone and is_real is None and cache is not None and not self.memory.joins_rows:
            self._check_past(feed)
        if is_real is None and self.limits.one_row and cache is not None and len(feed.input_ids) > 1:
            is_real = torch.ones_like(feed.input_ids)
        if is_real is not None:
            return _kept(self._read_rows(feed, cache, is_real), keep)
        time = feed.input_ids.shape[1]
        if cache is not None and feed.past > 0 and time > 1 and self.limits.one_by_one:
            return _kept(torch.cat([self._forward(feed.at(index), cache, 0) for index in range(time)], dim=1), keep)
        return self._forward(feed, cache, keep)

    def _forward(self, feed: ForwardInputs, cache: Cache | None, keep: int | Tensor) -> Tensor:
        device = self.members[0].model.device
        keep = keep.to(device) if isinstance(keep, Tensor) else keep
        logits = self.memory.read(self._forward_fn, feed.to(device) | {"logits_to_keep": keep}, cache)
        # Some models do not know `logits_to_keep` and score every position.
        return _kept(logits, keep) if logits.shape[1] == feed.input_ids.shape[1] else logits

    def _read_rows(self, feed: ForwardInputs, cache: Cache | None, is_real: Tensor) -> Tensor:
        """Logits [row, time, vocab] of rows that are each read alone without their padding, where logits stay 0."""
        if cache is not None and not (isinstance(cache, StateCache) and self.memory.joins_rows):
            raise self._rows_refused()
        found = []
        caches = None if cache is None else [cache.row(index) for index in range(len(is_real))]
        for index in range(len(is_real)):
            own = None if caches is None else caches[index]
            logits = self._forward(feed.row(index, is_real), own, 0)
            whole = logits.new_zeros(is_real.shape[1], logits.shape[-1])
            whole[is_real[index].to(logits.device) != 0] = logits[0]
            found.append(whole)
        if cache is not None and caches is not None:
            cache.join_(caches, is_real.shape[1])
        return torch.stack(found)

    def _rows_refused(self) -> BadSetting:
        return BadSetting(
            f"member '{self.members[0].name}' cannot be read with a cache and "
            f"{'several rows at once' if self.limits.one_row else 'padding, which it takes for text'}.",
            "The logits of a row must not depend on padding, nor on the rows beside it.",
            "pass one prompt at a time, or use_cache=False.",
        )

    def _check_past(self, feed: ForwardInputs) -> None:
        """Raises BadSetting where the cache of a model that takes padding for text holds some."""
        if feed.attention_mask is not None and not bool(feed.attention_mask.all()):
            raise self._rows_refused()

    def _check_padding(self, feed: ForwardInputs, cache: Cache) -> None:
        """Raises BadSetting for rows that were padded on the right: a running state has read the padding."""
        mask = feed.attention_mask
        if mask is None or not is_recurrent(cache):
            return
        if not bool(mask[:, feed.past - 1].all()):
            raise BadSetting(
                f"a row is padded on the right, and member '{self.members[0].name}' remembers by a state.",
                "Its state has read the padding, and cannot be had without it.",
                "pad on the left: tokenizer.padding_side = 'left'.",
            )


def _kept(logits: Float[Tensor, "rows time vocab"], keep: int | Tensor) -> Float[Tensor, "rows kept vocab"]:
    if isinstance(keep, Tensor):
        return logits[:, keep.to(logits.device)]
    return logits[:, -keep:]


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
