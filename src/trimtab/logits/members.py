"""Strong, base and experts: opened together, and checked against one another."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.errors import MemberMismatch, TrimtabWarning
from trimtab.models import adapters, ancestry, checkpoint
from trimtab.models.handed import look_at
from trimtab.models.loading import Member, MemberLoader, Placement

# Names of members, and of rules that say who drafts.
RESERVED = ("strong", "base", "auto", "fused", "lately", "mixture", "prompt")


@dataclass
class Members:
    """Strong, base and experts, and the switches of the models that carry adapters (by the model's id)."""

    strong: Member
    base: Member
    experts: dict[str, Member]
    switches: dict[int, adapters.AdapterSwitch] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Member]:
        yield from (self.strong, self.base, *self.experts.values())

    def switch(self, member: Member) -> adapters.AdapterSwitch | None:
        """What turns this member's adapters on and off; None for a model without any."""
        return adapters.switch_on(member.model)


def gather(
    strong: Any,
    base: Any,
    experts: Mapping[str, Any],
    placement: Placement | None = None,
    beside: Path | None = None,
    is_outline: bool = False,
) -> Members:
    """All members, from loaded models or references (relative paths start at `beside`).

    is_outline    True: models are on the meta device, made from configurations and headers; no weight is read
    raises    MemberMismatch when strong or base is missing or an expert's name cannot be used; UnknownName for a
              placement of a member that is not there
    """
    for role, source in (("strong", strong), ("base", base)):
        if source is None:
            raise MemberMismatch(
                f"there is no {role} model.",
                "An expert's delta is expert minus base, and it is added to the strong model.",
                f"pass {role}=...",
            )
    for name in experts:
        if not name or name in RESERVED:
            raise MemberMismatch(
                f"an expert cannot be called '{name}'.", f"Taken: {', '.join(RESERVED)}.", "give it another name."
            )
    placement = placement or Placement()
    placement.check_names(("strong", "base", *experts))
    # Loaded models are looked at before any adapter is attached, which changes what others compute.
    handed = {} if is_outline else look_at({"strong": strong, "base": base, **experts})
    loader = MemberLoader(placement, beside, is_outline, handed)
    strong_member, base_member = loader.member("strong", strong), loader.member("base", base)
    made = {name: loader.member(name, source, base=base_member) for name, source in experts.items()}
    return Members(strong_member, base_member, made, loader.switches)


def check_descent(
    members: Members,
    read: Callable[[Member, Tensor], Tensor] | None,
    vocab_size: int,
    with_prompts: Collection[str] = (),
) -> None:
    """Warns about each expert that adds nothing, was not tuned from the base, or may not have been.

    read    (member, token ids [batch, time]) -> logits [batch, time, vocab], for the divergence that the warning
            states; None: members were not loaded, so it states none
    with_prompts   members that read a prompt of their own, by which an expert may differ from an equal base
    """
    base = members.base
    for name, expert in members.experts.items():
        nothing = "" if {name, "base"} & set(with_prompts) else _why_nothing(expert, base)
        if nothing:
            warnings.warn(
                f"expert '{name}' adds nothing: {nothing}, so its delta is zero. Fix: pass the tuned model.",
                TrimtabWarning,
                stacklevel=3,
            )
            continue
        why = _why_no_descendant(expert, base)
        if not why:
            continue
        measured = "and what it adds was not measured (--probe does)"
        if read is not None:
            ids = ancestry.probe_ids(vocab_size)[:, : min(base.context or 10**9, expert.context or 10**9)]
            kl = ancestry.mean_kl_nats(read(expert, ids), read(base, ids))
            measured = f"and KL(expert || base) is {kl:.2f} nats per token on fixed token sequences"
        warnings.warn(
            f"expert '{name}' {why}, {measured}. Its delta then holds more than what tuning taught. "
            "Fix: pass the model that it was tuned from as base.",
            TrimtabWarning,
            stacklevel=3,
        )


def _why_nothing(expert: Member, base: Member) -> str:
    """Why an expert equals the base; empty when it does not, or when it cannot be told."""
    if expert.adapter is not None:
        tensors = _adapter_tensors(expert)
        return "every B of its LoRA adapter is zero" if ancestry.is_zero_adapter(tensors) else ""
    if expert.model is base.model and expert.directory == base.directory:
        return "it is the base itself"
    if _has_files(expert, base):
        return "its weight files are those of the base" if ancestry.has_same_files(*_directories(expert, base)) else ""
    if ancestry.is_plain(expert.model) and ancestry.is_plain(base.model):
        return "its weights are those of the base" if ancestry.are_equal(expert.model, base.model) else ""
    return ""


def _adapter_tensors(expert: Member) -> dict[str, Tensor]:
    if expert.directory is not None:
        return ancestry.adapter_tensors(expert.directory)
    names = (expert.adapter,) if isinstance(expert.adapter, str) else tuple(expert.adapter or ())
    parts = {f".{name}" for name in names}
    named = expert.model.named_parameters()
    return {key: value.detach() for key, value in named if any(f"{part}." in f"{key}." for part in parts)}


def _why_no_descendant(expert: Member, base: Member) -> str:
    """What speaks against an expert having been tuned from the base; empty when nothing does."""
    if expert.adapter is not None or expert.model is base.model:
        return f"may not descend from the base: {expert.doubt}" if expert.doubt else ""
    if ancestry.is_plain(expert.model) and ancestry.is_plain(base.model):
        cosine = ancestry.weight_cosine(expert.model, base.model)
    elif _has_files(expert, base) and not any(map(checkpoint.is_quantized, _directories(expert, base))):
        cosine = ancestry.file_cosine(*_directories(expert, base))
    else:  # packed weights: nothing to compare by
        return ""
    if cosine is not None and cosine > ancestry.UNRELATED_COSINE:
        return ""
    why = "its weights have other shapes" if cosine is None else f"the cosine of their weights is {cosine:.2f}"
    return f"does not descend from the base: {why}"


def _has_files(expert: Member, base: Member) -> bool:
    """Whether both were opened from directories of safetensors."""
    return all(member.directory is not None and member.directory.is_dir() for member in (expert, base))


def _directories(expert: Member, base: Member) -> tuple[Path, Path]:
    assert expert.directory is not None
    assert base.directory is not None
    return expert.directory, base.directory
