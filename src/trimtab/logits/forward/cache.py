"""One cache for all members: it shows their layers one after the other, so that `generate` can move them all at once.

Reordering for beams, repeating and selecting rows work on every kind of layer. Cropping does not work on a recurrent
layer: it holds a running state, which cannot take tokens back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from trimtab.core.errors import BadSetting
from trimtab.logits.forward.memories import is_recurrent_layer, pick_rows_, rows_of
from trimtab.models.prompts import OwnPrompts


class FusedCache(Cache):  # type: ignore[misc]
    """The members' caches side by side.

    views    one cache per group; its layers are the very objects that `layers` shows
    runs     per view: the runs that it holds, each with a copy of the batch, run-major [len(runs) * batch]
    own      the members' own prompts, where they have any; tokens that a member has seen are then counted by itself
    """

    def __init__(self, views: Sequence[Cache], runs: Sequence[tuple[int, ...]], own: OwnPrompts | None = None) -> None:
        super().__init__(layers=[layer for view in views for layer in view.layers])
        self.views, self.runs = list(views), list(runs)
        self.own = own

    @property
    def batch_size(self) -> int:
        """Rows of the batch, as transformers means it: -1 before the first read."""
        seen = int(self.views[0].batch_size)
        return seen // len(self.runs[0]) if seen > 0 else seen

    @property
    def is_compileable(self) -> bool:
        """False: each member makes its own masks, so `generate` shall not make one 4-D mask for all, nor compile."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the shared text that all members have seen."""
        seen = int(self.views[0].get_seq_length(layer_idx))
        if self.own is None or seen == 0:
            return seen
        return seen - max(self.own.lengths[run] for run in self.runs[0]) + self.own.shared_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        for view, runs in zip(self.views, self.runs, strict=True):
            view.reorder_cache(_in_all_copies(view, len(runs), beam_idx))
        self.own = self.own and self.own.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        for view, runs in zip(self.views, self.runs, strict=True):
            rows = _in_all_copies(view, len(runs), indices)
            for layer in view.layers:
                pick_rows_(layer, rows)
        self.own = self.own and self.own.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; copies stay in their order, since they are outermost."""
        for view in self.views:
            rows = torch.arange(rows_of(view)).repeat_interleave(repeats)
            for layer in view.layers:
                pick_rows_(layer, rows)
        self.own = self.own and self.own.repeated(repeats)

    def reset(self) -> None:
        """Forgets everything."""
        for view in self.views:
            view.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, a negative number of them; raises BadSetting where a member cannot."""
        self._check_croppable()
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Layers with windows keep what they would forget, so that tokens can be taken back; raises as `crop`."""
        self._check_croppable()
        super().activate_past_recording()

    def _check_croppable(self) -> None:
        recurrent = [layer for view in self.views for layer in view.layers if is_recurrent_layer(layer)]
        kinds = {type(layer).__name__ for layer in recurrent if not layer.is_croppable}
        if kinds:
            raise BadSetting(
                f"a member remembers by a running state ({', '.join(sorted(kinds))}), which cannot take tokens back.",
                "Assisted generation and prompt lookup take back the tokens that were not accepted.",
                "generate without assistant_model and prompt_lookup_num_tokens.",
            )


def _in_all_copies(view: Cache, copies: int, rows: Tensor) -> Tensor:
    """The same rows of the batch in every copy of it that a view holds."""
    held = [layer.keys for layer in view.layers if getattr(layer, "keys", None) is not None]
    if copies == 1 or not held:
        return rows
    batch = held[0].shape[0] // copies
    return torch.cat([rows + copy * batch for copy in range(copies)])
