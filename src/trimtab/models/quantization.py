"""Quantized members: which packages a method needs, and how a setting is given for all members or for one."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from trimtab.core.errors import MissingPackage

# quant_method in config.json -> {module: its name for pip}, as transformers' `quantizers` ask for them.
PACKAGES: dict[str, dict[str, str]] = {
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "awq": {"gptqmodel": "gptqmodel"},
    "torchao": {"torchao": "torchao"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "aqlm": {"aqlm": "aqlm[gpu,cpu]"},
    "auto-round": {"auto_round": "auto-round"},
    "eetq": {"kernels": "kernels"},
    "vptq": {"vptq": "vptq"},
    "spqr": {"spqr_quant": "spqr_quant[gpu]"},
    "quark": {"quark": "amd-quark"},
    "fbgemm_fp8": {"fbgemm_gpu": "fbgemm-gpu"},
    "sinq": {"sinq": "sinq"},
    "gguf": {"gguf": "gguf"},
}
ONE_CONFIG = ("quant_method", "load_in_4bit", "load_in_8bit")  # keys of a quantization config, not names of members


def method_of(config: Any) -> str | None:
    """The name of the method in a quantization config (an object of transformers, or its dictionary); None: none."""
    if config is None:
        return None
    content = config if isinstance(config, Mapping) else config.to_dict()
    if content.get("load_in_4bit") or content.get("load_in_8bit"):
        return "bitsandbytes"
    method = content.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def has_packed_layers(model: nn.Module) -> bool:
    """Whether torch.ao has put quantized layers into a model (`quantize_dynamic`); their weights are no parameters."""
    return any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules())


def is_per_member(given: Any) -> bool:
    """Whether a setting is {member: quantization config}."""
    return isinstance(given, Mapping) and not any(key in given for key in ONE_CONFIG)


def check_packages(name: str, method: str | None) -> None:
    """Raises MissingPackage, with the line for pip, where a method's packages are not installed."""
    if method is not None:
        wanted = PACKAGES.get(method, {}) | {"accelerate": "accelerate"}
        check_installed(name, f"is quantized with {method}", wanted)


def check_installed(name: str, why: str, wanted: Mapping[str, str]) -> None:
    """Raises MissingPackage where one of these modules {module: its name for pip} is not installed."""
    missing = [pip for module, pip in wanted.items() if not _is_installed(module)]
    if missing:
        raise missing_package(name, why, missing)


def missing_package(name: str, why: str, packages: list[str]) -> MissingPackage:
    """The error for a member that needs packages which are not installed."""
    return MissingPackage(
        f"member '{name}' {why}, which needs {' and '.join(packages)}: not installed.",
        "transformers reads such checkpoints with that package's code.",
        f"pip install {' '.join(packages)}, or take the member's unquantized weights.",
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package inside one that is not there
        return False
