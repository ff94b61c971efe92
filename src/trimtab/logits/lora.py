"""Adapters on a shared model: one copy of the weights in memory, however many adapters sit on it (peft)."""

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.errors import MemberMismatch, UnreadableModel
from trimtab.logits.references import read_json


class AdapterSwitch:
    """Turns a model's adapters on and off, layer by layer; `None` is the bare model.

    peft injects its layers into the model itself, so one switch per model serves all its adapters.

    layers      the adapter layers
    wrappers    around whole modules that some adapters bring along, an output layer of their own for example
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._peft: Any = None
        self.refresh()

    def refresh(self) -> None:
        """Looks for the adapter layers again, after one was added."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        modules = list(self._model.modules())
        self.layers: list[Any] = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self.wrappers: list[Any] = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        self._selected: str | None = "?"  # unknown, so that the first selection is carried out

    @property
    def is_empty(self) -> bool:
        """Whether the model carries no adapter."""
        return not self.layers and not self.wrappers

    def select(self, adapter: str | None) -> None:
        """From now on the model computes with this adapter, or bare."""
        if adapter == self._selected:
            return
        for layer in (*self.layers, *self.wrappers):
            layer.enable_adapters(adapter is not None)
        if adapter is not None:
            for layer in self.layers:
                layer.set_adapter([adapter], inference_mode=True)
            for wrapper in self.wrappers:
                wrapper.set_adapter([adapter] if adapter in wrapper._adapters else [], inference_mode=True)
        self._selected = adapter

    def attach(self, name: str, directory: Path) -> str:
        """Loads an adapter from its directory onto the model; returns the name by which to select it.

        raises    MemberMismatch when it does not fit, UnreadableModel when it cannot be read
        """
        import peft

        config = read_config(name, directory)
        adapter = f"{re.sub(r'[^A-Za-z0-9]', '_', name)}_{self._count()}"
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
        if missing or result.unexpected_keys:
            keys = missing or list(result.unexpected_keys)
            raise UnreadableModel(
                f"the adapter '{name}' ({directory}) does not fill its layers: {len(missing)} weights are missing, "
                f"{len(result.unexpected_keys)} have no place (such as {keys[0]}).",
                "An adapter with missing weights would silently be another one.",
                "save the adapter again with save_pretrained.",
            )
        self._model.eval()
        self.refresh()
        return adapter

    def _count(self) -> int:
        return 0 if self._peft is None else len(self._peft.peft_config)

    def _device(self) -> str:
        return str(next(self._model.parameters()).device)


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
