"""How a model remembers what it has read: the argument that takes its cache, and the kind of cache that it takes.

transformers gives most models `past_key_values`; some take the same cache as `cache_params` (Mamba) and three keep a
state of a class of their own. An argument that a model does not know is swallowed by its **kwargs, so what is assumed
here is checked at opening by a cached read, see `checks`.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from trimtab.core.errors import BadSetting

# Models with a state of their own, and the argument that takes and the output that gives it.
OWN_STATES = {"rwkv": "state", "xlstm": "cache_params", "minimax": "past_key_values"}


class CountedCache(DynamicCache):  # type: ignore[misc]
    """The cache of a model without attention layers, which do not count tokens: it counts them itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the model has read, padding included."""
        return self.seen_tokens

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen_tokens = 0


class StateLayer:
    """All that a model with a state of its own remembers, as one layer of a cache.

    state    what the model gave; None: nothing was read yet
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        self.state: Any = None

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    def reorder_cache(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, in this order; a row may come several times."""
        if self.state is not None:
            self.state = picked_rows(self.state, indices)

    batch_select_indices = reorder_cache

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before anything was read."""
        return -1 if self.state is None else _first(self.state).shape[0]

    def reset(self) -> None:
        """Forgets everything."""
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot take tokens back; see `FusedCache.crop`."""
        raise BadSetting("a member's state cannot take tokens back.")

    def get_max_length(self) -> int:
        """-1: it holds any number of tokens."""
        return -1


class StateCache(CountedCache):
    """A cache of one `StateLayer`."""

    def __init__(self) -> None:
        Cache.__init__(self, layers=[StateLayer()])
        self.seen_tokens = 0

    def row(self, index: int) -> "StateCache":
        """A cache of one row."""
        made, state = StateCache(), self.layers[0].state
        if state is not None:
            made.layers[0].state = picked_rows(copy.copy(state), torch.tensor([index]))
        return made

    def join_(self, rows: Sequence["StateCache"], new_tokens: int) -> None:
        """Takes over the states of its rows, which have read so many tokens since."""
        self.layers[0].state = joined_rows([row.layers[0].state for row in rows])
        self.seen_tokens += new_tokens


class Memory:
    """What makes a model's caches and hands them over.

    keyword   the argument that takes the cache; None: the model takes none
    """

    def __init__(self, model: Any) -> None:
        known = inspect.signature(model.forward).parameters
        self._model, self._has_state = model, model.config.model_type in OWN_STATES
        usual = next((name for name in ("past_key_values", "cache_params") if name in known), None)
        self.keyword = OWN_STATES.get(model.config.model_type, usual)

    @property
    def joins_rows(self) -> bool:
        """Whether states of single rows can be put together into that of a batch."""
        return self._has_state and self.keyword != "past_key_values"

    def new_cache(self, max_tokens: int | None = None) -> Cache:
        """An empty cache.

        max_tokens    room for so many tokens from the start; None: it grows with the text
        """
        if self._has_state:
            return StateCache()
        config = self._model.config
        cache = DynamicCache(config=config)
        if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            return CountedCache(config)
        return cache if max_tokens is None else StaticCache(config=config, max_cache_len=max_tokens)

    def read(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: Cache | None) -> Tensor:
        """Logits [rows, kept, vocab]; the cache then holds what was read, too.

        forward    the model
        inputs     its other arguments; the mask covers the cache
        """
        if cache is None:
            return forward(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
        if self.keyword is None:
            raise BadSetting(f"a {type(self._model).__name__} takes no cache.", fix="read without a cache.")
        layer = cache.layers[0] if isinstance(cache, StateCache) else None
        if self.keyword != "past_key_values":
            inputs = inputs | {"attention_mask": _mask_of_new(inputs)}
        given = {self.keyword: cache if layer is None else layer.state}
        output = forward(**inputs, **given, use_cache=True)
        if layer is not None:
            layer.state = output[self.keyword]
        if isinstance(cache, CountedCache):
            cache.seen_tokens += inputs["input_ids"].shape[1]
        return output.logits  # type: ignore[no-any-return]


def is_recurrent(cache: Cache) -> bool:
    """Whether any layer of a cache keeps a state, which cannot take tokens back nor tell padding from text later."""
    return any(is_recurrent_layer(layer) for layer in cache.layers)


def is_recurrent_layer(layer: Any) -> bool:
    """Whether a cache layer keeps a state in place of the tokens' keys and values, or beside them."""
    return isinstance(layer, LinearAttentionCacheLayerMixin | StateLayer)


def pick_rows_(layer: Any, indices: Tensor) -> None:
    """Keeps these rows of a cache layer, in this order; a row may come several times."""
    if is_recurrent_layer(layer):
        if _filled(layer):
            layer.reorder_cache(indices)
    else:
        layer.batch_select_indices(indices)


def rows_of(cache: Cache) -> int:
    """Rows of the batch that a cache holds, all copies counted; 0 for an empty cache."""
    for layer in cache.layers:
        for state in _filled(layer):
            return int(state.shape[0])
    return 0


def _filled(layer: Any) -> list[Tensor]:
    """What a layer holds, batch first."""
    if isinstance(layer, StateLayer):
        return [] if layer.state is None else [_first(layer.state)]
    found = [getattr(layer, "keys", None)]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        found += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [part for part in found if part is not None and part.numel() > 0]


def _mask_of_new(inputs: dict[str, Any]) -> Tensor | None:
    """The mask of the new tokens alone, as `cache_params` models take it; None where none of them is padding."""
    mask = inputs["attention_mask"]
    mask = None if mask is None else mask[:, -inputs["input_ids"].shape[1] :]
    return None if mask is None or bool((mask != 0).all()) else mask


# ---- states of models' own classes


def picked_rows(state: Any, indices: Tensor) -> Any:
    """Rows of a state."""
    if isinstance(state, Cache):  # MiniMax: layers of attention, and beside them states of the others
        for layer in state.layers:
            layer.batch_select_indices(indices)
        linear: Any = state
        linear.linear_cache = [picked_rows(part, indices) if len(part) else part for part in linear.linear_cache]
        return state
    return _mapped(lambda parts: parts[0].index_select(0, indices.to(parts[0].device)), [state])


def joined_rows(states: list[Any]) -> Any:
    """The state of a batch, from those of its rows."""
    return _mapped(lambda parts: torch.cat(parts), states)


def _mapped(change: Callable[[list[Tensor]], Tensor], states: list[Any]) -> Any:
    """Every tensor of some states of one form, changed together."""
    first = states[0]
    if isinstance(first, Tensor):
        return change(states)
    if isinstance(first, list | tuple):
        return type(first)(_mapped(change, list(parts)) for parts in zip(*states, strict=True))
    if isinstance(first, dict):
        return {key: _mapped(change, [state[key] for state in states]) for key in first}
    first.rnn_state = _mapped(change, [state.rnn_state for state in states])  # xLSTM
    return first


def _first(state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return state
    if isinstance(state, Cache):
        linear = [part for part in state.linear_cache if isinstance(part, Tensor)]
        return linear[0] if linear else next(layer.keys for layer in state.layers if layer.is_initialized)
    if isinstance(state, list | tuple):
        return _first(state[0])
    return _first(next(iter(state.values())) if isinstance(state, dict) else state.rnn_state)
