"""Which of transformers' arguments mean something for a fused directory; all others are refused, never ignored.

Callers such as pipelines, the Trainer and evaluation harnesses pass many arguments at their defaults. A default asks
for nothing, so it passes; any other value would be lost in silence.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from trimtab.core.errors import BadSetting
from trimtab.logits.config import FusedConfig

ANY: tuple[Any, ...] = ()  # every value may be ignored

# Opening: what has an effect, and which values of the rest ask for nothing.
OPENING = (
    *("config", "dtype", "torch_dtype", "device", "device_map", "attn_implementation", "strategy"),
    *("one_pass", "output_loading_info", "generation_config", "quantization_config", "max_memory"),
)
IDLE_IN_OPENING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("_from_auto", "_from_pipeline", "_commit_hash", "low_cpu_mem_usage"), ANY),
    "offload_folder": ANY,  # safetensors are offloaded where they lie
    **dict.fromkeys(("cache_dir", "proxies", "gguf_file", "variant"), (None,)),
    **dict.fromkeys(("state_dict", "key_mapping", "tp_plan", "fusion_config"), (None,)),
    **dict.fromkeys(("trust_remote_code", "force_download", "local_files_only", "token"), (None, False)),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "ignore_mismatched_sizes", "use_kernels"), (None, False)),
    **dict.fromkeys(("use_safetensors", "weights_only"), (None, True)),
    **dict.fromkeys(("revision", "code_revision"), (None, "main")),
    "subfolder": (None, ""),
    "disable_mmap": (None, False),
}
IDLE_IN_SAVING: dict[str, tuple[Any, ...]] = {
    "is_main_process": (None, True, False),
    "save_function": ANY,  # saves weights, and there are none
    **dict.fromkeys(("state_dict", "variant", "token", "max_shard_size"), (None,)),
    **dict.fromkeys(("push_to_hub", "distributed_checkpoint"), (None, False)),
    **dict.fromkeys(("safe_serialization", "save_peft_format", "save_original_format"), (None, True)),
}
REASONS = {
    "trust_remote_code": "Code of others is never run.",
    "push_to_hub": "A fused directory names members of this machine.",
    "local_files_only": "Members may be hub ids; the environment variable HF_HUB_OFFLINE=1 keeps them off the network.",
    "token": "Members are fetched with the login of this machine; `hf auth login` changes it.",
    "cache_dir": "The environment variable HF_HOME moves the cache.",
    "revision": "A fused directory is a local one; members have revisions of their own.",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "quantization_config={'MEMBER': BitsAndBytesConfig(...)} does."),
    "gguf_file": "A member is a .gguf file by its path.",
}
NO_WEIGHTS = "A fused directory holds references to its members, no weights."
# What a configuration that the caller changed may say: the rest of it follows from the members.
FREE_IN_CONFIG = (
    *("strong", "base", "experts", "strategy", "prompts"),
    *("speculate", "speculate_draft", "one_pass", "use_cache", "dtype"),
)


def check_opening(positional: Collection[Any], given: Mapping[str, Any]) -> None:
    """Raises BadSetting for an argument of `from_pretrained` that would have no effect."""
    if positional:
        raise BadSetting(
            f"there are {len(positional)} more positional arguments than the directory.",
            "A fused model is made of its members alone.",
            "leave them out, or name them.",
        )
    given = dict(given)
    # The Auto classes always pass it, with the revision that they have resolved.
    adapter = given.pop("adapter_kwargs", None) or {}
    _check({f"adapter_kwargs['{k}']": v for k, v in adapter.items() if k != "revision" and v is not None}, (), {})
    _check(given, OPENING, IDLE_IN_OPENING)
    for pair in (("dtype", "torch_dtype"), ("device", "device_map")):
        if all(given.get(name) is not None for name in pair):
            raise BadSetting(f"both {pair[0]} and {pair[1]} are given.", "They mean the same.", f"leave {pair[1]} out.")
    if not isinstance(given.get("config"), FusedConfig | None):
        raise BadSetting(
            f"config is a {type(given['config']).__name__}.",
            "Expected: the FusedConfig of this directory, changed or not.",
            "leave it out.",
        )


def check_config(given: FusedConfig, found: FusedConfig) -> None:
    """Raises BadSetting when the caller changed something in the configuration that follows from the members."""
    ours, theirs = found.to_dict(), given.to_dict()
    for name in sorted(set(ours) | set(theirs)):
        is_free = name in FREE_IN_CONFIG or name.startswith("_") or name == "transformers_version"
        if not is_free and ours.get(name) != theirs.get(name):
            raise BadSetting(
                f"{name} is {theirs.get(name)!r} in the configuration, and {ours.get(name)!r} in the directory.",
                "It follows from the members.",
                f"only {', '.join(FREE_IN_CONFIG)} can be changed.",
            )


def check_saving(given: Mapping[str, Any]) -> None:
    """Raises BadSetting for an argument of `save_pretrained` that would have no effect."""
    _check(given, ("overwrite",), IDLE_IN_SAVING)


def _check(given: Mapping[str, Any], meaningful: Collection[str], idle: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in given.items():
        if name in meaningful or (name in idle and _asks_nothing(value, idle[name])):
            continue
        if name in idle:
            reason = REASONS.get(name, NO_WEIGHTS)
            raise BadSetting(f"{name} is set, which has no meaning for a fused model.", reason, "leave it out.")
        near = get_close_matches(name, meaningful, n=1)
        raise BadSetting(
            f"a fused model knows no argument '{name}'.",
            f"Known: {', '.join(meaningful)}." if meaningful else "",
            f"did you mean '{near[0]}'?" if near else "leave it out.",
        )


def _asks_nothing(value: Any, defaults: tuple[Any, ...]) -> bool:
    # `is`, because a tensor or a dictionary of them must not be compared; texts are the exception.
    return defaults is ANY or any(
        value is default or (isinstance(value, str) and value == default) for default in defaults
    )
