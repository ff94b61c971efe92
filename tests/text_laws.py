"""Sampled texts of models with four tokens against the law that they should follow.

The law comes from whole readings of the texts, without cache, drafts or padding moved about, and from processors
written here. Two tests compare it with what was sampled:

    texts     how often each text came out against its probability, by enumeration of all texts: Pearson's chi-square
    tokens    each token's place in its own law is uniform, whatever the length of the text (the probability integral
              transform, ties broken at random). Tokens may be put in any order that depends on the text before them
              alone; the orders used here are those in which known mistakes would pile up at one end
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jaxtyping
import torch
from scipy.stats import chi2
from torch import Tensor

VOCAB = 4
PAD, END = 0, 1  # where texts end by themselves
BINS = 10
CHECKED = 8  # steps of a text, above which annotated shapes are not compared: short ones go through the same code
LEAST = 5.0  # expected counts below this are put together: the chi-square law holds no more

# From the texts so far and their masks [row, time] and log-probabilities [row, vocab] to processed scores.
Processed = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- processors, each by hand


def unprocessed(_: Tensor, __: Tensor, scores: Tensor) -> Tensor:
    """The law as it is."""
    return scores


def warped(temperature: float, top_p: float) -> Processed:
    """Temperature, then the fewest likeliest tokens that hold `top_p`."""

    def processed(_: Tensor, __: Tensor, scores: Tensor) -> Tensor:
        tempered = scores / temperature
        ordered, places = tempered.softmax(-1).sort(descending=True)
        is_out = (ordered.cumsum(-1) - ordered) > top_p
        return tempered.masked_fill(torch.zeros_like(is_out).scatter(-1, places, is_out), -torch.inf)

    return processed


def repeated_less(penalty: float) -> Processed:
    """Logits of tokens in the text: negative ones times the penalty, others divided by it; padding is no text."""

    def processed(ids: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        is_seen = (torch.nn.functional.one_hot(ids, VOCAB) * mask.unsqueeze(-1)).amax(1).bool()
        return torch.where(is_seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)

    return processed


def no_pair_twice(ids: Tensor, _: Tensor, scores: Tensor) -> Tensor:
    """No two tokens stand beside each other twice; transformers takes padding for text here."""
    is_out = torch.zeros_like(scores, dtype=torch.bool)
    for at in range(ids.shape[1] - 1):
        is_same = ids[:, at] == ids[:, -1]
        is_out |= is_same.unsqueeze(-1) & torch.nn.functional.one_hot(ids[:, at + 1], VOCAB).bool()
    return scores.masked_fill(is_out, -torch.inf)


def one_after_the_other(*steps: Processed) -> Processed:
    """Several processors."""

    def processed(ids: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        for step in steps:
            scores = step(ids, mask, scores)
        return scores

    return processed


# ---- what is sampled


@dataclass(frozen=True)
class Prompts:
    """Prompts of several lengths. ids, mask [prompt, time], padded on the left"""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, *texts: Sequence[int]) -> "Prompts":
        """These texts."""
        width = max(map(len, texts))
        ids = [[PAD] * (width - len(text)) + list(text) for text in texts]
        mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
        return cls(torch.tensor(ids), torch.tensor(mask))

    @property
    def width(self) -> int:
        """Tokens of the longest."""
        return self.ids.shape[1]


@dataclass(frozen=True)
class Sample:
    """Texts that came out. which [row] their prompts; new [row, step], filled with padding behind an end"""

    which: Tensor
    new: Tensor


@dataclass(frozen=True)
class Case:
    """A fused model, how it generates, and the same said by hand.

    options      what `generate` is told
    processed    what its processors do
    end          the token that ends a text; None: nothing does
    """

    fused: Any
    prompts: Prompts
    options: dict[str, Any] = field(default_factory=dict)
    processed: Processed = unprocessed
    end: int | None = None

    def sample(self, batch: int, texts: int, steps: int, **options: Any) -> Sample:
        """At least so many texts of up to `steps` tokens, the prompts in turn, `batch` at a time."""
        config = self.fused.generation_config
        config.eos_token_id, config.pad_token_id = self.end, None if self.end is None else PAD
        options = {"do_sample": True, "max_new_tokens": steps, "speculate": 3} | self.options | options
        which = torch.arange(-(-texts // batch) * batch) % len(self.prompts.ids)
        parts = []
        for at, rows in enumerate(which.split(batch)):
            with shapes_unchecked(at > 0 or steps > CHECKED):
                ids = self.fused.generate(self.prompts.ids[rows], attention_mask=self.prompts.mask[rows], **options)
            new = ids[:, self.prompts.width :]
            parts.append(torch.nn.functional.pad(new, (0, steps - new.shape[1]), value=PAD))
            assert self.fused.last_speculation.is_on == (options["speculate"] != 0)
        return Sample(which, torch.cat(parts))

    def laws(self, which: Tensor, new: Tensor) -> Tensor:
        """The law of each new token behind the text before it. [row, step, vocab] log-probabilities"""
        ids, mask = self._whole(which, new)
        with shapes_unchecked(True):
            scores = self.fused(ids, attention_mask=mask, use_cache=False).logits.double()
        places = range(self.prompts.width, ids.shape[1])
        return torch.stack(
            [self.processed(ids[:, :at], mask[:, :at], scores[:, at - 1]) for at in places], 1
        ).log_softmax(-1)

    def _whole(self, which: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Texts with their prompts, and their mask."""
        mask = self.prompts.mask[which]
        return torch.cat([self.prompts.ids[which], new], -1), torch.cat([mask, torch.ones_like(new)], -1)

    # ---- texts

    def enumerated(self, steps: int) -> Tensor:
        """The probability of every text of up to `steps` tokens. [prompt, text], by the number of the filled text"""
        texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * steps)
        which = torch.arange(len(self.prompts.ids)).repeat_interleave(len(texts))
        every = texts.repeat(len(self.prompts.ids), 1)
        free = self.laws(which, every).gather(-1, every.unsqueeze(-1)).squeeze(-1).sum(-1).exp()
        # All that could follow an end has probability 1 together.
        numbers = number(self._ended(texts))
        return torch.zeros(len(self.prompts.ids), len(texts), dtype=torch.float64).index_add(
            1, numbers, free.view(-1, len(texts))
        )

    def _ended(self, texts: Tensor) -> Tensor:
        return texts if self.end is None else texts.masked_fill(~alive(texts, self.end), PAD)

    def p_of_texts(self, sample: Sample) -> float:
        """Of a chi-square test of all texts, those of different prompts apart; 0 where an impossible one came out."""
        laws = self.enumerated(sample.new.shape[1])
        statistic, freedom = 0.0, 0
        for prompt, law in enumerate(laws):
            counts = torch.bincount(number(sample.new[sample.which == prompt]), minlength=law.numel()).double()
            if counts[law == 0].sum() > 0:
                return 0.0
            cells = together(law * counts.sum())
            seen, expected = (torch.zeros(int(cells.max()) + 1).double().index_add(0, cells, x) for x in (counts, law))
            expected *= counts.sum()
            statistic += float(((seen - expected) ** 2 / expected).sum())
            freedom += len(seen) - 1
        assert freedom > 0
        return float(chi2.sf(statistic, freedom))

    # ---- tokens

    def p_of_tokens(self, sample: Sample) -> float:
        """Of the worst of several chi-square tests of the tokens' places, times their number (Bonferroni)."""
        ids, _ = self._whole(sample.which, sample.new)
        is_told = torch.ones_like(sample.new, dtype=torch.bool)
        if self.end is not None:
            is_told = alive(sample.new, self.end)
            if (sample.new != self._ended(sample.new)).any():
                return 0.0  # something stands behind an end
        laws, chosen = self.laws(sample.which, sample.new), sample.new[is_told]
        if laws[is_told].gather(-1, chosen.unsqueeze(-1)).isinf().any():
            return 0.0  # a token that cannot come
        before = ids[:, self.prompts.width - 1 : -1][is_told]
        found = [p_uniform(places(laws[is_told], chosen, order[is_told])) for order in self._orders(ids, laws)]
        found.append(p_uniform(places(laws[is_told], chosen, laws[is_told]), before))
        return min(1.0, min(found) * len(found))

    def _orders(self, ids: Tensor, laws: Tensor) -> Iterator[Tensor]:
        """Tokens by their id; by how likely they are; by how much likelier one member finds them. [row, step, vocab]

        Draws from another law pile up where the fused law gives little; a bonus that comes from the strong model where
        that gives more than the fused law; a replacement that comes from the fused law, not from the residual, where
        the drafter does.
        """
        yield torch.arange(VOCAB).expand_as(laws)
        yield laws
        with shapes_unchecked(True):
            for member in self.fused.members:
                alone = self.fused.reader.read_alone(member, ids)[:, self.prompts.width - 1 : -1]
                yield alone.log_softmax(-1) - laws


@contextmanager
def shapes_unchecked(is_off: bool) -> Iterator[None]:
    """Leaves the types and shapes of annotations alone: one call in a thousand alike is enough to compare them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", is_off or before)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def number(texts: Tensor) -> Tensor:
    """Texts [row, step] as numbers to the base of the vocabulary. [row]"""
    return (texts * VOCAB ** torch.arange(texts.shape[1] - 1, -1, -1)).sum(-1)


def alive(texts: Tensor, end: int) -> Tensor:
    """Whether no end stands before a token. [row, step]"""
    is_end = (texts == end).long()
    return is_end.cumsum(-1) - is_end == 0


def together(expected: Tensor) -> Tensor:
    """A cell for each text [text], the rare ones together, such that each cell is expected `LEAST` times or more."""
    cells, cell, total = torch.zeros(len(expected), dtype=torch.long), 0, 0.0
    order = expected.argsort()
    for at, count in zip(order.tolist(), expected[order].tolist(), strict=True):
        if total >= LEAST:
            cell, total = cell + 1, 0.0
        cells[at], total = cell, total + count
    return cells


def places(law: Tensor, chosen: Tensor, order: Tensor) -> Tensor:
    """Where in [0, 1) each token lies among the tokens in ascending order, at random within its own share. [token]"""
    ranks = order.argsort(dim=-1, stable=True)
    shares = law.exp().gather(-1, ranks)
    at = (ranks == chosen.unsqueeze(-1)).long().argmax(-1, keepdim=True)
    random = torch.rand(at.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = shares.gather(-1, at)
    return (shares.cumsum(-1).gather(-1, at) - own + own * random).clamp(0.0, 1.0).squeeze(-1)


def p_uniform(found: Tensor, groups: Tensor | None = None) -> float:
    """Of a chi-square test whether places are uniform, in each group [token] by itself."""
    statistic, freedom = 0.0, 0
    for group in [torch.ones_like(found).bool()] if groups is None else [groups == g for g in groups.unique()]:
        expected = float(group.sum()) / BINS
        if expected < LEAST:
            continue
        counts = torch.histc(found[group], bins=BINS, min=0.0, max=1.0)
        statistic += float(((counts - expected) ** 2 / expected).sum())
        freedom += BINS - 1
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0
