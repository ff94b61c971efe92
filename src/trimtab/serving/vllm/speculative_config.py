"""Speculation in vLLM: a small member drafts, the fused model verifies, and texts keep the fused distribution.

    LLM(directory, speculative_config=speculative_config(directory, "math"))

vLLM opens a drafter as a model of its own, from a directory. A member's own directory would not always do: adapters are
no models, padded vocabularies differ, and the kernels lack some head sizes. So a drafter is a directory in the user's
cache that holds nothing but a config.json: the fused directory's, with definite references and an entry `drafter`. The
plug-in opens it as it opens a fused directory, and runs the drafter's members only.

Source: Leviathan et al. 2023, arXiv 2211.17192, for drafts verified; Saxena 2023, prompt lookup decoding.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trimtab.core.errors import BadSetting, TrimtabError
from trimtab.core.files import atomic_directory
from trimtab.logits import saving
from trimtab.logits.config import FusedConfig
from trimtab.logits.speculation.draft import CHEAPEST, LEAST_NGRAM, NGRAM, PROMPT, RECENT
from trimtab.logits.speculation.length import FIRST, LONGEST
from trimtab.logits.speculation.plan import AUTO, Plan, too_small
from trimtab.models import checkpoint, references
from trimtab.models.references import Reference
from trimtab.serving.vllm.plan import DRAFTER, ServingPlan, make_plan

DRAFTER_ARCHITECTURE = "FusedDrafter"


class UnwritableCache(TrimtabError):
    """A drafter cannot be described, since the cache cannot be written."""


@dataclass(frozen=True)
class Speculation:
    """How vLLM speculates on a fused directory.

    config    what vLLM takes as `speculative_config`; None: it decodes token by token
    remark    one sentence: who drafts, or why nobody does
    """

    config: dict[str, Any] | None
    remark: str


def speculative_config(directory: str | os.PathLike[str], member: str, tokens: int = FIRST) -> dict[str, Any]:
    """What vLLM takes as `speculative_config`, so that this member or rule drafts for the fused model of a directory.

    member    "base" or an expert's name, adapters too; "mixture", "fused" or "prompt" (see `trimtab list`, drafters)
    tokens    how many a draft has
    raises    UnknownName; BadSetting for a length out of range; what `make_plan` raises
    """
    path = Path(os.fspath(directory))
    config = saving.read_config(path)
    _, _, experts = saving.references_of(config)
    member = Plan(tokens, member).check(tuple(experts)).draft
    if tokens == 0:
        raise BadSetting("a draft has 0 tokens.", f"Expected: 1 to {LONGEST}.", f"pass tokens={FIRST}.")
    if member == PROMPT:
        return _told("ngram", tokens, prompt_lookup_max=NGRAM, prompt_lookup_min=LEAST_NGRAM)
    rule = _settled(member, path, config)
    # Drafts are the drafter's likeliest tokens. With "draft_sample_method": "probabilistic" they would be accepted more
    # often where requests sample, but vLLM 0.32 draws them without the requests' seeds.
    return _told("draft_model", tokens, model=str(drafter_directory(path, rule)))


def _told(method: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"method": method, "num_speculative_tokens": tokens, **more}


def translated(
    directory: str | os.PathLike[str],
    speculate: str | int | None = None,
    draft: str | None = None,
    are_windows_masks: bool = False,
) -> Speculation:
    """What the settings of speculation mean for vLLM.

    speculate           "auto", 0 or the number of tokens that a draft has; None: as the directory says
    draft               who drafts; None: as the directory says
    are_windows_masks   whether the engine gets disable_hybrid_kv_cache_manager, with which unlike windows do not matter
    raises              as `speculative_config`

    vLLM keeps one length and one drafter for as long as it runs. So "auto" stands for drafts of one length where the
    members' sizes say that they pay, and none where not, where layers' attention windows differ and are no masks, or
    where the cache cannot hold a drafter; as drafters "auto" and "recent" stand for the first expert, full ones before
    adapters.
    """
    path = Path(os.fspath(directory))
    config = saving.read_config(path)
    _, _, experts = saving.references_of(config)
    chosen = Plan(
        config.speculate if speculate is None else speculate, config.speculate_draft if draft is None else draft
    ).check(tuple(experts))
    if chosen.speculate == 0:
        return Speculation(None, "Nobody drafts: speculate is 0.")
    rule = _settled(chosen.draft, path, config)
    if chosen.speculate == AUTO:
        bodies = [body.directory for body in make_plan(config, path).bodies]  # once: it looks at every member's file
        why_not = _why_not_pay(bodies[0], path, config, rule)
        if why_not is None and not are_windows_masks:
            why_not = _why_not_can(bodies, rule)
        if why_not is not None:
            return Speculation(None, f"Nobody drafts: {why_not}.")
    tokens = FIRST if chosen.fixed_length is None else chosen.fixed_length
    who = "The text's own n-grams draft" if rule == PROMPT else f"'{rule}' drafts"
    is_ours = chosen.draft in (CHEAPEST, RECENT)
    instead = f", in the place of '{chosen.draft}': vLLM keeps one drafter" if is_ours else ""
    try:
        told = speculative_config(path, rule, tokens)
    except UnwritableCache as error:
        if chosen.speculate != AUTO:
            raise
        return Speculation(None, f"Nobody drafts: {error.found}")
    return Speculation(told, f"{who} {tokens} tokens at a time{instead}.")


def _settled(rule: str, path: Path, config: FusedConfig) -> str:
    """A rule that holds while the engine runs: "auto" and "recent" become the first full expert, or adapter."""
    if rule not in (CHEAPEST, RECENT):
        return rule
    _, _, experts = saving.references_of(config)
    full = [name for name, part in experts.items() if not checkpoint.is_adapter(references.locate(part, path)[1])]
    return next(iter((*full, *experts, "base")))


def _why_not_pay(strong: Path, path: Path, config: FusedConfig, rule: str) -> str | None:
    """Why drafts cannot pay, judged by what one token costs the members; None when they may."""
    return too_small(_bytes(strong), 0 if rule == PROMPT else sum(map(_bytes, _read_by(path, config, rule))))


def _why_not_can(bodies: Sequence[Path], rule: str) -> str | None:
    """Why vLLM could not open a drafter as it is set by default: it wants all layers' key-value caches alike then."""
    if rule == PROMPT or len({window for body in bodies for window in _windows(body)}) == 1:
        return None
    return (
        "some layers' attention has a sliding window, others' has none or another one "
        "(set vLLM's option disable_hybrid_kv_cache_manager to let members draft)"
    )


def _windows(directory: Path) -> set[int | None]:
    """The sliding windows of a member's layers; None where a layer sees everything."""
    text = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    return {window if kind == "sliding_attention" else None for kind in kinds} if kinds else {window}


def is_least_kept_too_long(least: int | None, most: int | None) -> bool:
    """Whether vLLM would answer a request wrongly, and without an error, beside drafts.

    least, most   min_tokens and max_tokens

    It forbids the end in the token behind a whole draft for as long as a text was too short before that draft.
    """
    return (least or 0) > 1 and least != most


def _read_by(path: Path, config: FusedConfig, rule: str) -> list[Path]:
    return [body.directory for body in _drafting_plan(path, config, rule).bodies]


def _bytes(directory: Path) -> int:
    """Bytes of weights that one token has to go through, as they are stored."""
    return sum(file.stat().st_size for file in checkpoint.weight_files(directory))


def _drafting_plan(path: Path, config: FusedConfig, rule: str) -> ServingPlan:
    return make_plan(FusedConfig(**config.to_dict() | {DRAFTER: rule}), path)


def drafter_directory(directory: Path, rule: str) -> Path:
    """The directory that vLLM opens as draft model: a config.json in the cache, written once for each content.

    directory   a fused directory
    rule        a member's name, "mixture" or "fused"
    raises      UnwritableCache; what `make_plan` raises
    """
    config = saving.read_config(directory)
    plan = _drafting_plan(directory, config, rule)  # refuses what could not be opened, before the engine starts
    # vLLM keeps the last hidden states of a drafter; ours hands on those of its members side by side.
    config.hidden_size = sum(_width(body.directory) for body in plan.bodies)
    strong, base, experts = saving.references_of(config)
    config.strong, config.base = (_definite(part, directory) for part in (strong, base))
    config.experts = [{"name": name, **_definite(part, directory)} for name, part in experts.items()]
    config.architectures = [DRAFTER_ARCHITECTURE]
    setattr(config, DRAFTER, rule)
    content = config.to_json_string(use_diff=True)
    target = cache_directory() / "drafters" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if (target / "config.json").is_file():
        return target
    try:
        with atomic_directory(target, replaced=()) as beside:
            (beside / "config.json").write_text(content, encoding="utf-8")
    except OSError as error:
        raise UnwritableCache(
            f"the drafter's description cannot be written to '{target}': {error.strerror or error}.",
            "vLLM opens a drafter from a directory; it holds a few kilobytes.",
            "point XDG_CACHE_HOME to a directory that can be written.",
        ) from error
    return target


def _width(directory: Path) -> int:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return int(config.get_text_config(decoder=True).hidden_size)


def _definite(reference: Reference, directory: Path) -> dict[str, Any]:
    """A reference that means the same wherever it is read from."""
    return references.locate(reference, beside=directory)[0].to_dict()


def cache_directory() -> Path:
    """Where trimtab keeps what it can make again: `$XDG_CACHE_HOME/trimtab`, `~/.cache/trimtab` where that is unset."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
