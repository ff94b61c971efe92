"""The settings of speculation, and what cannot be speculated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import BadSetting
from trimtab.logits.forward.cache import FusedCache
from trimtab.logits.forward.reader import Reader
from trimtab.logits.members import Members
from trimtab.logits.speculation.draft import CHEAPEST, canonical_rule, check_rule, drafter_for, settled
from trimtab.logits.speculation.length import FIRST, LONGEST
from trimtab.logits.speculation.processors import stateful_among
from trimtab.logits.speculation.ragged import immovable
from trimtab.logits.speculation.sequences import batch_wise_among
from trimtab.logits.strategy.fusion import Strategy
from trimtab.models.loading import Member

AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """How to speculate.

    speculate   "auto": drafts of the length that pays, none where nothing pays; 0: never; N: always N tokens
    draft       who drafts: "auto", "recent", "mixture", "fused", "prompt", "base" or an expert's name
    is_repeatable   whether one seed has to give one sampled text, so that no measured time may decide what is drawn
    """

    speculate: str | int = AUTO
    draft: str = CHEAPEST
    is_repeatable: bool = False

    def check(self, expert_names: Sequence[str]) -> "Plan":
        """This plan with today's names; raises BadSetting or UnknownName for values that mean nothing."""
        is_count = isinstance(self.speculate, int) and not isinstance(self.speculate, bool)
        if not (self.speculate == AUTO or (is_count and 0 <= int(self.speculate) <= LONGEST)):
            raise BadSetting(
                f"speculate is {self.speculate!r}.",
                f'Expected: "auto", 0 (never) or a number of drafted tokens up to {LONGEST}.',
                'pass speculate="auto".',
            )
        plan = replace(self, draft=canonical_rule(self.draft))
        check_rule(plan.draft, expert_names)
        return plan

    @property
    def fixed_length(self) -> int | None:
        """Tokens per draft; None where the length adapts."""
        return None if isinstance(self.speculate, str) else self.speculate

    def length_of_drafts(self, do_sample: bool) -> int | None:
        """Tokens per draft in one generation; None where measured costs choose."""
        return FIRST if self.fixed_length is None and self.is_repeatable and do_sample else self.fixed_length


def small_strong(members: Members, reader: Reader, strategy: Strategy, rule: str) -> str | None:
    """Why drafts cannot pay, judged by what a token costs the strong model and who drafts; None when they may."""
    return too_small(step_bytes([members.strong]), _drafter_bytes(members, reader, strategy, rule))


def _drafter_bytes(members: Members, reader: Reader, strategy: Strategy, rule: str) -> int:
    """Of the cheapest drafter that the rule may choose, with all that is read in the same forwards."""
    names = tuple(members.experts)
    rule = settled(rule, strategy, names, reader.is_one_forward)
    each_weighs_most = torch.eye(max(1, len(names)))
    drafters = {drafter_for(rule, names, strategy, weights).members for weights in each_weighs_most}
    read = {tuple(reader.groups_of(drafter)) for drafter in drafters}
    return min(step_bytes([member for group in groups for member in reader.groups[group].members]) for groups in read)


def too_small(cost: int, drafting: int) -> str | None:
    """Why drafts cannot pay where a token costs the strong model and a drafter so many bytes; None when they may."""
    if cost >= WORTH_BYTES and cost >= WORTH_RATIO * drafting:
        return None
    return (
        f"the strong model is too small for drafts to pay: a token goes through {cost / 1e6:.0f} MB of weights, a "
        f"drafted one through {drafting / 1e6:.0f} MB; at least {WORTH_BYTES / 1e6:.0f} MB and {WORTH_RATIO} times as "
        "much would be worth it"
    )


# Below this many bytes per token the time of a step is overhead, which a draft pays as well.
WORTH_BYTES, WORTH_RATIO = 10_000_000, 2


def step_bytes(members: Sequence[Member]) -> int:
    """Bytes of weights that one token has to go through; what a step costs, at batch 1, on any memory-bound device."""
    weights = (weight for member in members for weight in member.model.parameters())
    return sum({id(weight): weight.numel() * weight.element_size() for weight in weights}.values())


def obstacle(
    strategy: Strategy,
    cache: Any,
    rows: int,
    processors: Sequence[Any],
    stopping: Sequence[Any],
    mask: Tensor | None,
    streamer: Any,
    config: Any,
    synced: bool,
    is_resumed: bool,
) -> str | None:
    """Why this generation cannot be speculated; None when it can."""
    if synced or config.is_assistant:
        return "this model assists another one, or waits for others at every step"
    if cache is None:
        return "there is no cache (use_cache=False)"
    if not isinstance(cache, FusedCache):
        return f"past_key_values is a {type(cache).__name__}, and the members' caches live in one FusedCache"
    for ingredient in (strategy.amount, strategy.chooser):
        if ingredient.looks_back:
            return f"{type(ingredient).__name__} looks back at earlier steps, so a draft would change its distribution"
    if streamer is not None and rows > 1:
        return f"{rows} rows are streamed together, but each row of a draft keeps its own length"
    if mask is not None and bool((mask.cummax(dim=-1).values != mask).any()):
        return "the attention mask leaves out tokens that are no padding on the left"
    batch_wise = batch_wise_among(stopping)
    if batch_wise is not None and rows > 1:
        return f"{batch_wise} may look at all rows together, but each row of a draft keeps its own length"
    if is_resumed and rows > 1:
        return "a batch goes on from a cache that is kept, but each row of a draft keeps its own length"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size is set"
    stateful = stateful_among(processors)
    if stateful is not None:
        return f"{stateful} may remember what it saw at the step before"
    return next((why for view in cache.views if (why := immovable(view, rows))), None)


def refuse(reason: str, speculate: str | int) -> BadSetting:
    """The error for drafts that were asked for by number where there can be none."""
    return BadSetting(
        f"speculate={speculate} cannot be: {reason}.",
        "Drafts need a distribution that depends on its position alone, and caches that can be cropped.",
        'pass speculate=0, or speculate="auto", which does without drafts here and says so.',
    )
