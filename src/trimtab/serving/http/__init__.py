"""`trimtab serve`: what stands in front of, beside and behind vLLM's OpenAI-compatible server."""
