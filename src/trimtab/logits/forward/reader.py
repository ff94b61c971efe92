"""Runs the members on the same tokens: one forward per group, each on its own device, prompts and cache."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.errors import BadSetting, NumericalError
from trimtab.logits.forward.cache import FusedCache
from trimtab.logits.forward.checks import check_groups
from trimtab.logits.forward.devices import devices_of, queues, run_queues
from trimtab.logits.forward.grouping import ForwardGrouping, OnePass
from trimtab.logits.forward.groups import ForwardGroup, ForwardInputs, OneModel
from trimtab.logits.forward.streams import Streams
from trimtab.logits.members import Members
from trimtab.models.loading import Member
from trimtab.models.prompts import OwnPrompts, PromptForm, positions_of
from trimtab.models.token_ids import FusedVocabulary

# Numbers that one chunk of rows may hold in each of a strategy's temporaries: 2^22 doubles are 32 MiB.
CHUNK_NUMBERS = 2**22


class InvalidLogits(NumericalError):
    """A member's logits make no distribution; `position` is that of the token after which they stand."""

    def __init__(self, member: str, row: int, position: int, step: int | None = None) -> None:
        self.member, self.row, self.position = member, row, position
        where = f"at step {step} of the generation" if step is not None else f"after token {position}"
        super().__init__(
            f"member '{member}' gave logits that are NaN or make no distribution, {where}, in row {row} of the batch.",
            "Every member must give finite logits to some token at every step.",
            "look at that member alone: its weights are damaged, or its number type is too narrow (try float32).",
        )

    def in_generation(self, prompt_length: int) -> "InvalidLogits":
        """The same error, counted in generated tokens from 1."""
        return InvalidLogits(self.member, self.row, self.position, self.position + 2 - prompt_length)


@dataclass(frozen=True)
class MemberLogProbs:
    """Next-token log-probabilities of all members at the same positions, float32, on the strong model's device.

    strong, base    [row, vocab]
    experts         [expert, row, vocab]
    zero_point      [row, 1]   log-sum-exp of the strong model's logits: its logits are `strong` + `zero_point`
    """

    strong: Float[Tensor, "row vocab"]
    base: Float[Tensor, "row vocab"]
    experts: Float[Tensor, "expert row vocab"]
    zero_point: Float[Tensor, "row 1"]


class Reader:
    """The members as runs: members that share model, adapter and prompt are read once.

    runs      what is read at each step, the strong model first
    run_of    for strong, base and each expert: its place in `runs`
    run_named {member: its index in `runs`}
    groups     the forwards that read the runs, the strong model's first
    queues      groups that are read at the same time: a queue per device
    """

    def __init__(
        self,
        members: Members,
        forms: Mapping[str, PromptForm],
        vocabulary: FusedVocabulary,
        one_pass: OnePass = "auto",
        is_opening: bool = True,
    ) -> None:
        """Groups the members and checks how they are read; `is_opening`: their weights are those they came with."""
        self._members, self._vocabulary, self._vocab_size = members, vocabulary, vocabulary.size
        for member in members:
            member.vocabulary = vocabulary
        runs: dict[Any, Member] = {}
        # Members of one model whose ids stand for other tokens read other ids.
        keys = [(id(m.model), m.adapter, forms.get(m.name, PromptForm()), vocabulary.key(m.name)) for m in members]
        for key, member in zip(keys, members, strict=True):
            runs.setdefault(key, member)
        self.runs = list(runs.values())
        self.run_of = [list(runs).index(key) for key in keys]
        self.run_named = dict(zip((member.name for member in members), self.run_of, strict=True))
        self.groups = ForwardGrouping(self.runs, one_pass).groups()
        check_groups(self.groups, is_opening)
        self.streams = Streams(self.groups, is_on=False)
        self.queues = queues([devices_of(group) for group in self.groups])

    @property
    def chunk_rows(self) -> int:
        """How many positions a strategy gets at a time."""
        return max(1, CHUNK_NUMBERS // (self._vocab_size * (len(self._members.experts) + 2)))

    def groups_of(self, names: Iterable[str]) -> list[int]:
        """The groups that read these members, in order."""
        runs = {self.run_named[name] for name in names}
        return [index for index, group in enumerate(self.groups) if runs & set(group.runs)]

    @property
    def is_one_forward(self) -> bool:
        """Whether base and experts are read together, whichever of them drafts."""
        return len(self.groups_of(("base", *self._members.experts))) == 1

    def new_cache(self, own: OwnPrompts | None = None, max_tokens: int | None = None) -> FusedCache:
        """An empty cache; with room for `max_tokens` tokens of the shared text from the start where they are given."""
        room = None if max_tokens is None else max_tokens + max(0, own.extra_tokens if own is not None else 0)
        return FusedCache(
            [group.new_group_cache(room) for group in self.groups], [group.runs for group in self.groups], own
        )

    def own_prompts(self, ids: Tensor, mask: Tensor, prompt_length: int) -> OwnPrompts:
        """The runs' own prompts, from [batch, member, time]."""
        names = [member.name for member in self._members]
        return OwnPrompts.from_tensors(ids, mask, prompt_length, [names.index(run.name) for run in self.runs])

    def room(self, prompt_tokens: Callable[[int], int]) -> tuple[int | None, str]:
        """How many tokens can be generated before a member's context is full, and which member's.

        prompt_tokens    run -> tokens of the longest prompt that it reads
        """
        # The last token that is generated need not be read.
        rooms = [
            (run.context + 1 - prompt_tokens(index), run.name)
            for index, run in enumerate(self.runs)
            if run.context is not None
        ]
        return min(rooms, key=lambda room: room[0], default=(None, ""))

    def logits(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: FusedCache | None = None,
        own: OwnPrompts | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> list[Tensor]:
        """Every run's logits, [batch, kept, rows of that member] each, on that member's device."""
        all_inputs = self.all_inputs(input_ids, attention_mask, position_ids, cache, own)
        logits: dict[int, Tensor] = {}
        views = cache.views if cache is not None else [None] * len(self.groups)

        def read(index: int) -> list[Tensor]:
            group = self.groups[index]
            with self.streams.of(index):
                return group.read([all_inputs[run] for run in group.runs], views[index], logits_to_keep)

        with self.streams.forked():
            # Streams belong to one thread, which then starts all forwards.
            parts = run_queues([range(len(self.groups))] if self.streams.is_on else self.queues, read)
            for index, found in sorted(parts.items()):
                self.streams.hand_over(index, found)
                logits.update(zip(self.groups[index].runs, found, strict=True))
        return [logits[run] for run in range(len(self.runs))]

    def all_inputs(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: FusedCache | None = None,
        own: OwnPrompts | None = None,
    ) -> list[ForwardInputs]:
        """What every run reads when these tokens come in: its own prompt, where it has one, or the shared text."""
        past = cache.get_seq_length() if cache is not None else 0
        if own is not None:
            return [_own_feed(own, index, input_ids, attention_mask, past) for index in range(len(self.runs))]
        positions = _positions(attention_mask, position_ids, input_ids, past)
        return [ForwardInputs(input_ids, attention_mask, positions, past + input_ids.shape[1])] * len(self.runs)

    def read_alone(self, member: Member, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """One member's logits on some tokens, without padding, cache or own prompt."""
        feed = ForwardInputs(input_ids, None, _positions(None, None, input_ids, 0), input_ids.shape[1])
        with torch.no_grad():
            logits = ForwardGroup([0], [member], OneModel(member)).read([feed])[0]
        return self._vocabulary.align(member.name, logits).float().cpu()

    def aligned(self, run: int, scores: Float[Tensor, "*rows own"]) -> Float[Tensor, "*rows vocab"]:
        """A run's logits for the fused ids, -inf where it has no say: see `FusedVocabulary.align`."""
        return self._vocabulary.align(self.runs[run].name, scores)

    def log_probs(
        self,
        logits: Sequence[Tensor],
        end: int,
        is_real: Tensor | None = None,
        broken: dict[int, int] | None = None,
    ) -> Iterator[tuple[Int[Tensor, " row"], MemberLogProbs]]:
        """The members' distributions from their runs' logits [batch, kept, ...], a chunk of positions at a time.

        end       position after the last one kept, for the message
        is_real   [batch, kept]; positions to leave out are 0; None: take all
        broken    None: logits that make no distribution raise. Else {position: run} is filled with them, for texts that
                  may never reach that position; all distributions there are then uniform
        yields    (positions among the batch * kept positions, their distributions)
        raises    InvalidLogits, naming the member, unless `broken` is given
        """
        batch, kept = logits[0].shape[:2]
        flat = [scores.reshape(batch * kept, scores.shape[-1]) for scores in logits]
        every = torch.arange(batch * kept)
        wanted = every if is_real is None else is_real.flatten().cpu().nonzero().flatten()
        for rows in torch.split(wanted, self.chunk_rows):
            # All of them at once is the usual step of a generation: nothing to pick, nothing to copy.
            picked = flat if len(rows) == len(every) else [scores[rows.to(scores.device)] for scores in flat]
            yield rows, self._member_log_probs(picked, rows, kept, end - kept, broken)

    def _member_log_probs(
        self, logits: Sequence[Tensor], rows: Tensor, kept: int, start: int, marks: dict[int, int] | None
    ) -> MemberLogProbs:
        device = logits[0].device
        fused_logits = [self.aligned(run, scores).to(device, torch.float32) for run, scores in enumerate(logits)]
        log_probs = [scores.log_softmax(dim=-1) for scores in fused_logits]
        zero_point = zero_point_of(fused_logits[0])
        # One NaN makes its whole row NaN in the log-softmax, and so does a row of nothing but -inf: one column tells.
        broken = torch.stack([log_probs[:, 0] for log_probs in log_probs]).isnan()
        if bool(broken.any()):
            found = [(run, int(rows[row])) for run, row in broken.nonzero().tolist()]
            if marks is None:
                run, index = found[0]
                raise InvalidLogits(self.runs[run].name, row=index // kept, position=start + index % kept)
            for run, index in found:
                marks.setdefault(index, run)
            log_probs = [uniform_where(broken.any(dim=0), log_probs) for log_probs in log_probs]
            zero_point = zero_point.masked_fill(broken.any(dim=0).unsqueeze(-1), 0.0)
        strong, base, *experts = (log_probs[run] for run in self.run_of)
        stacked = torch.stack(experts) if experts else strong.new_empty((0, *strong.shape))
        return MemberLogProbs(strong, base, stacked, zero_point)


def zero_point_of(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row 1"]:
    """What log-softmax takes off a row of logits: its log-sum-exp.

    Added to fused log-probabilities it makes logits on the strong model's scale. Their softmax is the same, and
    processors that look at the sign of a logit (repetition penalties) do what they do to the strong model.
    """
    return logits.logsumexp(dim=-1, keepdim=True)


def uniform_where(is_broken: Bool[Tensor, " row"], log_probs: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """The uniform distribution in place of those rows that are none."""
    return torch.where(is_broken.unsqueeze(-1), -math.log(log_probs.shape[-1]), log_probs)


def _positions(mask: Tensor | None, given: Tensor | None, input_ids: Tensor, past: int) -> Tensor:
    """[rows, time]: as given, or counted from the mask, or from the cache."""
    if given is not None:
        return given
    if mask is None:
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    return positions_of(mask)[:, -input_ids.shape[1] :]


def _own_feed(own: OwnPrompts, run: int, input_ids: Tensor, mask: Tensor | None, past: int) -> ForwardInputs:
    """A run's own prompt in place of the shared one, then the shared tokens after it."""
    ids = input_ids if past else torch.cat([own.ids[run], input_ids[:, own.shared_length :]], dim=-1)
    generated = past + input_ids.shape[1] - own.shared_length
    after = own.masks[run].new_ones((own.masks[run].shape[0], generated))
    if mask is not None:
        after = mask[:, own.shared_length :].to(after)
    full = torch.cat([own.masks[run], after], dim=-1)
    return ForwardInputs(ids, full, positions_of(full)[:, -ids.shape[1] :], full.shape[1])


def kept_after_prompt(
    own: OwnPrompts, new_tokens: int, past: int, logits_to_keep: int | Tensor, wants_all: bool
) -> int:
    """How many last positions to score where members read own prompts: inside the prompt there is nothing to fuse.

    wants_all    0 then stands for everything from the prompt's last token on
    """
    if past == 0 and new_tokens < own.shared_length:
        raise BadSetting(
            f"{new_tokens} tokens came in, but the prompt has {own.shared_length}.",
            "Members with prompts of their own read the prompt as a whole.",
            "pass the whole prompt at once.",
        )
    available = new_tokens if past else new_tokens - own.shared_length + 1
    if isinstance(logits_to_keep, int) and 0 < logits_to_keep <= available:
        return logits_to_keep
    if isinstance(logits_to_keep, int) and logits_to_keep == 0 and (wants_all or past):
        return available
    raise BadSetting(
        "logits inside the prompt are asked for, but members read prompts of their own there.",
        "Their positions do not correspond.",
        f"pass logits_to_keep={available}, the positions from the prompt's last token on, or fewer.",
    )
