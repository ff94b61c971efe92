"""Models that are handed in loaded: the transformers model inside, the adapters that are on, and what it computes.

All of them are looked at before any is changed: peft and transformers put adapters into a model's own modules, so
attaching one member's adapter would change what another computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import MemberMismatch
from trimtab.models import adapters, kinds
from trimtab.models.adapter_copies import changes_base
from trimtab.models.adapters import Adapter
from trimtab.models.probe import inner_model, own_logits


@dataclass(frozen=True)
class Handed:
    """One model as it was handed in.

    model      the transformers model, without peft's wrapper
    adapter    what is on; None: the bare model
    recorded   what the first adapter names as its base; None: nothing
    logits     [1, time, rows]: what the model itself computes on the probe's tokens
    """

    model: Any
    adapter: Adapter
    recorded: str | None
    logits: Tensor


def look_at(sources: Mapping[str, Any]) -> dict[str, Handed]:
    """What is known of those members that are loaded models; references are left out.

    raises    MemberMismatch for something that is no causal language model, for adapters that are not changes of
              weights, and for a base whose weights an adapter has changed
    """
    loaded = {name: source for name, source in sources.items() if isinstance(source, nn.Module)}
    wrapped = [source for source in {id(source): source for source in loaded.values()}.values() if _is_wrapper(source)]
    return {name: _look_at(name, source, wrapped) for name, source in loaded.items()}


def _is_wrapper(source: Any) -> bool:
    return hasattr(source, "peft_config") and hasattr(source, "base_model") and inner_model(source) is not source


def _look_at(name: str, source: Any, wrapped: list[Any]) -> Handed:
    configs = _configs(source)
    for config in configs.values():
        adapters.check_kind(name, config)
    model = inner_model(source)
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise MemberMismatch(
            f"member '{name}' is a {type(model).__name__}.",
            "A member is a causal language model of transformers, a path, a zoo: name or a hub id.",
            "load it with AutoModelForCausalLM.from_pretrained.",
        )
    kinds.check_loaded(name, model)
    source.eval()
    beside = [other for other in wrapped if inner_model(other) is model]
    if not adapters.has_adapters(model):
        return Handed(model, None, None, own_logits(name, source))
    switch = adapters.switch_for(model)
    adapter = switch.as_given()
    if source is model and beside:
        _check_unchanged(name, beside)
        adapter = None  # handed in beside the wrapper around it, it is the adapter's bare base
    elif len(beside) > 1 and adapter is not None:
        # Several wrappers share the layers, which hold one state for all; each wrapper keeps its own word.
        adapter = tuple(source.active_adapters)
        adapter = adapter[0] if len(adapter) == 1 else adapter
    if adapters.active_adapters(model) != adapter:  # an earlier fused model may have left another one on
        switch.select(adapter)
    names = adapters.names_of(adapter)
    recorded = next((configs[at].base_model_name_or_path for at in names if at in configs), None)
    return Handed(model, adapter, recorded, own_logits(name, source))


def _configs(source: Any) -> dict[str, Any]:
    configs = getattr(source, "peft_config", None)
    return dict(configs) if isinstance(configs, Mapping) else {}


def _check_unchanged(name: str, wrappers: list[Any]) -> None:
    """Raises when an adapter has replaced weights of the model that is handed in as a bare one beside it."""
    for wrapper in wrappers:
        for adapter, config in _configs(wrapper).items():
            if changes_base(config):
                raise MemberMismatch(
                    f"member '{name}' is not the model that it was: the adapter '{adapter}' of another member sits on "
                    f"it and has changed its weights (init_lora_weights={config.init_lora_weights!r}).",
                    "A delta is taken against the base as it was before tuning.",
                    f"load '{name}' once more and pass that, or pass the adapter's directory.",
                )
