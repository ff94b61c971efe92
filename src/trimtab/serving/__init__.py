"""Fused directories opened by vLLM: a plug-in, found through the entry point `vllm.general_plugins`."""
