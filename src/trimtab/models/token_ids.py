"""Fused ids and members' ids: what each member reads for an id, and which of its scores stands for it.

Both engines apply this rule. `vocabulary` makes it from the tokenizers, and `config.json` keeps it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.errors import BadSetting


@dataclass(frozen=True)
class MemberIds:
    """How one member's ids stand for the fused ones; where nothing is said, they are the same.

    reads      {fused id: the id that the member reads in its place}
    scores     {fused id: the row of its logits that stands for it}
    embedded   rows of its embeddings: it cannot read an id from here on; None: no limit is known
    stand_in   what it reads instead
    resized    rows of the embeddings that the member's adapter brings; None: it has those of its base
    """

    reads: Mapping[int, int] = field(default_factory=dict)
    scores: Mapping[int, int] = field(default_factory=dict)
    embedded: int | None = None
    stand_in: int = 0
    resized: int | None = None

    def below(self, size: int) -> "MemberIds":
        """The same for fused ids below a size."""
        reads, scores = ({i: own for i, own in table.items() if i < size} for table in (self.reads, self.scores))
        is_short = self.embedded is not None and self.embedded < size
        embedded, stand_in = (self.embedded, self.stand_in) if is_short else (None, 0)
        return MemberIds(reads, scores, embedded, stand_in, self.resized)

    @property
    def is_plain(self) -> bool:
        """Whether the member's ids are the fused ones."""
        return not self.reads and not self.scores and self.embedded is None

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`."""
        reads, scores = ([list(pair) for pair in sorted(table.items())] for table in (self.reads, self.scores))
        parts = {"reads": reads, "scores": scores, "embedded": self.embedded, "stand_in": self.stand_in}
        parts |= {"resized": self.resized}
        return {name: part for name, part in parts.items() if part}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "MemberIds":
        """From what `to_dict` gave."""
        reads, scores = ({int(i): int(own) for i, own in content.get(name, ())} for name in ("reads", "scores"))
        return cls(reads, scores, content.get("embedded"), int(content.get("stand_in", 0)), content.get("resized"))


PLAIN = MemberIds()


@dataclass(frozen=True)
class FusedVocabulary:
    """Which ids are fused, and every member's ids for them.

    size          columns of the fused logits; ids that may come in lie below it
    cut           ids below it that are never emitted: they have no token, or the strong model lacks them
    strong_only   ids with delta 0, since a small member lacks them: the strong model alone decides
    members       {member: its ids}; a member that is not named has the fused ones
    remark        one line for the user that names tokens that are cut or have delta 0; empty where there are none
    """

    size: int
    cut: frozenset[int] = frozenset()
    strong_only: frozenset[int] = frozenset()
    members: Mapping[str, MemberIds] = field(default_factory=dict)
    remark: str = field(default="", compare=False)
    _tensors: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ids_of(self, member: str) -> MemberIds:
        """How the ids of a member stand for the fused ones."""
        return self.members.get(member, PLAIN)

    def has_plain_ids(self, member: str) -> bool:
        """Whether a member reads and scores fused ids as they are, all of them."""
        return self.ids_of(member).is_plain

    def key(self, member: str) -> str:
        """Members of one model with equal keys read and score the same."""
        return json.dumps(self.ids_of(member).to_dict())

    def rows_needed(self, member: str) -> int:
        """How many rows a member's output layer must have for all ids in which it has a say."""
        hidden = self.cut if member == "strong" else self.cut | self.strong_only
        scores = self.ids_of(member).scores
        last = next((i for i in range(self.size - 1, -1, -1) if i not in hidden and i not in scores), -1)
        return max(last, *scores.values(), -1) + 1

    def fused_id(self, member: str, own: int) -> int | None:
        """The fused id that a member's own id stands for; None: for none."""
        scores = self.ids_of(member).scores
        found = next((i for i, row in scores.items() if row == own), own if own not in scores else None)
        return found if found is not None and 0 <= found < self.size and found not in self.cut else None

    def read(self, member: str, input_ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The ids that a member reads for fused ones, of any shape; ids from `size` on are read as the last one.

        `readable` refuses those where a prompt comes in. An engine that cannot refuse must not read out of range.
        """
        ids = self.ids_of(member)
        if ids.embedded is None and not ids.reads:
            return input_ids
        return self._table(member, input_ids.device)[input_ids.clamp_max(self.size - 1)]

    def align(self, member: str, logits: Float[Tensor, "*rows own"]) -> Float[Tensor, "*rows vocab"]:
        """A member's logits for the fused ids; -inf where an id is cut, or the member has no say.

        logits    [..., rows of the member's output layer]
        returns   [..., size]; small members have no say in ids with delta 0
        """
        scores = logits[..., : self.size]
        if scores.shape[-1] < self.size:
            scores = torch.nn.functional.pad(scores, (0, self.size - scores.shape[-1]), value=-torch.inf)
        own = self.ids_of(member).scores
        if own:
            targets, rows = self._columns(member, logits.device)
            scores = scores.index_copy(-1, targets, logits.index_select(-1, rows))
        hidden = self._hidden(member != "strong", logits.device)
        return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)

    def _table(self, member: str, device: torch.device) -> Int[Tensor, " vocab"]:
        def make() -> Tensor:
            ids = self.ids_of(member)
            table = torch.arange(self.size)
            if ids.embedded is not None:
                table[ids.embedded :] = ids.stand_in
            for index, own in ids.reads.items():
                table[index] = own
            return table

        return self._kept(("reads", member), device, make)  # type: ignore[no-any-return]

    def _columns(self, member: str, device: torch.device) -> tuple[Tensor, Tensor]:
        pairs = self.ids_of(member).scores
        targets = self._kept(("targets", member), device, lambda: torch.tensor(list(pairs)))
        return targets, self._kept(("rows", member), device, lambda: torch.tensor(list(pairs.values())))

    def _hidden(self, is_small: bool, device: torch.device) -> Bool[Tensor, " vocab"] | None:
        """Ids that a member has no say in; None: it has a say in all."""
        ids = self.cut | self.strong_only if is_small else self.cut
        if not ids:
            return None

        def make() -> Tensor:
            return torch.zeros(self.size, dtype=torch.bool).index_fill(0, torch.tensor(sorted(ids)), True)

        return self._kept(("hidden", is_small), device, make)  # type: ignore[no-any-return]

    def _kept(self, key: Any, device: torch.device, make: Any) -> Any:
        """A table on a device, made once: a copy at every step would make the device wait."""
        place = (key, device)
        if place not in self._tensors:
            self._tensors[place] = make().to(device)
        return self._tensors[place]

    # ---- ids that come in

    def readable(
        self, input_ids: Int[Tensor, "..."], mask: Tensor | None, pad_id: int | None, tokenizer: Any = None
    ) -> Int[Tensor, "..."]:
        """Ids of a prompt, all within the vocabulary: padding that lies outside is replaced.

        mask       0 on padding, as far as it reaches [..., time]; None: there is no padding
        tokenizer  names the token in the error
        raises     BadSetting for a token that the strong model cannot read
        """
        is_outside = (input_ids < 0) | (input_ids >= self.size)
        if not bool(is_outside.any()):
            return input_ids
        is_text = (
            is_outside if mask is None else is_outside & mask[..., -input_ids.shape[-1] :].bool().to(is_outside.device)
        )
        if bool(is_text.any()):
            outside = int(input_ids[is_text][0])
            token = None if tokenizer is None or outside < 0 else tokenizer.convert_ids_to_tokens(outside)
            named = outside if token is None else f"{outside} ({token!r})"
            raise BadSetting(
                f"the prompt holds token {named}, which is not in the fused vocabulary.",
                f"The strong model can read ids below {self.size}.",
                "leave it out of the prompt, or choose a strong model that knows it.",
            )
        return input_ids.masked_fill(is_outside, pad_id or 0)

    # ---- config.json

    def to_dict(self) -> dict[str, Any] | None:
        """For `config.json`; None where every member has the fused ids, all of them."""
        members = {name: ids.to_dict() for name, ids in self.members.items() if ids != PLAIN}
        parts = {"cut": _ranges(self.cut), "strong_only": _ranges(self.strong_only), "members": members}
        return {name: part for name, part in parts.items() if part} or None

    @classmethod
    def from_dict(cls, size: int, content: Mapping[str, Any] | None) -> "FusedVocabulary":
        """From the size and what `to_dict` gave."""
        content = content or {}
        return cls(
            size,
            _ids(content.get("cut", ())),
            _ids(content.get("strong_only", ())),
            {name: MemberIds.from_dict(part) for name, part in content.get("members", {}).items()},
        )


def _ranges(ids: Iterable[int]) -> list[list[int]]:
    """Ids as [first, last] ranges."""
    found: list[list[int]] = []
    for index in sorted(ids):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return found


def _ids(ranges: Iterable[Iterable[int]]) -> frozenset[int]:
    return frozenset(index for first, last in ranges for index in range(first, last + 1))
