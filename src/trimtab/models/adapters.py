"""Adapters on a shared model: one copy of the weights in memory, however many adapters sit on it (peft)."""

import re
import warnings
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.errors import MemberMismatch, UnreadableModel
from trimtab.models.checkpoint import read_json
from trimtab.models.locks import model_lock
from trimtab.models.shared_storage import ModuleChangeDetector

# Of resized embeddings, and of tokens trained in tied ones, peft writes the same numbers under a second name.
WRITTEN_TWICE = (".modules_to_save.weight", ".token_adapter.trainable_tokens_delta")


class AdapterSwitch:
    """Turns a model's adapters on and off, layer by layer; `None` is the bare model.

    peft injects its layers into the model itself, so one switch per model serves all its adapters, and all fused models
    that the model is a member of: `switch_for` finds it. Whoever selects and reads does so in one turn, see `turns`.

    layers      the adapter layers
    wrappers    around whole modules that some adapters bring along, an output layer of their own for example
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._peft: Any = None
        self.refresh()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model shall find a switch of its own, so nothing is copied."""
        return type(None), ()

    def refresh(self) -> None:
        """Looks for the adapter layers again."""
        self.layers, self.wrappers = _adapted(self._model)
        self._tree = ModuleChangeDetector([self._model])

    def select(self, adapter: str | None) -> None:
        """From now on the model computes with this adapter, or bare.

        Nothing is remembered: peft, which has the same layers, may be told to switch them by others.
        """
        if not self._tree.is_current:
            self.refresh()
        if self._is_on(adapter):
            return
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()
        for layer in (*self.layers, *self.wrappers):
            layer.enable_adapters(adapter is not None)
        if adapter is not None:
            for layer in self.layers:
                layer.set_adapter([adapter], inference_mode=True)
            for wrapper in self.wrappers:
                wrapper.set_adapter([adapter] if adapter in wrapper._adapters else [], inference_mode=True)

    def _is_on(self, adapter: str | None) -> bool:
        is_off = adapter is None
        if any(part.disable_adapters is not is_off for part in (*self.layers, *self.wrappers)):
            return False
        if any(layer.merged_adapters for layer in self.layers):
            return False
        on = [adapter]
        return is_off or (
            all(layer.active_adapters == on for layer in self.layers)
            and all(wrapper.active_adapters == on[: adapter in wrapper._adapters] for wrapper in self.wrappers)
        )

    def attach(self, name: str, directory: Path) -> str:
        """Loads an adapter from its directory onto the model; returns the name by which to select it.

        raises    MemberMismatch when it does not fit, UnreadableModel when it cannot be read
        """
        config = read_config(name, directory)
        with model_lock(self._model):  # which another thread may be reading
            return self._attach(name, directory, config)

    def _attach(self, name: str, directory: Path, config: Any) -> str:
        import peft

        adapter = self._free_name(re.sub(r"[^A-Za-z0-9]", "_", name))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # missing keys are raised below; the other remarks concern training
                if self._peft is None:
                    self._peft = peft.PeftModel(self._model, config, adapter_name=adapter)
                result = self._peft.load_adapter(str(directory), adapter_name=adapter, torch_device=self._device())
        except (RuntimeError, ValueError, KeyError) as error:
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


def _adapted(model: nn.Module) -> tuple[list[Any], list[Any]]:
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
    return any(_adapted(model))


def read_config(name: str, directory: Path) -> Any:
    """The adapter's configuration, refused where the bare model could not be had back beside it."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UnreadableModel(
            f"'{directory}/adapter_config.json' cannot be read: {error}.", fix="save the adapter again."
        ) from error
    config.inference_mode = True
    if config.is_prompt_learning:
        raise MemberMismatch(
            f"the adapter '{name}' is of type {config.peft_type}, which lives in the prompt and not in the weights.",
            "Adapters on a shared base are LoRA and its kin.",
            "tune a LoRA adapter instead.",
        )
    if getattr(config, "bias", "none") != "none":
        raise MemberMismatch(
            f"the adapter '{name}' has changed the biases of its base (bias='{config.bias}').",
            "The bare base could not be had back beside it.",
            "merge it into a model of its own: peft's merge_and_unload(), then save_pretrained.",
        )
    return config


def base_name(directory: Path) -> str | None:
    """What the adapter says it was trained on."""
    name = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
