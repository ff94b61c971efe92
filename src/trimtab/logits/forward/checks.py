"""Every member is read at opening: as the model reads by itself, padded, and with a cache; on a few tokens.

A member that is read differently from how the model computes by itself is an error. What a model cannot do with
padding or with a cache is noted in its group's `limits`, and the group does it in another way or refuses it. Six short
forwards per member decide; only if they disagree are there more, to find out why.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.core.errors import BadSetting, MemberMismatch
from trimtab.logits.forward.groups import ForwardGroup, ForwardInputs
from trimtab.models.probe import (
    difference,
    other_shapes_tolerance,
    probe_ids,
    same_shapes_tolerance,
)
from trimtab.models.prompts import positions_of

PADDING = 2  # tokens on the left of the second row
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


def check_groups(groups: Iterable[ForwardGroup], is_opening: bool = True) -> None:
    """Compares every group with its models and sets its limits.

    is_opening    whether the models are as they were when their own logits were measured
    raises        MemberMismatch where a member is read as another model
    """
    for group in groups:
        GroupCheck(group, is_opening).run()


@dataclass(frozen=True)
class Text:
    """Rows of tokens, and the logits that are expected for them.

    logits    per member of a group, [row, time, rows]
    mask      [row, time] 0 on padding; None: there is none
    """

    ids: Int[Tensor, "row time"]
    logits: Sequence[Tensor]
    mask: Int[Tensor, "row time"] | None = None

    def padded(self) -> "Text":
        """With a second row: the first tokens of the first, moved to the right over padding."""
        ids = torch.cat([self.ids, _moved(self.ids)])
        mask = torch.cat([torch.ones_like(self.ids), _moved(torch.ones_like(self.ids))])
        return Text(ids, [torch.cat([logits, _moved(logits)]) for logits in self.logits], mask)

    def beside(self, other: "Text") -> "Text":
        """This row and another one."""
        logits = [torch.cat(pair) for pair in zip(self.logits, other.logits, strict=True)]
        return Text(torch.cat([self.ids, other.ids]), logits)


def _moved(rows: Tensor) -> Tensor:
    """[row, time, ...] moved to the right, over zeros."""
    return torch.cat([torch.zeros_like(rows[:, :PADDING]), rows[:, :-PADDING]], dim=1)


class GroupCheck:
    """The check of one group."""

    def __init__(self, group: ForwardGroup, is_opening: bool) -> None:
        self._group = group
        self._model = group.members[0].model
        self._ids = probe_ids(self._model)
        self._most = other_shapes_tolerance(self._model) * (2 if len(group.runs) > 1 else 1)
        self._own = [member.own_logits if is_opening else None for member in group.members]

    def run(self) -> None:
        """Sets the group's limits; raises MemberMismatch."""
        time, limits = self._ids.shape[1], self._group.limits
        plain = self._group.read(self._inputs(self._ids, [time])[0])
        self._check_own(plain)
        if time <= 3 + PADDING:
            return
        # A prompt, then two tokens at once, then one, as generation and drafts read them.
        chunks, single = [time - 3, 2, 1], Text(self._ids, plain)
        padded = single.padded()
        if self._group.memory.keyword is None:
            limits.no_cache = f"{type(self._model).__name__} takes none"
            limits.rows_alone = bool(self._fails(padded, [time]))
        elif self._fails(padded, chunks, is_cached=True, is_disturbed=True):
            self._find_limits(single, padded, chunks)

    def _find_limits(self, single: "Text", padded: "Text", chunks: list[int]) -> None:
        time, limits = sum(chunks), self._group.limits
        limits.rows_alone = bool(self._fails(padded, [time]))
        steps = [chunks[0], 1, 1, 1]
        limits.no_cache = self._fails(single, steps, is_cached=True)
        if not limits.no_cache and self._fails(single, steps, is_cached=True, is_disturbed=True):
            limits.no_cache = "it keeps a state in its own modules, where the next text replaces it"
        if limits.no_cache:
            return
        limits.one_by_one = bool(self._fails(single, chunks, is_cached=True))
        other = self._ids.flip(-1)
        pair = single.beside(Text(other, self._group.read(self._inputs(other, [time])[0])))
        limits.one_row = bool(self._fails(pair, chunks, is_cached=True))
        limits.rows_alone = limits.rows_alone or bool(self._fails(padded, chunks, is_cached=True))

    def _check_own(self, plain: Sequence[Tensor]) -> None:
        is_alone = len(self._group.runs) == 1
        most = same_shapes_tolerance(self._model) if is_alone else self._most
        for member, found, own in zip(self._group.members, plain, self._own, strict=True):
            away = None if own is None else difference(found, own, most)
            if away is not None:
                raise MemberMismatch(
                    f"member '{member.name}' is read as another model: its logits differ by {away:.2g} from what the "
                    f"{type(member.model).__name__} computes by itself.",
                    "A member is read with the weights and adapters that it has when it is handed in.",
                    "merge its adapters into a model of its own (peft's merge_and_unload()), and pass that.",
                )

    def _fails(self, text: "Text", chunks: Sequence[int], is_cached: bool = False, is_disturbed: bool = False) -> str:
        """How reading in these chunks differs from what is expected; empty when it does not, or is refused.

        is_disturbed    whether another text is read after the first chunk, into a cache of its own
        """
        first, *rest = self._inputs(text.ids, chunks, text.mask)
        try:
            cache = self._group.memory.new_cache() if is_cached else None
            parts = [self._group.read(first, cache)]
            if is_disturbed:
                other = self._inputs(text.ids.flip(-1), chunks[:1])[0]
                self._group.read(other, self._group.memory.new_cache())
            parts += [self._group.read(feeds, cache) for feeds in rest]
        except BadSetting:  # a limit that is known by now
            return ""
        except FAILURES as error:
            return f"it fails ({_first_line(error)})"
        found = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
        is_real = torch.ones_like(text.ids) if text.mask is None else text.mask
        for one, expected in zip(found, text.logits, strict=True):
            if one.shape != expected.shape:
                return f"it gives logits {list(one.shape)} for tokens {list(text.ids.shape)}"
            kept = is_real.to(one.device) != 0
            away = difference(one[kept], expected[kept], self._most)
            if away is not None:
                return f"its logits differ by {away:.2g} from those without one"
        return ""

    def _inputs(
        self, ids: Int[Tensor, "row time"], chunks: Sequence[int], mask: Tensor | None = None
    ) -> list[list[ForwardInputs]]:
        """The tokens in chunks of so many, each for all members of the group."""
        positions = positions_of(torch.ones_like(ids) if mask is None else mask)
        found, start = [], 0
        for count in chunks:
            part, end = slice(start, start + count), start + count
            seen = None if mask is None else mask[:, :end]
            found.append([ForwardInputs(ids[:, part], seen, positions[:, part], end)] * len(self._group.runs))
            start = end
        return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
