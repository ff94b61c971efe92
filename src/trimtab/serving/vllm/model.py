"""A fused directory as one vLLM model: each distinct member is an inner vLLM model with its own paged key-value cache.

`forward` hands on the members' hidden states side by side; `compute_logits` turns them into members' logits and fuses
those. So everything that vLLM does after the logits (sampling, log-probabilities, structured output, verification of
drafts) sees the fused distribution.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config

from trimtab.core.errors import BadSetting
from trimtab.models.adapter_merge import merged
from trimtab.serving.batch_fusion import draft_rows, fuse_rows
from trimtab.serving.vllm.head_padding import pad_attention
from trimtab.serving.vllm.patches import apply_patches
from trimtab.serving.vllm.plan import Body, check_body, check_complete, make_plan
from trimtab.serving.vllm.plugin import series_of

LOAD_FORMATS = ("auto", "safetensors")


class FusedForVllm(nn.Module):
    """Strong + strategy(experts - base); registered for the architecture that a fused directory names."""

    steering: Any = None  # a `steering.Steering` where requests may have settings of their own

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _refuse_other_formats(vllm_config.load_config)
        fused = vllm_config.model_config
        self.plan = make_plan(fused.hf_config, _local(fused.model))
        self.load_config = vllm_config.load_config
        self.configs: dict[str, Any] = {}  # body -> its ModelConfig
        self.widths: list[int] = []
        for body in self.plan.bodies:
            config = get_config(str(body.directory), trust_remote_code=False)
            if body.rows is not None:
                config.get_text_config(decoder=True).vocab_size = body.rows
            rows = self.plan.vocabulary.rows_needed(body.member)
            check_body(body, config, rows, vllm_config.parallel_config.tensor_parallel_size)
            name = maybe_prefix(prefix, body.key)
            own = _config_of(body, name, config, vllm_config)
            # Compiled code is kept by tag: under one tag, bodies of one architecture would take each other's.
            with set_model_tag(f"trimtab_{body.key}"):
                model = init_vllm_registered_model(own, prefix=name)
            pad_attention(model, body)
            self.add_module(body.key, model)
            self.configs[body.key] = own.model_config
            self.widths.append(own.model_config.get_hidden_size())
        if self.plan.drafter is not None:
            _refuse_unlike_windows(vllm_config)
        apply_patches(self, series_of(vllm.__version__), current_platform.is_cpu())

    @property
    def bodies(self) -> list[Any]:
        """The inner models, the strong one first."""
        return [self.get_submodule(body.key) for body in self.plan.bodies]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The strong model's embeddings [token, width]; vLLM asks every model for them."""
        return self.bodies[0].embed_input_ids(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """All bodies' hidden states after the last layer, side by side: [token, sum of widths]."""
        if input_ids is None or inputs_embeds is not None:
            raise BadSetting(
                "a prompt came as embeddings.", "Members differ in width, so they read tokens.", "send token ids."
            )
        vocabulary = self.plan.vocabulary
        return torch.cat(
            [
                model(vocabulary.read(body.member, input_ids), positions)
                for body, model in zip(self.plan.bodies, self.bodies, strict=True)
            ],
            dim=-1,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Fused logits [row, vocab], float32; None on processes that get no logits.

        Their softmax is the fused distribution, and their zero point is the strong model's. A drafter's are
        log-probabilities: vLLM applies no penalty to them.

        hidden_states   [row, sum of widths], rows of what `forward` returned
        """
        parts = torch.split(hidden_states, self.widths, dim=-1)
        # Every process takes part in gathering every body's logits, before any of them may leave.
        logits = [body.compute_logits(part.contiguous()) for body, part in zip(self.bodies, parts, strict=True)]
        if any(scores is None for scores in logits):
            return None
        plan = self.plan
        aligned = zip(plan.bodies, logits, strict=True)
        logits = [plan.vocabulary.align(body.member, scores) for body, scores in aligned]
        if plan.drafter is not None:
            return draft_rows(logits, plan.body_of, plan.drafter, plan.vocab_size)
        if self.steering is not None:
            return self.steering.fuse(logits, hidden_states)  # type: ignore[no-any-return]
        return fuse_rows(logits, plan.body_of, plan.strategy, plan.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fills every body from its own directory; returns the names of all parameters filled.

        weights   those of the fused directory: it holds references and no weights, so they are not asked for
        raises    UnreadableModel when weights of a member are missing
        """
        only = copy.copy(self.load_config)
        only.load_format = "safetensors"  # "auto" would go on to pickles where it finds none
        loader = DefaultModelLoader(only)
        filled = set()
        for body, model in zip(self.plan.bodies, self.bodies, strict=True):
            config = copy.copy(self.configs[body.key])
            with merged(body.member, body.directory, body.adapter) as directory:
                config.model = str(directory)
                loaded = model.load_weights(loader.get_all_weights(config, model))
            names = [name for name, _ in model.named_parameters()]
            check_complete(body, names, loaded)
            filled |= {f"{body.key}.{name}" for name in names}
        return filled


def _refuse_other_formats(load_config: Any) -> None:
    """`pt` and `npcache` open pickles, which may run code; others know one directory only, or read nothing at all."""
    if load_config.load_format not in LOAD_FORMATS:
        raise BadSetting(
            f"load_format is '{load_config.load_format}'.",
            "Members are read from safetensors, each from its own directory.",
            "leave load_format out.",
        )


def _refuse_unlike_windows(vllm_config: VllmConfig) -> None:
    """vLLM wants a drafter's layers in one group of key-value caches, and groups layers of unlike windows by counts."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    windows = {layer.sliding_window for layer in layers if isinstance(layer, Attention)}
    if len(windows) > 1 and not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise BadSetting(
            "a member drafts, and some layers' attention has a sliding window, others' has none or another one.",
            "vLLM drafts only where all layers keep their key-value caches alike.",
            "pass disable_hybrid_kv_cache_manager=True (--disable-hybrid-kv-cache-manager).",
        )


def _local(directory: str) -> Path:
    if not Path(directory).is_dir():
        raise BadSetting(
            f"'{directory}' is no directory here.",
            "References to members start at the fused directory.",
            "fetch it first, for example with `hf download`, and pass the local path.",
        )
    return Path(directory)


def _config_of(body: Body, name: str, config: Any, vllm_config: VllmConfig) -> VllmConfig:
    """vLLM's configuration as one member must see it, under the name that its layers have."""
    own = vllm_config.with_hf_config(config, architectures=config.architectures)
    model = own.model_config
    model.model, model.revision = str(body.directory), None
    # with_hf_config leaves the outer text configuration in place, and sizes would be read from that.
    model.hf_text_config = model.hf_config.get_text_config(decoder=True)
    model.model_arch_config = model.get_model_arch_config()
    # Layers that name no window of their own take the cache's, which was read from the fused configuration.
    own.cache_config = copy.copy(vllm_config.cache_config)
    types = getattr(model.hf_text_config, "layer_types", None)
    is_all_sliding = types is None or all(kind == "sliding_attention" for kind in types)
    own.cache_config.sliding_window = model.get_sliding_window() if is_all_sliding else None
    # Compiled code is kept on disk by what the configuration says, and calls attention layers by name. A base and an
    # adapter on it say the same: without their names the one would read the other's key-value cache.
    own.additional_config = {**_mapping(own.additional_config), "trimtab_body": name}
    return own


def _mapping(additional_config: Any) -> dict[str, Any]:
    if not isinstance(additional_config, dict):
        raise BadSetting(
            f"additional_config is a {type(additional_config).__name__}.",
            "Members are told apart by an entry in it.",
            "pass a mapping.",
        )
    return additional_config
