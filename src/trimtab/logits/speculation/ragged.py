"""What every member has read of every row, when each row of a batch accepts another number of drafted tokens.

All rows of a batch read the same number of tokens at a time. Afterwards each row takes back what was not accepted: its
cached keys and values move to the right over what is taken back, so that all rows end in the same column again and the
differences lie on the left, as padding, where masks and sliding windows know how to deal with them. One row alone is
cropped and never moved.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trimtab.logits.forward.cache import FusedCache
from trimtab.logits.forward.groups import ForwardInputs
from trimtab.logits.forward.reader import Reader

MOVABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class RaggedReading:
    """The members' caches and masks during speculation. Every group reads the prompt with the first tokens it is given.

    prompts   per run: what is to be read first, after what the cache holds already
    masks     per run [row, width]: 1 where the cache holds a token of the row, or will when the prompt is read
    """

    def __init__(self, reader: Reader, cache: FusedCache, prompts: Sequence[ForwardInputs]) -> None:
        self.reader, self.cache = reader, cache
        self._prompts = prompts
        self._unread = set(range(len(reader.groups)))
        # Sliding layers that may have to take drafts back keep all that they read until then. Where a prompt is longer
        # than their window that costs memory, so nothing is read with it that could be taken back.
        self.takes_drafts = all(window >= feed.width for feed in prompts for window in _windows(cache))
        if self.takes_drafts:
            cache.activate_past_recording()
        rows = prompts[0].input_ids.shape[0]
        self.is_single = rows == 1
        self.masks = [_whole_mask(feed) for feed in prompts]
        for group in reader.groups:  # prompts of their own may differ in width; in one group's cache they end together
            width = max(self.masks[run].shape[1] for run in group.runs)
            for run in group.runs:
                self.masks[run] = torch.nn.functional.pad(self.masks[run], (width - self.masks[run].shape[1], 0))
        self._lengths = [mask.sum(dim=-1) for mask in self.masks]
        self._padded = [bool((mask == 0).any()) for mask in self.masks]

    @property
    def is_opening(self) -> bool:
        """Whether the prompt is still to be read, by some groups at least."""
        return bool(self._unread)

    def is_unread(self, group: int) -> bool:
        """Whether a group reads the prompt next, before anything else."""
        return group in self._unread

    def read(self, group: int, tokens: Int[Tensor, "row new"]) -> list[Tensor]:
        """Reads these tokens in a group, after what it has read; the logits [row, new, ...] of its runs.

        With the prompt, which is read first, one position more: the one after the prompt. `new` may then be 0.
        """
        runs, is_first = self.reader.groups[group].runs, group in self._unread
        all_inputs = [_appended(self._prompts[run], tokens) if is_first else self._feed(run, tokens) for run in runs]
        logits = self.reader.groups[group].read(all_inputs, self.cache.views[group], tokens.shape[1] + is_first)
        for run in runs:
            self.masks[run] = _longer(self.masks[run], tokens.shape[1])
            self._lengths[run] = self._lengths[run] + tokens.shape[1]
        self._unread.discard(group)
        if not self._unread and is_first and not self.takes_drafts:
            self.cache.activate_past_recording()
        return logits

    def start_again(self, read: Mapping[int, int]) -> None:
        """Forgets the prompt and what was read after it: every group reads it anew.

        read    {group: positions that it has read since, the one after the prompt counted}
        """
        for group, positions in read.items():
            if group in self._unread:
                continue
            runs = self.reader.groups[group].runs
            new = max(self._prompts[run].input_ids.shape[1] for run in runs)
            for layer in self.cache.views[group].layers:
                layer.crop(-(new + positions - 1))
            for run in runs:
                self.masks[run] = self.masks[run][:, : self.masks[run].shape[1] - (positions - 1)]
                self._lengths[run] = self._lengths[run] - (positions - 1)
            self._unread.add(group)

    def _feed(self, run: int, tokens: Tensor) -> ForwardInputs:
        new = tokens.shape[1]
        indices = torch.arange(new, device=tokens.device)
        positions = self._lengths[run].to(tokens.device).unsqueeze(-1) + indices
        mask = _longer(self.masks[run], new) if self._padded[run] else None
        return ForwardInputs(tokens, mask, positions, self.masks[run].shape[1] + new)

    def take_back(self, group: int, counts: Int[Tensor, " row"]) -> None:
        """Each row of a group forgets its last `counts` [row] tokens."""
        least = int(counts.min())
        shift = counts - least
        is_even = not bool(shift.any())
        runs, view = self.reader.groups[group].runs, self.cache.views[group]
        for layer in view.layers:
            if not is_even:
                _move_right(layer, shift.repeat(len(runs)))
            layer.crop(-least)
        for run in runs:
            self._lengths[run] = self._lengths[run] - counts.to(self._lengths[run].device)
            if not is_even:
                self._padded[run] = True
                self.masks[run] = _moved_right(self.masks[run], shift)
            self.masks[run] = self.masks[run][:, : self.masks[run].shape[1] - least]
        self._trim(group)

    def _trim(self, group: int) -> None:
        """Cuts columns that are padding in every row of every run of a group. Padding is on the left only.

        A row alone keeps its own: its cache shall fit the text that it belongs to.
        """
        runs = self.reader.groups[group].runs
        if self.is_single or not any(self._padded[run] for run in runs):
            return
        spare = min(int(self.masks[run].shape[1] - self._lengths[run].max()) for run in runs)
        if spare > 0:
            for layer in self.cache.views[group].layers:
                _cut_left(layer, spare)
            for run in runs:
                self.masks[run] = self.masks[run][:, spare:]
        for run in runs:
            self._padded[run] = bool((self._lengths[run] < self.masks[run].shape[1]).any())

    def keep_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Only these rows go on."""
        self.cache.batch_select_indices(rows)
        self.masks = [mask[rows.to(mask.device)] for mask in self.masks]
        self._lengths = [lengths[rows.to(lengths.device)] for lengths in self._lengths]
        for group in range(len(self.reader.groups)):
            self._trim(group)

    @property
    def longest(self) -> list[int]:
        """Tokens of the longest row, per run."""
        return [int(lengths.max()) for lengths in self._lengths]


def _windows(cache: Cache) -> set[int]:
    return {layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)}


def _whole_mask(feed: ForwardInputs) -> Tensor:
    if feed.attention_mask is not None:
        return feed.attention_mask.long()
    return feed.input_ids.new_ones((feed.input_ids.shape[0], feed.width))


def _appended(prompt: ForwardInputs, tokens: Int[Tensor, "row new"]) -> ForwardInputs:
    """A prompt and the tokens after it, to be read together."""
    new = tokens.shape[1]
    mask = prompt.attention_mask
    after = prompt.position_ids[:, -1:] + 1 + torch.arange(new, device=prompt.position_ids.device)
    return ForwardInputs(
        torch.cat([prompt.input_ids, tokens.to(prompt.input_ids.device)], dim=-1),
        None if mask is None else _longer(mask, new),
        torch.cat([prompt.position_ids, after], dim=-1),
        prompt.width + new,
    )


def immovable(view: Cache, rows: int) -> str | None:
    """Why a cache cannot take tokens back; None when it can."""
    for layer in view.layers:
        kind = type(layer)
        if kind not in MOVABLE and (rows > 1 or not getattr(layer, "is_croppable", False)):
            return f"a cache layer of kind {kind.__name__} cannot take back tokens that were not accepted"
    return None


def _longer(mask: Tensor, new: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], new)], dim=-1)


def _source_indices(width: int, shift: Tensor) -> Tensor:
    """For each row the columns from which a move to the right by `shift` reads; [row, width]."""
    return torch.arange(width, device=shift.device) - shift.unsqueeze(-1)


def _moved_right(mask: Tensor, shift: Tensor) -> Tensor:
    indices = _source_indices(mask.shape[1], shift.to(mask.device))
    return mask.gather(1, indices.clamp_min(0)).masked_fill(indices < 0, 0)


def _move_right(layer: DynamicLayer, shift: Tensor) -> None:
    """Moves each row's keys and values right; what comes in on the left is padding."""
    if not layer.is_initialized or layer.keys.numel() == 0:
        return
    indices = _source_indices(layer.keys.shape[-2], shift.to(layer.keys.device)).clamp_min(0)[:, None, :, None]
    layer.keys = layer.keys.gather(2, indices.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[-1]))
    layer.values = layer.values.gather(2, indices.expand(-1, layer.values.shape[1], -1, layer.values.shape[-1]))


def _cut_left(layer: DynamicLayer, spare: int) -> None:
    """Forgets the first `spare` tokens, which are padding in every row."""
    if not layer.is_initialized:
        return
    if isinstance(layer, DynamicSlidingWindowLayer):
        # It holds the end of the text only, and counts the text by itself.
        layer.cumulative_length -= spare
        kept = min(layer.keys.shape[-2], layer.cumulative_length)
    else:
        kept = layer.keys.shape[-2] - spare
    layer.keys = layer.keys[..., layer.keys.shape[-2] - kept :, :]
    layer.values = layer.values[..., layer.values.shape[-2] - kept :, :]
