"""What an engine must hold to serve a fused directory: bodies to run, and which of them each member is.

Nothing here knows vLLM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import BadSetting, UnreadableModel, VocabularyMismatch
from trimtab.logits import saving
from trimtab.logits.config import FusedConfig
from trimtab.logits.speculation.draft import Drafter, canonical_rule, check_rule, drafter_for
from trimtab.logits.strategy.fusion import Strategy, strategy_from_dict
from trimtab.models import checkpoint, references
from trimtab.models.loading import adapter_base
from trimtab.models.token_ids import FusedVocabulary

DRAFTER = "drafter"  # in config.json: who drafts, a member or a rule; fused directories have no such entry


@dataclass(frozen=True)
class Body:
    """One model that reads the tokens.

    key         its name as a module: never a bare number, from which vLLM would count layers
    member      the first member that it serves, for messages
    directory   configuration and weights
    adapter     the PEFT adapter to be merged into these weights; None: they are taken as they are
    rows        of the embeddings that the adapter brings; None: as many as the configuration says
    """

    key: str
    member: str
    directory: Path
    adapter: Path | None = None
    rows: int | None = None


@dataclass(frozen=True)
class ServingPlan:
    """A fused directory, checked and made definite.

    bodies      each distinct model once, the strong one first
    body_of     for strong, base and each expert: its place in `bodies`; for a drafter: for each of its members
    vocabulary  which ids are fused, and what members read and score for them
    drafter     set where the directory is that of a drafter (see `drafting`): it answers with its own distribution,
                not the fused one, and only its members are run
    """

    bodies: tuple[Body, ...]
    body_of: tuple[int, ...]
    strategy: Strategy
    vocabulary: FusedVocabulary
    drafter: Drafter | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of the fused logits; padding rows beyond them are cut."""
        return self.vocabulary.size


def make_plan(config: FusedConfig, directory: Path) -> ServingPlan:
    """The bodies and the strategy that a fused directory's configuration names.

    directory   where relative references start
    raises      UnreadableModel, MemberMismatch when a member has changed, OfflineError; BadSetting and UnreadableModel
                for what vLLM cannot run: prompts of a member's own, quantized members
    """
    _refuse_own_prompts(config)
    strong, base, experts = saving.references_of(config)
    strategy = strategy_from_dict(config.strategy or {}, tuple(experts))
    drafter = _drafter_of(config, strategy)
    keys = {"strong": "strong", "base": "base", **{name: f"expert_{index}" for index, name in enumerate(experts)}}
    named = {"strong": strong, "base": base, **experts}
    paths = {name: _locate(name, reference, directory) for name, reference in named.items()}
    under = {name: _without_adapter(name, paths[name]) for name in ("strong", "base")}
    vocabulary = FusedVocabulary.from_dict(config.vocab_size, config.vocabulary)
    bodies: dict[tuple[Path, Path | None, str], Body] = {}
    body_of = []
    for name in named if drafter is None else drafter.members:
        path = paths[name]
        # An expert's adapter sits on the base model, without the adapter that the base itself may be.
        weights, adapter = (under.get(name, under["base"]), path) if checkpoint.is_adapter(path) else (path, None)
        _refuse_quantized(name, weights)
        # A model whose ids stand for other tokens in another member is read twice.
        key = (weights, adapter, vocabulary.key(name))
        bodies.setdefault(key, Body(keys[name], name, weights, adapter, vocabulary.ids_of(name).resized))
        body_of.append(list(bodies).index(key))
    return ServingPlan(tuple(bodies.values()), tuple(body_of), strategy, vocabulary, drafter)


def _drafter_of(config: FusedConfig, strategy: Strategy) -> Drafter | None:
    rule = getattr(config, DRAFTER, None)
    if rule is None:
        return None
    rule, names = canonical_rule(rule), strategy.expert_names
    check_rule(rule, names)
    return drafter_for(rule, names, strategy, torch.zeros(len(names)))


def _locate(name: str, reference: references.Reference, directory: Path) -> Path:
    found, path = references.locate(reference, beside=directory)
    checkpoint.check_directory(path)
    references.check_digest(name, found, path)
    if path.is_file():
        raise UnreadableModel(
            f"member '{name}' is a GGUF file ('{path}').",
            "vLLM's engine reads members from directories of safetensors.",
            "take the member's safetensors, or use the transformers engine.",
        )
    return path


def _refuse_own_prompts(config: FusedConfig) -> None:
    own = [name for name, form in (config.prompts or {}).items() if form]
    if own:
        raise BadSetting(
            f"{', '.join(own)} read prompts of their own.",
            "vLLM feeds every member the same tokens at the same positions.",
            "fuse again without prompts, or use the transformers engine (`trimtab batch --engine transformers`).",
        )


def _without_adapter(name: str, path: Path) -> Path:
    """The model of a strong or base member: its directory, or the one that its adapter names."""
    return adapter_base(name, path) if checkpoint.is_adapter(path) else path


def _refuse_quantized(name: str, directory: Path) -> None:
    is_file = directory.is_file()  # GGUF
    config = {} if is_file else checkpoint.read_json(directory / "config.json")
    parts = (config, config.get("text_config") or {})
    if is_file or any(part.get("quantization_config") for part in parts):
        raise UnreadableModel(
            f"member '{name}' ({directory}) is quantized.",
            "vLLM keeps one quantization for a whole model, and serves all members in the engine's number type.",
            "take the member's unquantized weights, or use the transformers engine (`trimtab batch --engine "
            "transformers`).",
        )


def check_body(body: Body, config: Any, vocab_size: int, tensor_parallel: int) -> None:
    """Refuses a member that cannot be run as asked, naming it.

    config            the member's configuration, as transformers reads it
    vocab_size        rows that its output layer must have
    tensor_parallel   processes that share each member
    raises            VocabularyMismatch, BadSetting
    """
    text = config.get_text_config(decoder=True)
    if text.vocab_size < vocab_size:
        raise VocabularyMismatch(
            f"member '{body.member}' scores {text.vocab_size} tokens, {vocab_size} are fused.",
            "The fused directory says that the member knows them.",
            "fuse again.",
        )
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    # Key-value heads may also be repeated, where there are fewer of them than processes.
    if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        raise BadSetting(
            f"member '{body.member}' has {heads} attention heads and {kv_heads} key-value heads, which "
            f"{tensor_parallel} processes cannot share.",
            "Tensor parallelism splits the heads of every member.",
            "choose a tensor_parallel_size that divides the heads of all members.",
        )


def check_complete(body: Body, wanted: Iterable[str], loaded: Iterable[str] | None) -> None:
    """Refuses a member of which some weights were not in its files.

    wanted   names of its parameters
    loaded   those that were filled; None: the architecture does not tell
    raises   UnreadableModel, naming member and weight
    """
    missing = sorted(set(wanted) - set(loaded)) if loaded is not None else []
    if missing:
        raise UnreadableModel(
            f"member '{body.member}' ({body.directory}) lacks {len(missing)} of its weights, such as {missing[0]}.",
            "Loading would leave them random.",
            "write the directory again with save_pretrained.",
        )
