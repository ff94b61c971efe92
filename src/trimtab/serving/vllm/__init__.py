"""A fused directory as a vLLM model: what vLLM loads, runs, and needs to have patched."""
