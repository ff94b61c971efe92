"""Models on disk and in memory, as every space needs them: references, loading, adapters, vocabularies, prompts."""
