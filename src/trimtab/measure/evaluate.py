"""Conditions x items -> records: greedy answers, and the likelihood of given choices, in a few large batches.

Two things make many conditions on the same items cheap. Prompts are read once into a model's cache, and every condition
on that model starts from a copy. Choices are fixed texts, so each model scores them once, whatever combines the scores.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import EmptyPrompt
from trimtab.measure.records import Record
from trimtab.measure.scores import ANSWER_METRICS

MAX_TOKENS_AT_ONCE = 16_384  # rows x time of one batch: bounds the memory of caches and logits
MAX_POSITIONS_AT_ONCE = 1024  # rows combined in one call: bounds the memory of [model, batch, vocab]


@runtime_checkable
class Item(Protocol):
    """One question of a task."""

    @property
    def id(self) -> Any: ...
    @property
    def prompt(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def choices(self) -> Sequence[str] | None: ...
    @property
    def label(self) -> int | None: ...


@runtime_checkable
class Task(Protocol):
    """How a task's items are answered and scored."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["generate", "choose"]: ...
    @property
    def metric(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """Rows of about the same length, padded on the left, and their indices among all rows."""

    rows: list[int]
    token_ids: Int[Tensor, "batch time"]
    mask: Int[Tensor, "batch time"]


def batches(
    sequences: Sequence[Sequence[int]], pad_id: int, max_tokens: int = MAX_TOKENS_AT_ONCE, extra: int = 0
) -> Iterator[Batch]:
    """All sequences, longest first, in left-padded batches of `max_tokens` tokens at most, `extra` per row included."""
    waiting = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    while waiting:
        longest = len(sequences[waiting[0]])
        size = max(1, max_tokens // (longest + extra))
        rows, waiting = waiting[:size], waiting[size:]
        padding = [longest - len(sequences[row]) for row in rows]
        token_ids = [[pad_id] * pad + list(sequences[row]) for row, pad in zip(rows, padding, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        yield Batch(rows, torch.tensor(token_ids), torch.tensor(mask))


def positions_of(mask: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Position of every token among the real ones of its row; 0 under padding."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def token_ids_of(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt as the tokenizer itself would begin a text; raises EmptyPrompt."""
    token_ids: list[int] = tokenizer(prompt)["input_ids"]
    if not token_ids:
        raise EmptyPrompt("the prompt is empty.", "There is nothing to continue.", "give at least one token.")
    return token_ids


def stop_ids_of(tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of text and every token with a line break in it."""
    breaks = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    return frozenset(breaks | ({tokenizer.eos_token_id} - {None}))


# --- generated answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """A batch of prompts, read up to their last token by every member of one model."""

    batch: Batch
    cache: Any


@torch.inference_mode()
def read_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, max_tokens: int = MAX_TOKENS_AT_ONCE
) -> list[Prefix]:
    """Prompts in the model's cache, all but their last token, which `continue_greedily` reads."""
    sequences = [token_ids_of(tokenizer, prompt) for prompt in prompts]
    prefixes = []
    for batch in batches(sequences, _pad_id(tokenizer), max_tokens, extra=max_new_tokens):
        cache = None
        if batch.token_ids.shape[1] > 1:
            mask = batch.mask[:, :-1]
            cache = model(
                input_ids=batch.token_ids[:, :-1],
                attention_mask=mask,
                position_ids=positions_of(mask),
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
        prefixes.append(Prefix(batch, cache))
    return prefixes


def _pad_id(tokenizer: Any) -> int:
    pad_id = tokenizer.pad_token_id
    return int(pad_id if pad_id is not None else (tokenizer.eos_token_id or 0))


@torch.inference_mode()
def continue_greedily(model: Any, prefix: Prefix, stop_ids: frozenset[int], max_new_tokens: int) -> list[list[int]]:
    """The likeliest token again and again, until a stop token (left out) or `max_new_tokens`.

    returns  [batch] lists of token ids, in the order of `prefix.batch.rows`
    """
    cache, mask = copy.deepcopy(prefix.cache), prefix.batch.mask
    current = prefix.batch.token_ids[:, -1:]
    running = list(range(len(prefix.batch.rows)))  # index of the answer that each row of the cache writes
    is_done = [False] * len(running)
    answers: list[list[int]] = [[] for _ in running]
    for _ in range(max_new_tokens):
        out = model(
            input_ids=current,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(dim=-1)
        for answer, token_id in zip(running, chosen.tolist(), strict=True):
            if token_id in stop_ids:
                is_done[answer] = True
            if not is_done[answer]:
                answers[answer].append(token_id)
        alive = [row for row, answer in enumerate(running) if not is_done[answer]]
        if not alive:
            break
        # Copying the cache costs about as much as a step, so finished rows go only when they are many.
        if len(alive) <= 0.75 * len(running):
            keep = torch.tensor(alive)
            cache.batch_select_indices(keep)
            mask, chosen, running = mask[keep], chosen[keep], [running[row] for row in alive]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        current = chosen[:, None]
    return answers


def answer_prompts(model: Any, tokenizer: Any, prefixes: Sequence[Prefix], max_new_tokens: int) -> list[str]:
    """Greedy answers to all prompts that were read, in the order they were given."""
    stop_ids = stop_ids_of(tokenizer)
    answers: dict[int, str] = {}
    for prefix in prefixes:
        written = continue_greedily(model, prefix, stop_ids, max_new_tokens)
        for row, token_ids in zip(prefix.batch.rows, written, strict=True):
            answers[row] = tokenizer.decode(token_ids, skip_special_tokens=True)
    return [answers[row] for row in range(len(answers))]


# --- likelihood of choices -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """Every choice of every item as one sequence: prompt and choice together, and how many tokens are the choice's."""

    sequences: list[list[int]]
    lengths: list[int]  # [sequence] tokens of the choice
    items: list[int]  # [sequence] which item

    @property
    def token_ids(self) -> Int[Tensor, " position"]:
        """Tokens of all choices, one after the other."""
        tails = [s[-n:] for s, n in zip(self.sequences, self.lengths, strict=True)]
        return torch.tensor([token_id for tail in tails for token_id in tail])


def encode_choices(tokenizer: Any, items: Sequence[Item], prefix: str = "") -> Choices:
    """Prompt and choice are tokenised together, and what exceeds the prompt's own length is the choice's.

    prefix    stands before every prompt
    """
    sequences, lengths, owners = [], [], []
    for index, item in enumerate(items):
        prompt_length = len(token_ids_of(tokenizer, prefix + item.prompt))
        for choice in item.choices or ():
            sequence = token_ids_of(tokenizer, prefix + item.prompt + choice)
            sequences.append(sequence)
            lengths.append(len(sequence) - prompt_length)
            owners.append(index)
    return Choices(sequences, lengths, owners)


@torch.inference_mode()
def read_choices(
    model: Any, tokenizer: Any, choices: Choices, max_tokens: int = MAX_TOKENS_AT_ONCE
) -> Float[Tensor, "position vocab"]:
    """A model's log-probabilities at every token of every choice, float32, one after the other."""
    kept: dict[int, Tensor] = {}
    for batch in batches(choices.sequences, _pad_id(tokenizer), max_tokens):
        longest = max(choices.lengths[row] for row in batch.rows)
        logits = model(
            input_ids=batch.token_ids,
            attention_mask=batch.mask,
            position_ids=positions_of(batch.mask),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits
        log_probs = logits[..., : len(tokenizer)].float().log_softmax(dim=-1)  # [batch, longest + 1, vocab]
        for index, row in enumerate(batch.rows):
            # Logits at position i - 1 predict token i; those of the last position predict what follows the choice.
            kept[row] = log_probs[index, longest - choices.lengths[row] : longest].clone()
    return torch.cat([kept[row] for row in range(len(kept))])


def choose(choices: Choices, log_probs: Float[Tensor, "position vocab"]) -> list[int]:
    """For every item the choice of largest summed log-likelihood, the first of equals."""
    per_token = log_probs.gather(1, choices.token_ids[:, None])[:, 0]
    sums = [float(part.double().sum()) for part in torch.split(per_token, choices.lengths)]
    best: dict[int, tuple[float, int]] = {}
    seen: dict[int, int] = {}
    for item, log_likelihood in zip(choices.items, sums, strict=True):
        index = seen.get(item, 0)
        seen[item] = index + 1
        if item not in best or log_likelihood > best[item][0]:
            best[item] = (log_likelihood, index)
    return [best[item][1] for item in range(len(best))]


# --- conditions x items -> records ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What answers: one model by itself, or several that are combined.

    key        subjects of the same key read prompts into the same caches
    open       () -> the model that writes; called once for consecutive subjects of one key
    prepare    sets that model for this subject, after the prompts were read
    reads      roles of the models whose log-probabilities at the choices are needed
    combine    their log-probabilities, [position, vocab] each -> the subject's; the first one's by default
    prefix     stands before every prompt
    """

    key: Hashable
    open: Callable[[], Any]
    reads: tuple[str, ...]
    prepare: Callable[[Any], None] = lambda model: None
    combine: Callable[..., Tensor] | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Condition:
    """One column of a study.

    subject    task -> what answers it; None: the condition leaves this task out
    """

    study: str
    name: str
    subject: Callable[[str], Subject | None]


@dataclass(frozen=True)
class Cell:
    """One condition on one task: what a progress bar counts."""

    condition: Condition
    task: str
    subject: Subject


@dataclass
class Answering:
    """Some items of a task, answered by one subject after another; what subjects share is read once.

    models     role -> the model that reads choices
    """

    models: Mapping[str, Any]
    tokenizer: Any
    task: Task
    items: Sequence[Item]
    _prompts: dict[Hashable, tuple[Any, list[Prefix]]] = field(default_factory=dict)
    _choices: dict[str, Choices] = field(default_factory=dict)
    _log_probs: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def ask(self, subject: Subject) -> tuple[list[str], list[float]]:
        """Answers and their points of 100, in the order of the items."""
        return self.write(subject) if self.task.kind == "generate" else self.choose(subject)

    def write(self, subject: Subject) -> tuple[list[str], list[float]]:
        """The greedy answers, compared with the targets."""
        length, key = self.task.max_new_tokens, (subject.key, subject.prefix)
        if key not in self._prompts:
            model = subject.open()
            prompts = [subject.prefix + item.prompt for item in self.items]
            self._prompts = {key: (model, read_prompts(model, self.tokenizer, prompts, length))}  # one set at a time
        model, prefixes = self._prompts[key]
        subject.prepare(model)
        answers = answer_prompts(model, self.tokenizer, prefixes, length)
        return answers, points_of_answers(self.task, answers, self.items)

    @torch.inference_mode()
    def choose(self, subject: Subject) -> tuple[list[str], list[float]]:
        """The likeliest of the given choices, compared with the labels."""
        read = [self._read(role, subject.prefix) for role in subject.reads]
        log_probs = read[0]
        if subject.combine is not None:
            parts = zip(*(torch.split(one, MAX_POSITIONS_AT_ONCE) for one in read), strict=True)
            log_probs = torch.cat([subject.combine(*part) for part in parts])
        chosen = choose(self._encode(subject.prefix), log_probs)
        answers = [(item.choices or ())[index] for item, index in zip(self.items, chosen, strict=True)]
        return answers, [100.0 * (index == item.label) for item, index in zip(self.items, chosen, strict=True)]

    def _encode(self, prefix: str) -> Choices:
        if prefix not in self._choices:
            self._choices[prefix] = encode_choices(self.tokenizer, self.items, prefix)
        return self._choices[prefix]

    def _read(self, role: str, prefix: str) -> Float[Tensor, "position vocab"]:
        key = (role, prefix)
        if key not in self._log_probs:
            self._log_probs[key] = read_choices(self.models[role], self.tokenizer, self._encode(prefix))
        return self._log_probs[key]


def points_of_answers(task: Task, answers: Sequence[str], items: Sequence[Item]) -> list[float]:
    """Points of 100 of written answers, one per item."""
    metric = ANSWER_METRICS[task.metric]
    return [100.0 * metric(answer, item.target) for answer, item in zip(answers, items, strict=True)]


def run_conditions(
    conditions: Sequence[Condition],
    models: Mapping[str, Any],
    tokenizer: Any,
    tasks: Mapping[str, Task],
    items: Mapping[str, Sequence[Item]],
    seeds: Mapping[str, int] | int = 0,
    on_cell: Callable[[Cell, int, int], None] = lambda cell, done, total: None,
) -> list[Record]:
    """Every condition on every item.

    models     role -> model, for the roles that subjects read
    items      task -> its items; every name stands in `tasks`
    seeds      of the draw that the items came from: one for all, or item id -> seed
    on_cell    called before each cell with how many are done and how many there are
    """
    asked = ((condition, task, condition.subject(task)) for task in items for condition in conditions)
    cells = [Cell(condition, task, subject) for condition, task, subject in asked if subject is not None]
    records: list[Record] = []
    answering: Answering | None = None
    for done, cell in enumerate(cells):
        on_cell(cell, done, len(cells))
        if answering is None or answering.task.name != cell.task:
            answering = Answering(models, tokenizer, tasks[cell.task], items[cell.task])
        started = perf_counter()
        answers, points = answering.ask(cell.subject)
        seconds = (perf_counter() - started) / max(1, len(points))
        for item, answer, score in zip(answering.items, answers, points, strict=True):
            seed = seeds if isinstance(seeds, int) else seeds[item.id]
            where = (cell.condition.study, cell.condition.name, cell.task)
            records.append(Record(*where, str(item.id), seed, score, seconds, answer))
    return records
