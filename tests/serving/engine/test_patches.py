"""Every row of `patches` is still needed: vLLM shows the bug without it, and not with it."""

import subprocess
import sys
from functools import cache

import pytest
import torch
import vllm
from engines import engine, runner_of, served
from vllm import SamplingParams
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import tiny
from on_disk import save_models
from trimtab import FusedCausalLM
from trimtab.serving.vllm.patches import PATCHES, is_misaligned
from trimtab.serving.vllm.plugin import series_of
from trimtab.serving.vllm.speculative_config import speculative_config

STEP_TOKENS = 32
PROMPT = list(range(4, 14)) * 5  # of several steps


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Drafts, and prompts that are read in parts."""
    folder = tmp_path_factory.mktemp("patched")
    base = tiny.make(seed=1)
    save_models(folder, strong=tiny.make(seed=0, width=128), base=base, math=tiny.tuned(base, 10))
    members = (str(folder / "strong"), str(folder / "base"), {"math": str(folder / "math")})
    FusedCausalLM.from_members(*members).save_pretrained(folder / "fused")
    drafting = speculative_config(folder / "fused", "math", tokens=4)
    with engine(
        folder / "fused", speculative_config=drafting, max_num_batched_tokens=STEP_TOKENS, max_num_seqs=4
    ) as llm:
        yield llm


def has_draft_settings_bug(llm, monkeypatch, is_patched):
    expand = rejection_sampler.expand_kernel.func if is_patched else cpu_triton_utils._expand_kernel_impl
    output = torch.full((2,), -1.0)
    expand(output, torch.tensor([0.7]), torch.tensor([2], dtype=torch.int32), 0, 1)
    return output.tolist() != pytest.approx([0.7, 0.7])


ROTATES = """
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
for size in (32, 24):
    heads, cache = torch.ones(1, size, dtype=torch.bfloat16), torch.ones(8, size, dtype=torch.bfloat16)
    for start in range(4):  # some of these heads lie where the kernel must not store
        torch.ops._C.rotary_embedding(torch.tensor([start]), heads, heads.clone(), size, cache, True)
    print("rotated", size, flush=True)
"""


@cache
def rotated():
    """Of 32 and 24, the sizes of heads that the kernel rotates before it kills its process."""
    ran = subprocess.run([sys.executable, "-c", ROTATES], capture_output=True, text=True)
    assert ran.returncode <= 0, ran.stderr[-2000:]  # killed by a signal, or done
    return [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("rotated")]


def has_rotary_halves_bug(llm, monkeypatch, is_patched):
    size = 32 if is_patched else 24  # the patch leaves 24 to torch
    assert is_misaligned(size, torch.bfloat16) is not is_patched
    return size not in rotated()


def has_whole_drafts_bug(llm, monkeypatch, is_patched):
    runner, longest = runner_of(llm), []
    take = GPUModelRunner.take_draft_token_ids if is_patched else GPUModelRunner.take_draft_token_ids.__wrapped__

    def noting(self):
        drafted = take(self)
        for request, draft in zip(drafted.req_ids, drafted.draft_token_ids, strict=True):
            state = self.requests[request]
            longest.append(len(draft) - (state.sampling_params.max_tokens - len(state.output_token_ids)))
        return drafted

    monkeypatch.setattr(type(runner), "take_draft_token_ids", noting)
    served(llm, [PROMPT[:8]], max_tokens=4, logprobs=None, ignore_eos=True)
    return max(longest) > 0


def has_seeded_prompts_in_parts_bug(llm, monkeypatch, is_patched):
    if not is_patched:
        for name in ("_sample", "_bookkeeping_sync"):
            monkeypatch.setattr(CPUModelRunner, name, getattr(CPUModelRunner, name).__wrapped__)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=2)
    try:
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    except RuntimeError as error:
        return "offset" in str(error)
    return False


BUGS = {
    "draft settings": has_draft_settings_bug,
    "rotary halves": has_rotary_halves_bug,
    "whole drafts": has_whole_drafts_bug,
    "seeded prompts in parts": has_seeded_prompts_in_parts_bug,  # last: it ends the engine
}


def test_every_row_has_a_test():
    assert set(BUGS) == {patch.name for patch in PATCHES}


@pytest.mark.parametrize("name", BUGS)
def test_vllm_shows_the_bug_without_the_patch_only(llm, monkeypatch, name):
    (patch,) = (patch for patch in PATCHES if patch.name == name)
    assert not BUGS[name](llm, monkeypatch, is_patched=True)
    monkeypatch.undo()
    assert BUGS[name](llm, monkeypatch, is_patched=False), f"vLLM {vllm.__version__} has no such bug: {patch.bug}"
    assert series_of(vllm.__version__) in patch.series


UNTOUCHED = """
import sys
from importlib import metadata
import llvmlite.binding.ffi as ffi
from vllm.utils import cpu_triton_utils
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

def state():
    methods = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync, GPUModelRunner.take_draft_token_ids
    return list(sys.meta_path), type(ffi.lib).__dict__.get("__getattr__"), cpu_triton_utils._expand_kernel_impl, methods

before = state()
from vllm.plugins import load_general_plugins
from vllm import ModelRegistry
load_general_plugins()
assert "FusedCausalLM" in ModelRegistry.get_supported_archs()
assert state() == before
assert "trimtab_vllm_cpu" not in sys.modules
"""


def test_the_plug_in_changes_nothing_until_a_fused_model_is_made(monkeypatch):
    """With the plug-ins that users have: the development environment's own is left out."""
    monkeypatch.setenv("VLLM_PLUGINS", "trimtab")
    ran = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
