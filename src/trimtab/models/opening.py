"""Opens one checkpoint as a text model: complete, from safetensors or GGUF, without code of others.

`load_model` reads the weights. `load_outline` makes the same model on the meta device, from configuration and headers:
modules, shapes and number types, and no weight, so it takes seconds and little memory for a model of any size.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import TrimtabError, UnreadableModel, lines_of
from trimtab.models import checkpoint, kinds, quantization

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' names for device maps
BRING_CONFIG = "bring back the config.json that belongs to these weights."
PIP = re.compile(r"pip install (?:-U )?[`'\"]?([\w\[\],.=<>-]+)")  # in transformers' messages


def load_model(
    name: str,
    directory: Path,
    dtype: Any = "auto",
    device: Any = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
) -> Any:
    """A causal language model, complete: no weight missing, none reinitialised, no foreign code.

    directory             of the checkpoint, or a .gguf file
    device                None: the CPU; a device, a name in SPREADING, or a device map of this model
    quantization_config   of transformers, to quantize while loading; None: as stored
    max_memory            {device: bytes or "20GiB"}, for a device in SPREADING
    raises                UnreadableModel when weights are missing or have another shape, or the files cannot be read;
                          MissingPackage; MemberMismatch for what is no causal language model
    """
    config = kinds.read_config(name, directory)
    opener = kinds.auto_class(name, config)
    stored = None if directory.is_file() else getattr(config, "quantization_config", None)
    method = quantization.method_of(quantization_config if stored is None else stored)
    quantization.check_packages(name, "gguf" if directory.is_file() else method)
    options: dict[str, Any] = {"gguf_file": directory.name} if directory.is_file() else {"use_safetensors": True}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if is_spread(device):
        quantization.check_installed(name, "is spread over devices", {"accelerate": "accelerate"})
        options |= {"device_map": device, "max_memory": dict(max_memory) if max_memory else None}
    elif method is not None:
        options["device_map"] = {"": "cpu" if device is None else device}  # quantized weights do not move afterwards
    try:
        with quiet_bars():
            model, info = opener.from_pretrained(
                str(directory.parent if directory.is_file() else directory),
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # from safetensors' own to ValueError for settings that a quantizer refuses
        raise load_failure(name, directory, error) from error
    check_complete(name, directory, info)
    kinds.check_loaded(name, model)
    return (model if device is None or is_spread(device) or method is not None else model.to(device)).eval()


def is_spread(device: Any) -> bool:
    """Whether a device setting of one member lets transformers spread it: "auto" and its kin, or a device map."""
    return isinstance(device, Mapping) or (isinstance(device, str) and device in SPREADING)


def load_outline(name: str, directory: Path, dtype: Any = "auto") -> Any:
    """The model that `load_model` gives, on the meta device: its weights are not read, its shapes are checked.

    Names and shapes of a quantized checkpoint are those of its packed weights, so they are not compared.
    """
    config = kinds.read_config(name, directory)
    opener = kinds.auto_class(name, config)
    is_packed = directory.is_file() or getattr(config, "quantization_config", None) is not None
    model_class, config = _class_for(opener, config)
    try:
        if is_packed:
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            number_type = (config.dtype or torch.float32) if dtype in (None, "auto") else dtype
            with torch.device("meta"):
                model = model_class._from_config(config, dtype=number_type)
        else:
            stored = checkpoint.tensors(directory)
            headers = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in stored.items()}
            with quiet_bars():
                model, info = model_class.from_pretrained(
                    None, config=config, state_dict=headers, dtype=dtype, device_map="meta", output_loading_info=True
                )
            check_complete(name, directory, info)
        if not directory.is_file():
            model.generation_config = _generation_config(directory)
    except TrimtabError:
        raise
    except Exception as error:
        raise load_failure(name, directory, error) from error
    model.name_or_path = str(directory)
    return model.eval()


def _class_for(opener: Any, config: Any) -> tuple[Any, Any]:
    """The model class that an Auto class opens a configuration with, and the part of it that the class reads."""
    from transformers.models.auto.auto_factory import _get_model_class

    model_class = _get_model_class(config, opener._model_mapping)
    text_class = config.sub_configs.get("text_config")
    return model_class, config.get_text_config() if text_class and model_class.config_class is text_class else config


def _generation_config(directory: Path) -> Any:
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):
        return GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return GenerationConfig.from_pretrained(
        str(directory), config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


def check_complete(name: str, directory: Path, info: Mapping[str, Iterable[Any]]) -> None:
    """Raises UnreadableModel where transformers' loading report says that weights are missing or of another shape."""
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise UnreadableModel(
            f"member '{name}' ({directory}) lacks {len(missing)} of its weights, such as {missing[0]}.",
            "Loading would fill them with random numbers.",
            "write the directory again with save_pretrained, from a model with its output layer "
            "(AutoModelForCausalLM), or fetch the checkpoint again.",
        )
    changed = sorted(str(key[0]) for key in info["mismatched_keys"])
    if changed:
        raise UnreadableModel(
            f"{len(changed)} weights of member '{name}' ({directory}) have other shapes than its config.json says: "
            f"{changed[0]}.",
            "Loading would fill them with random numbers.",
            BRING_CONFIG,
        )


def load_failure(name: str, directory: Path, error: Exception) -> TrimtabError:
    """What a failed load means and what to do, from transformers' error."""
    text = " ".join(lines_of(error))
    packages = PIP.findall(text)
    if isinstance(error, ImportError) or packages:
        return quantization.missing_package(name, f"cannot be loaded ({lines_of(error)[0]})", packages or ["a package"])
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return UnreadableModel(
            f"member '{name}' ({directory}) does not fit: {lines_of(error)[0]}",
            "Each member needs room for its weights on its device.",
            "device='auto' spreads it over what there is; a narrower dtype or a quantization_config makes it smaller.",
        )
    if "ignore_mismatched_sizes" in text:
        return UnreadableModel(
            f"some weights of member '{name}' ({directory}) have other shapes than its config.json says.",
            "Loading would fill them with random numbers.",
            BRING_CONFIG,
        )
    return UnreadableModel(
        f"member '{name}' cannot be loaded from '{directory}': {lines_of(error)[0]}",
        "A member is a causal language model that transformers knows, in safetensors; no code of others is run.",
        f"see whether {kinds.OPENS_ALONE} opens it by itself, and fetch the checkpoint again if it does not.",
    )


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Loading bars only on a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
