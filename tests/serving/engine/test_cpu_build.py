"""The development plug-in of `tools/vllm_cpu`."""

from llvmlite import binding
from trimtab_vllm_cpu import hide_llvmlite_fields


def test_llvmlite_shows_vllm_no_fields_and_keeps_its_functions():
    for _ in range(2):  # vLLM may call a plug-in again
        hide_llvmlite_fields()
        assert not hasattr(binding.ffi.lib, "__dict__")
    assert binding.ffi.lib.LLVMPY_GetVersionInfo() > 0
