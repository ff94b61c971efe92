"""The rounds of speculative fusion: draft, verify, commit, until every row has ended.

    round: the drafter reads the last token and its own drafts, one at a time;
           everybody else reads the last token and the whole draft in one forward;
           the fused distribution accepts, replaces the first token that does not stand, or adds a bonus;
           everybody forgets what was not accepted.

In the first round the prompt stands in the last token's place: the drafter writes on before the strong model has seen
the prompt, which it then reads together with the draft. A short answer may need one reading by the strong model in all.

No member reads a token twice, unless a NaN has spoilt what was read. A drafter's logits are used again for the fused
distribution. Only where a whole draft stands has the drafter to read its last token before the bonus can be drawn.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.logits.forward.reader import InvalidLogits, uniform_where, zero_point_of
from trimtab.logits.speculation import draft as drafting
from trimtab.logits.speculation.draft import Drafter
from trimtab.logits.speculation.length import AcceptanceHistory, Costs, DraftLength
from trimtab.logits.speculation.processors import Scorer
from trimtab.logits.speculation.ragged import RaggedReading
from trimtab.logits.speculation.report import SpeculationReport
from trimtab.logits.speculation.sequences import Rows
from trimtab.logits.speculation.verify import acceptance_mask, accepted, draw, residual
from trimtab.logits.strategy.fusion import Fusion, Strategy


@dataclass
class CostModel:
    """What a model has learned from the texts before.

    groups     of each, what its forwards cost
    beside    what a round costs beside forwards
    habits    {rule of drafting: what became of its drafts}
    """

    groups: list[Costs]
    overhead: Costs = field(default_factory=Costs)
    histories: dict[str, AcceptanceHistory] = field(default_factory=dict)


@dataclass
class Draft:
    """A round's draft.

    ids       [row, draft]
    lengths   [row]                how many of them count; the rest is filling
    reach     [row]                behind how many of them a text can come and go on, where a processor needs to know
    scores    [row, draft, vocab]  what they were drawn from; None: they were looked up
    """

    ids: Int[Tensor, "row draft"]
    lengths: Int[Tensor, " row"]
    reach: Int[Tensor, " row"]
    scores: Float[Tensor, "row draft vocab"] | None

    @property
    def width(self) -> int:
        """Tokens of the longest draft."""
        return self.ids.shape[1]


@dataclass
class Target:
    """The fused distribution at some positions of every row, before and after the processors; and who weighed how much.

    log_probs, scores   [row, kept, vocab]
    weights             [expert, row, kept]
    broken              {(row, position): run} where a run's logits make no distribution; nearly always none
    """

    log_probs: Float[Tensor, "row kept vocab"]
    scores: Float[Tensor, "row kept vocab"]
    weights: Float[Tensor, "expert row kept"]
    broken: dict[tuple[int, int], int]

    def at(self, indices: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """The scores at one position per row."""
        return self.scores[torch.arange(len(indices), device=indices.device), indices]


class SpeculativeDecoder:
    """Generates for one batch, from its prompt on.

    rule        who drafts, see `draft`
    do_sample   draw from the fused distribution, or take its likeliest token
    """

    def __init__(
        self,
        reading: RaggedReading,
        strategy: Strategy,
        expert_names: Sequence[str],
        rows: Rows,
        scorer: Scorer,
        fixed_length: int | None,
        meter: CostModel,
        report: SpeculationReport,
        rule: str,
        do_sample: bool,
    ) -> None:
        self._reading, self._reader = reading, reading.reader
        self._strategy, self._names, self._run_of = strategy, tuple(expert_names), self._reader.run_named
        self._rows, self._scorer, self._cost_model = rows, scorer, meter
        self._do_sample = do_sample
        self._rule = drafting.settled(rule, strategy, self._names, self._reader.is_one_forward)
        self._length = DraftLength(fixed_length, meter.histories.get(self._rule))
        self._lately = torch.zeros(len(self._names))
        self._in_forwards = 0.0
        self._is_careful = False  # the next round reads one token alone
        self.report = report

    def run(self) -> None:
        """Rounds until every row has ended; raises InvalidLogits where members' logits make no distribution."""
        while self._rows.active:
            start, self._in_forwards, is_opening = time.perf_counter(), 0.0, self._reading.is_opening
            self._round()
            overhead = time.perf_counter() - start - self._in_forwards
            if not is_opening:  # what is compiled or read from disk at the first call tells nothing of the next ones
                self._cost_model.overhead.add(1, overhead)
            self.report.overhead += overhead
        self._cost_model.histories[self._rule] = self._length.history

    # ---- one round

    def _round(self) -> None:
        texts, is_opening = self._rows.current, self._reading.is_opening
        # In the first round everybody has the prompt to read, of which the last token is a part.
        last = torch.tensor([[] if is_opening else text[-1:] for text in texts], dtype=torch.long)
        last = last.to(self._rows.device)
        read = dict.fromkeys(range(len(self._reader.groups)), 0)
        logits: dict[int, Tensor] = {}
        if is_opening and self._rule == drafting.RECENT and len(self._names) > 1:
            self._lately = self._guess_weights(last, read, logits)
        drafter = drafting.drafter_for(self._rule, self._names, self._strategy, self._lately)
        serial = self._lanes_of(drafter)
        length = 0 if self._is_careful else self._draft_length(serial)
        if length == 0:
            serial = []
        draft = self._draft(drafter, serial, length, texts, last, read, logits)
        self._read([group for group in read if group not in serial], torch.cat([last, draft.ids], -1), read, logits)
        # Where everybody has read the whole draft, the position behind it is fused with the others.
        target = self._target(logits, draft.width + (not serial), texts, draft)
        if is_opening and draft.width and target.broken:
            # A NaN behind the prompt has reached all that was read with it: the prompt is read again, by itself. (That
            # the draft is dropped for what it holds makes samples lean away from tokens behind which a member breaks.)
            self._reading.start_again(read)
            self._is_careful = True
            self.report.rounds += 1
            self.report.row_rounds += len(texts)
            return
        stood = self._judge(draft, target)
        is_whole = stood == draft.lengths
        counts = stood.tolist()
        is_over = [bool(n) and row[n - 1] in self._rows.ends for row, n in zip(draft.ids.tolist(), counts, strict=True)]
        if serial and any(n == draft.width and not over for n, over in zip(counts, is_over, strict=True)):
            self._read(serial, draft.ids[:, -1:], read, logits)
            target = self._with_bonus(target, logits, texts, replace(draft, reach=torch.minimum(draft.reach, stood)))
        tokens = self._next_tokens(draft, target, stood, is_whole)
        self._learn(drafter, draft, target, stood, is_opening)
        stuck = {
            row: target.broken[row, n] for row, n in enumerate(counts) if (row, n) in target.broken and not is_over[row]
        }
        # A NaN reaches positions before it in a forward, too: attention weighs it with 0 there, which is NaN again. So
        # the text goes on without a draft, behind what stood before such a position; or ends, if it is its own NaN.
        self._is_careful = bool(stuck) and draft.width > 0
        behind = [[] if row in stuck or is_over[row] else [tokens[row]] for row in range(len(counts))]
        new = [[*draft.ids[row, :n].tolist(), *behind[row]] for row, n in enumerate(counts)]
        self._commit(new, self._pairs(target, new), read, {} if self._is_careful else stuck)

    def _lanes_of(self, drafter: Drafter) -> list[int]:
        """The groups that read while the draft grows."""
        return self._reader.groups_of(drafter.members)

    def _guess_weights(self, nothing: Tensor, read: dict[int, int], logits: dict[int, Tensor]) -> Tensor:
        """[expert]: how much each would weigh behind the prompt, were the base the strong model.

        The small members read the prompt for it, as they have to anyway.
        """
        small = ("base", *self._names)
        groups = self._reader.groups_of(small)
        if 0 in groups:  # one of them is the strong model, which shall read the prompt with the draft
            return self._lately
        self._read(groups, nothing, read, logits)
        base, *experts = (self._log_probs(run, logits[run][:, -1]) for run in (self._run_of[name] for name in small))
        pieces = zip(*(torch.split(log_probs, self._reader.chunk_rows) for log_probs in (base, *experts)), strict=True)
        fusions = [self._strategy(own, own, torch.stack(others)) for own, *others in pieces]
        return torch.cat([_weights(fusion) for fusion in fusions], dim=1).mean(dim=1).cpu()

    def _draft_length(self, serial: Sequence[int]) -> int:
        rows = len(self._rows.active)
        others = [index for index in range(len(self._reader.groups)) if index not in serial]
        costs = self._cost_model.groups
        is_opening = self._reading.is_opening  # what it reads is not measured
        if self._length.is_adaptive and not is_opening and any(costs[group].is_blind_at(rows) for group in others):
            return 0  # whether a draft pays cannot be known before a token without one was measured
        verifying: Callable[[int], float] | None = None
        if all(costs[group].seconds for group in others):
            verifying = lambda tokens: math.fsum(costs[group].of(rows * tokens) for group in others)  # noqa: E731
        per_draft = math.fsum(costs[group].of(rows) for group in serial)
        wanted = self._length.next(per_draft, verifying, self._cost_model.overhead.of(1))
        return max(0, min([wanted, *self._limits()]))

    def _limits(self) -> list[int]:
        """The longest drafts that length and contexts leave room for, the token behind the draft counted."""
        room = self._rows.room()
        limits = [] if room is None else [room - 1]
        if self._reading.is_opening and not self._reading.takes_drafts:
            limits.append(0)
        contexts = [run.context for run in self._reader.runs]
        read = self._reading.longest
        return limits + [most - tokens - 1 for most, tokens in zip(contexts, read, strict=True) if most is not None]

    def _draft(
        self,
        drafter: Drafter,
        serial: Sequence[int],
        length: int,
        texts: Sequence[Sequence[int]],
        last: Tensor,
        read: dict[int, int],
        logits: dict[int, Tensor],
    ) -> Draft:
        """Lets the drafter write `length` tokens; its groups have then read all of them but the last."""
        rows = len(texts)
        if length == 0:
            nothing = last.new_zeros((rows, 0))
            return self._drafted(nothing, last.new_zeros(rows), None)
        if not drafter.members:
            ids, lengths = drafting.lookups(texts, length)
            ends = torch.tensor(self._until_ends(ids))
            return self._drafted(ids.to(last), torch.minimum(lengths, ends).to(last.device), None)
        ids = last.new_zeros((rows, 0))
        scores: list[Tensor] = []
        reach = self._reach(last.new_full((rows,), length), ids)  # behind more drafted tokens no text can come
        runs = [self._run_of[name] for name in drafter.members]
        for drafted in range(length):
            self._read(serial, ids[:, -1:] if scores else last, read, logits)
            log_probs = drafter.log_probs([self._log_probs(run, logits[run][:, -1]) for run in runs])
            # On the scale of its first member's logits, since processors treat it as they treat the fused logits.
            log_probs = log_probs + self._zero_point(runs[0], logits[runs[0]][:, -1])
            behind = self._scorer(log_probs.unsqueeze(1), texts, self._rows.active, ids, drafted, reach)[:, 0]
            scores.append(self._scorer.drawable(behind))
            tokens = draw(scores[-1], self._do_sample)
            reach = self._scorer.reach(reach, behind, tokens, drafted)
            ids = torch.cat([ids, tokens.unsqueeze(-1)], dim=-1)
            reach = self._reach(reach, ids, drafted)
            if all(self._rows.ends.intersection(row) for row in ids.tolist()):
                break  # every text would be over
        return self._drafted(ids, last.new_tensor(self._until_ends(ids)), torch.stack(scores, dim=1))

    def _drafted(self, ids: Tensor, lengths: Tensor, scores: Tensor | None) -> Draft:
        return Draft(ids, lengths, self._reach(lengths, ids), scores)

    def _reach(self, reach: Tensor, ids: Tensor, start: int = 0) -> Tensor:
        """`Rows.within`, where a processor needs to know; criteria are asked for no other row."""
        return self._rows.within(reach, ids, start) if self._scorer.is_choosy else reach

    def _until_ends(self, ids: Tensor) -> list[int]:
        """How many drafted tokens count in each row: those up to the first that would end its text."""
        return [drafting.until_end(row, self._rows.ends) for row in ids.tolist()]

    def _read(self, groups: Sequence[int], tokens: Tensor, read: dict[int, int], logits: dict[int, Tensor]) -> None:
        """Lets groups read tokens [row, new], with the prompt before them where it is unread; their runs' logits are
        added behind those of this round."""
        for group in groups:
            is_first = self._reading.is_unread(group)
            if tokens.shape[1] == 0 and not is_first:
                continue
            start = time.perf_counter()
            found = self._reading.read(group, tokens)
            _finish(found[0])
            seconds = time.perf_counter() - start
            if not is_first:  # what a prompt costs tells nothing of a draft
                self._cost_model.groups[group].add(tokens.numel(), seconds)
            self._in_forwards += seconds
            read[group] += found[0].shape[1]
            runs = self._reader.groups[group].runs
            for run, new in zip(runs, found, strict=True):
                logits[run] = new if run not in logits else torch.cat([logits[run], new], dim=1)
                self.report.calls[self._reader.runs[run].name] += 1
                name = self._reader.runs[run].name
                self.report.seconds[name] = self.report.seconds.get(name, 0.0) + seconds / len(runs)

    def _log_probs(self, run: int, scores: Float[Tensor, "row all"]) -> Float[Tensor, "row vocab"]:
        """A drafting run's distribution from its logits at a position, where the strong model's stands.

        A drafter's NaN is reported only if the emitted text reaches it; any draft will do here.
        """
        log_probs = self._reader.aligned(run, scores).to(self._rows.device, torch.float32).log_softmax(dim=-1)
        return uniform_where(log_probs[:, 0].isnan(), log_probs)

    def _zero_point(self, run: int, scores: Float[Tensor, "row all"]) -> Float[Tensor, "row 1"]:
        """The log-sum-exp of a drafting run's logits; 0 where they make no distribution."""
        zero_point = zero_point_of(self._reader.aligned(run, scores).to(self._rows.device, torch.float32))
        return zero_point.masked_fill(~zero_point.isfinite(), 0.0)

    # ---- the fused distribution

    def _target(self, logits: dict[int, Tensor], kept: int, texts: Sequence[Sequence[int]], draft: Draft) -> Target:
        """The fused distribution behind the last token and behind each drafted one: `kept` positions."""
        log_probs, weights, broken = self._fuse([logits[run][:, :kept] for run in range(len(self._reader.runs))])
        scores = self._scorer(log_probs, texts, self._rows.active, draft.ids, reach=draft.reach)
        return Target(log_probs, scores, weights, {(row, at): run for row, at, run in broken})

    def _with_bonus(
        self, target: Target, logits: dict[int, Tensor], texts: Sequence[Sequence[int]], draft: Draft
    ) -> Target:
        """The target with the position behind the draft, which the drafter has read. `reach` is within what stood."""
        log_probs, weights, broken = self._fuse([logits[run][:, -1:] for run in range(len(self._reader.runs))])
        scores = self._scorer(log_probs, texts, self._rows.active, draft.ids, draft.width, draft.reach)
        return Target(
            torch.cat([target.log_probs, log_probs], dim=1),
            torch.cat([target.scores, scores], dim=1),
            torch.cat([target.weights, weights], dim=2),
            target.broken | {(row, draft.width): run for row, _, run in broken},
        )

    def _fuse(self, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
        """Fused logits [row, kept, vocab] and weights [expert, row, kept] from all runs' logits.

        The third are (row, position, run) where a run's logits make no distribution; the fused one is then uniform.
        """
        rows, kept = logits[0].shape[:2]
        laws_out, weights_out, broken = [], [], dict[int, int]()
        for _, members in self._reader.log_probs(logits, kept, broken=broken):
            fusion = self._strategy(members.strong, members.base, members.experts)
            fused = fusion.log_probs + members.zero_point  # as `FusedCausalLM.forward` returns them
            laws_out.append(fused.to(self._rows.device))  # texts and drafts may live elsewhere than members
            weights_out.append(_weights(fusion).to(self._rows.device))
        log_probs, weights = torch.cat(laws_out), torch.cat(weights_out, dim=1)
        indices = [(*divmod(index, kept), run) for index, run in broken.items()]
        return log_probs.view(rows, kept, -1), weights.view(-1, rows, kept), indices

    def _judge(self, draft: Draft, target: Target) -> Int[Tensor, " row"]:
        """How many drafted tokens of each row stand."""
        if draft.width == 0:
            return draft.lengths
        stands = acceptance_mask(draft.ids, target.scores[:, : draft.width], draft.scores, self._do_sample)
        for row, at in target.broken:
            stands[row, at : at + 1] = False  # nothing is known to stand there
        return accepted(stands, draft.lengths)

    def _next_tokens(self, draft: Draft, target: Target, stood: Tensor, is_whole: Tensor) -> list[int]:
        """The token behind the accepted ones: in place of the rejected one, or the bonus; any where a text is over."""
        scores = target.at(stood.clamp_max(target.scores.shape[1] - 1))
        if self._do_sample and not bool(is_whole.all()):
            at = stood.clamp_max(draft.width - 1)
            rows = torch.arange(len(at), device=at.device)
            proposal = None if draft.scores is None else draft.scores[rows, at]
            replaced = residual(scores, proposal, draft.ids[rows, at])
            scores = torch.where(is_whole.unsqueeze(-1), scores, replaced)
        return list(draw(scores, self._do_sample).tolist())

    # ---- after a round

    def _learn(self, drafter: Drafter, draft: Draft, target: Target, stood: Tensor, is_opening: bool) -> None:
        """Acceptance, weights of the experts, and the counts of the report."""
        judged = torch.minimum(stood + 1, draft.lengths)
        if draft.width:
            self._length.learn(int(stood.sum()), int(judged.sum()))
        if target.weights.shape[0]:
            indices = torch.arange(target.weights.shape[2], device=stood.device)
            counted = (indices <= stood.unsqueeze(-1)).to(target.weights)  # [row, kept]
            mean = (target.weights * counted).sum(dim=(1, 2)) / counted.sum()
            # What was known of them before the strong model had read the prompt was a guess.
            fade = 0.0 if is_opening else drafting.FADE ** float(counted.sum() / counted.shape[0])
            self._lately = fade * self._lately + (1 - fade) * mean.cpu()
        report = self.report
        report.rounds += 1
        report.row_rounds += len(stood)
        report.drafted += int(draft.lengths.sum())
        report.accepted += int(stood.sum())
        report.lengths[draft.width] += 1
        if draft.width:
            report.drafters[drafter.name] += 1

    def _pairs(self, target: Target, new: Sequence[Sequence[int]]) -> list[list[tuple[Tensor, Tensor]]]:
        """Scores and logits of the emitted tokens; nothing if not asked for."""
        if self._rows.scores is None:
            return []
        return [
            [(target.scores[row, at], target.log_probs[row, at]) for at in range(len(tokens))]
            for row, tokens in enumerate(new)
        ]

    def _commit(
        self,
        new: Sequence[Sequence[int]],
        pairs: list[list[tuple[Tensor, Tensor]]],
        read: dict[int, int],
        stuck: Mapping[int, int] | None = None,
    ) -> None:
        """Emits tokens; everybody forgets what was read beyond them, and rows that ended are left behind.

        stuck     {row: run} where no distribution says what follows the new tokens
        raises    InvalidLogits for a row that is stuck and has not ended
        """
        indices, before = list(self._rows.active), [len(text) for text in self._rows.current]
        going = self._rows.emit(new, pairs)
        emitted = [len(self._rows.texts[index]) - length for index, length in zip(indices, before, strict=True)]
        self.report.emitted += sum(emitted)
        for row, run in (stuck or {}).items():
            if row in going:
                last = len(self._rows.texts[indices[row]]) - 1
                raise InvalidLogits(self._reader.runs[run].name, indices[row], last)
        kept = going or ([0] if len(indices) == 1 else [])  # a row alone leaves its cache as `generate` would
        if not kept:
            return
        if len(kept) < len(indices):
            self._reading.keep_rows(torch.tensor(kept))
        for group, tokens in read.items():
            self._reading.take_back(group, torch.tensor([tokens - emitted[row] for row in kept]))


def _weights(fusion: Fusion) -> Float[Tensor, "expert row"]:
    """How much each expert weighs in a fused distribution: its alpha, or whether it speaks."""
    return fusion.is_chosen.float() if fusion.alpha is None else fusion.alpha.abs().float()


def _finish(logits: Tensor) -> None:
    """Waits for a forward, so that its cost can be measured; on a CPU it is over when it returns."""
    if logits.device.type != "cpu":
        torch.accelerator.synchronize(logits.device)
