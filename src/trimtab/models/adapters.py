"""Adapters on a shared model: one copy of the weights in memory, however many adapters sit on it (peft).

Plain LoRA leaves the base as it was, so all such adapters are attached to the base itself. Adapters of other kinds may
change it (PiSSA takes out of the base's weights what its factors start with), so each is attached to a copy of the
modules, which shares every parameter that the adapter leaves alone: see `attach_apart`.
"""

import re
import warnings
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import MemberMismatch, UnreadableModel
from trimtab.models.checkpoint import read_json
from trimtab.models.locks import model_lock
from trimtab.models.probe import own_logits
from trimtab.models.shared_storage import ModuleChangeDetector

# Of resized embeddings, and of tokens trained in tied ones, peft writes the same numbers under a second name.
WRITTEN_TWICE = (".modules_to_save.weight", ".token_adapter.trainable_tokens_delta")
# What a member computes with: one adapter, several at once (their deltas add up), or None, the bare model.
Adapter = str | tuple[str, ...] | None


class AdapterSwitch:
    """Turns a model's adapters on and off, layer by layer.

    peft injects its layers into the model itself, so one switch per model serves all its adapters, and all fused models
    that the model is a member of: `switch_for` finds it. Select and read under one `model_lock`.

    layers      the adapter layers
    wrappers    around whole modules that some adapters bring along, an output layer of their own for example
    given       what the model computed with when it was handed in, before this switch was used
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._peft: Any = None
        self.refresh()
        self.given: Adapter = active_adapters(model)
        self._selected: Adapter = self.given

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model shall find a switch of its own, so nothing is copied."""
        return type(None), ()

    def refresh(self) -> None:
        """Looks for the adapter layers again."""
        self.layers, self.wrappers = layers_and_wrappers(self._model)
        self._tree = ModuleChangeDetector([self._model])

    def as_given(self) -> Adapter:
        """What the user wants the model to compute with: its state now, unless that is what was selected here."""
        now = active_adapters(self._model)
        return self.given if now == self._selected else now

    def select(self, adapter: Adapter) -> None:
        """From now on the model computes with this adapter, or bare.

        The layers are looked at each time: users may switch them through peft, too.
        """
        if not self._tree.is_current:
            self.refresh()
        self._selected, names = adapter, names_of(adapter)
        if self._is_on(names):
            return
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()
        for layer in (*self.layers, *self.wrappers):
            layer.enable_adapters(bool(names))
        if names:
            for layer in self.layers:
                layer.set_adapter(names, inference_mode=True)
            for wrapper in self.wrappers:
                wrapper.set_adapter(_among(names, wrapper), inference_mode=True)

    def _is_on(self, names: list[str]) -> bool:
        if any(part.disable_adapters is bool(names) for part in (*self.layers, *self.wrappers)):
            return False
        if any(layer.merged_adapters for layer in self.layers):
            return False
        return not names or (
            all(layer.active_adapters == names for layer in self.layers)
            and all(wrapper.active_adapters == _among(names, wrapper) for wrapper in self.wrappers)
        )

    def attach(self, name: str, directory: Path) -> str:
        """Loads an adapter from its directory onto the model; returns the name by which to select it.

        raises    MemberMismatch when it does not fit, UnreadableModel when it cannot be read
        """
        config = read_config(name, directory)
        with model_lock(self._model):  # which another thread may be reading
            return self._attach(name, directory, config)

    def own_logits(self, name: str, adapter: str) -> Tensor:
        """Logits [1, time, rows] on the probe's tokens, as peft computes them with an attached adapter."""
        with model_lock(self._model):
            self.select(adapter)
            self._peft.active_adapter = adapter  # peft's wrapper keeps a word of its own
            return own_logits(name, self._peft)

    def _attach(self, name: str, directory: Path, config: Any) -> str:
        import peft

        adapter = self._free_name(re.sub(r"[^A-Za-z0-9]", "_", name))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # missing keys are raised below; the other remarks concern training
                if self._peft is None:
                    self._peft = peft.PeftModel(self._model, config, adapter_name=adapter)
                result = self._peft.load_adapter(str(directory), adapter_name=adapter, torch_device=self._device())
        except (RuntimeError, ValueError, KeyError, ImportError) as error:
            raise MemberMismatch(
                f"the adapter '{name}' ({directory}) does not fit its base: {str(error).strip().splitlines()[-1]}",
                "An adapter belongs to the very model that it was trained on.",
                f"its adapter_config.json names '{config.base_model_name_or_path}': pass that one as base.",
            ) from error
        missing = [key for key in result.missing_keys if adapter in key]
        unknown = [key for key in result.unexpected_keys if not key.endswith(WRITTEN_TWICE)]
        if missing or unknown:
            keys = missing or unknown
            raise UnreadableModel(
                f"the adapter '{name}' ({directory}) does not fill its layers: {len(missing)} weights are missing, "
                f"{len(unknown)} have no place (such as {keys[0]}).",
                "An adapter with missing weights would silently be another one.",
                "save the adapter again with save_pretrained.",
            )
        self._model.eval()
        self.refresh()
        return adapter

    def _free_name(self, name: str) -> str:
        """The name with a number that no adapter on the model has yet."""
        tables = [getattr(layer, table) for layer in self.layers for table in layer.adapter_layer_names]
        taken = {own for table in [*tables, *(wrapper._adapters for wrapper in self.wrappers)] for own in table}
        return next(free for free in (f"{name}_{number}" for number in count()) if free not in taken)

    def _device(self) -> str:
        return str(next(self._model.parameters()).device)


def names_of(adapter: Adapter) -> list[str]:
    """The adapters that are on at once; empty for the bare model."""
    return [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)


def _among(names: Iterable[str], wrapper: Any) -> list[str]:
    return [name for name in names if name in wrapper._adapters]


def active_adapters(model: nn.Module) -> Adapter:
    """What a model computes with right now, read from its layers: peft and transformers keep lists of their own."""
    layers, wrappers = layers_and_wrappers(model)
    found: dict[str, None] = {}
    for layer in layers:
        if not layer.disable_adapters:
            # Where adapters are merged into the weights, the layer adds no other.
            active = layer.merged_adapters or layer.active_adapters
            own = {name for table in layer.adapter_layer_names for name in getattr(layer, table, ())}
            found |= dict.fromkeys(name for name in active if name in own)
    for wrapper in wrappers:
        if not wrapper.disable_adapters:
            found |= dict.fromkeys(_among(wrapper.active_adapters, wrapper))
    names = tuple(found)
    return names[0] if len(names) == 1 else names or None


def layers_and_wrappers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """peft's adapter layers in a model, and its wrappers around whole modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = list(model.modules())
    return (
        [module for module in modules if isinstance(module, BaseTunerLayer)],
        [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)],
    )


# Under this name a model keeps its switch; a copy of the model has None there.
_SWITCH = "_trimtab_adapter_switch"


def switch_on(model: nn.Module) -> AdapterSwitch | None:
    """The switch of a model that carries adapters; None for a model that was never given one."""
    return switch_for(model) if _SWITCH in vars(model) else None


def switch_for(model: nn.Module) -> AdapterSwitch:
    """The one switch of a model, made where there is none."""
    if vars(model).get(_SWITCH) is None:
        vars(model)[_SWITCH] = AdapterSwitch(model)
    found: AdapterSwitch = vars(model)[_SWITCH]
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put layers into a model."""
    return any(layers_and_wrappers(model))


def read_config(name: str, directory: Path) -> Any:
    """The adapter's configuration, refused where the bare model could not be had back beside it."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise UnreadableModel(
            f"'{directory}/adapter_config.json' cannot be read: {error}.", fix="save the adapter again."
        ) from error
    config.inference_mode = True
    check_kind(name, config)
    _check_start(name, config)
    return config


def check_kind(name: str, config: Any) -> None:
    """Raises MemberMismatch for an adapter that cannot be read as a change of weights."""
    if config.is_prompt_learning:
        raise MemberMismatch(
            f"the adapter '{name}' is of type {config.peft_type}, which lives in the prompt and not in the weights.",
            "Adapters on a shared base are LoRA and its kin.",
            "tune a LoRA adapter instead.",
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise MemberMismatch(
            f"the adapter '{name}' is an activated LoRA: it works only after tokens {config.alora_invocation_tokens}.",
            "Members are read with the same weights at every position.",
            "train it as a plain LoRA, without alora_invocation_tokens.",
        )


def _check_start(name: str, config: Any) -> None:
    """Raises MemberMismatch for a saved adapter whose base depends on data that was not saved with it."""
    start = getattr(config, "init_lora_weights", True)
    if start in ("corda", "lora_ga"):
        raise MemberMismatch(
            f"the adapter '{name}' was made with init_lora_weights='{start}', which took a part out of its base's "
            "weights. That part depends on training data and was not saved.",
            "On the base as it is here the adapter would be another one.",
            "where it was trained, save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "or merge_and_unload() and save the whole model.",
        )


def base_name(directory: Path) -> str | None:
    """What the adapter says it was trained on."""
    name = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
