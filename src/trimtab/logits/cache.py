"""One cache for all members: it shows their layers one after the other, so that `generate` can move them all at once.

Cropping, reordering for beams, repeating and selecting rows are inherited: they walk over `layers`.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from trimtab.logits.prompts import OwnPrompts


class FusedCache(Cache):  # type: ignore[misc]
    """The members' caches side by side.

    views    one cache per member run; its layers are the very objects that `layers` shows
    own      the members' own prompts, where they have any; tokens that a member has seen are then counted by itself
    """

    def __init__(self, views: Sequence[Cache], own: OwnPrompts | None = None) -> None:
        super().__init__(layers=[layer for view in views for layer in view.layers])
        self.views = list(views)
        self.own = own

    @classmethod
    def dynamic(cls, configs: Sequence[PreTrainedConfig], own: OwnPrompts | None = None) -> "FusedCache":
        """Grows with the text; sliding-window members get sliding layers."""
        return cls([DynamicCache(config=config) for config in configs], own)

    @classmethod
    def static(
        cls, configs: Sequence[PreTrainedConfig], max_tokens: int, own: OwnPrompts | None = None
    ) -> "FusedCache":
        """Room for `max_tokens` tokens of the shared text from the start."""
        extra = own.extra_tokens if own is not None else 0
        return cls([StaticCache(config=config, max_cache_len=max_tokens + max(extra, 0)) for config in configs], own)

    @property
    def is_compileable(self) -> bool:
        """False: each member makes its own masks, so `generate` shall not make one 4-D mask for all, nor compile."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the shared text that all members have seen."""
        seen = int(super().get_seq_length(layer_idx))
        if self.own is None or seen == 0:
            return seen
        return seen - self.own.lengths[0] + self.own.shared_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        super().reorder_cache(beam_idx)
        self.own = self.own and self.own.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        super().batch_select_indices(indices)
        self.own = self.own and self.own.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.own = self.own and self.own.repeated(repeats)
