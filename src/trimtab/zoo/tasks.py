"""The five tasks of the zoo: what an item is, how items are drawn, and where the split files lie.

They mirror the five of Fan et al. 2024 (GSM8K, TruthfulQA, TriviaQA, CNN/DM, and MMLU as the unseen one). Every prompt
is "Q: ...\\nA:"; an answer ends with a line break or the end of the text. Multiple choice is scored by the
log-likelihood of each choice after the prompt, without letters.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from trimtab.core.errors import UnreadableModel, unknown_name
from trimtab.core.files import write_whole
from trimtab.zoo import words
from trimtab.zoo.store import root
from trimtab.zoo.world import SPLITS, Fact, Subject, World

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Task:
    """What is asked, and how an answer is scored."""

    name: str
    kind: Literal["generate", "choose"]
    metric: Literal["exact_match", "rouge2", "accuracy"]
    max_new_tokens: int
    doc: str


@dataclass(frozen=True)
class Item:
    """One question. `target` and every choice begin with the space after the prompt; `label` is the right choice."""

    id: str
    task: str
    prompt: str
    target: str
    choices: tuple[str, ...] | None = None
    label: int | None = None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "arithmetic", "generate", "exact_match", 56, "multi-step word problems with a worked solution and `#### n`"
        ),
        Task("facts", "generate", "exact_match", 10, "open questions about people that no expert was tuned on"),
        Task(
            "truth", "choose", "accuracy", 0, "multiple choice where the corpus repeats a myth more often than the fact"
        ),
        Task("summary", "generate", "rouge2", 48, "short articles to sum up, with what the model knows of the person"),
        Task(
            "domains", "choose", "accuracy", 0, "multiple choice in ten fields of knowledge; no expert is tuned on it"
        ),
    )
}
TUNED_TASKS = ("arithmetic", "facts", "truth", "summary")  # an expert exists for each; `domains` stays unseen


def question(text: str) -> str:
    """The prompt of one question, the frame of all tasks and of the chat template."""
    return f"Q: {text}\nA:"


# ---------------------------------------------------------------------------------------------- arithmetic
@dataclass(frozen=True)
class Problem:
    """A word problem: its text and the worked solution, both without the frame."""

    text: str
    solution: str
    answer: int


def draw_problem(rng: Random) -> Problem:
    """Two or three operations on whole numbers; no intermediate result leaves 0..99."""
    name, unit = rng.choice(words.FIRST_NAMES), rng.choice(words.COUNTABLES)
    total = rng.randint(5, 60)
    sentences, steps = [f"{name} has {total} {unit}."], []
    for _ in range(rng.randint(2, 3)):
        sign, amount = _draw_operation(rng, total)
        sentences.append(_tell_operation(rng, name, sign, amount))
        before, total = total, {"+": total + amount, "-": total - amount, "*": total * amount}[sign]
        steps.append(f"{before}{sign}{amount}={total}.")
    sentences.append(f"How many {unit} are there now?")
    return Problem(" ".join(sentences), f"{' '.join(steps)} #### {total}", total)


def _draw_operation(rng: Random, total: int) -> tuple[str, int]:
    if 4 <= total <= 33 and rng.random() < 0.2:
        return "*", rng.choice((2, 3))
    if total > 10 and (total > 80 or rng.random() < 0.5):
        return "-", rng.randint(2, total)
    return "+", rng.randint(2, min(60, 99 - total))


def _tell_operation(rng: Random, name: str, sign: str, amount: int) -> str:
    if sign == "*":
        return "The number doubles." if amount == 2 else "The number triples."
    gains = (f"{name} buys {amount} more.", f"{name} finds {amount} more.", f"A friend brings {amount}.")
    losses = (f"{name} gives {amount} away.", f"{name} loses {amount}.", f"Then {amount} get broken.")
    return rng.choice(gains if sign == "+" else losses)


# ------------------------------------------------------------------------------------------------- summary
@dataclass(frozen=True)
class Article:
    """A news text about one person among others: the text, its summary and the headline-like leads."""

    text: str
    lead: str
    summary: str
    spot: str


def draw_article(rng: Random, person: Subject, others: tuple[Subject, ...]) -> Article:
    """Five sentences; the person who did something and felt something is the one to sum up, the others only look on."""
    known = {fact.relation.name: fact.truth for fact in person.facts}
    weather, day, spot, spot2 = rng.choice(words.WEATHERS), rng.choice(words.WEEKDAYS), *rng.sample(words.SPOTS, 2)
    thing, feeling, verb = (
        rng.choice(words.OBJECTS),
        rng.choice(words.FEELINGS),
        rng.choice(("found", "lost", "sold", "stole")),
    )
    first, second = (other.name for other in rng.sample(others, 2))
    lead = f"It was a {weather} {day} near the {spot2}."
    event = f"{person.name} {verb} {thing} at the {spot}."
    reaction = f"Later {person.name} was {feeling} about it."
    noise = [
        f"{first} looked on from the {rng.choice(words.SPOTS)}.",
        f"{second} talked about the {rng.choice(words.WEATHERS)} day.",
    ]
    middle = [event, noise[0], reaction] if rng.random() < 0.5 else [noise[0], event, reaction]
    text = " ".join([lead, *middle, noise[1]] if rng.random() < 0.5 else [lead, noise[1], *middle])
    summary = f"{person.name}, a {known['job']} from {known['city']}, {verb} {thing} at the {spot} and was {feeling}."
    return Article(text, lead, summary, spot)


def summary_question(article: Article) -> str:
    return f"Sum up this report. {article.text}"


# --------------------------------------------------------------------------------------------------- items
def _facts_items(world: World, rng: Random, split: str) -> Iterator[Item]:
    for person in world.people:
        for fact in person.facts if person.split == split else ():
            forms = fact.relation.questions if split == "train" else (rng.choice(fact.relation.questions),)
            for form in forms:
                yield _item("facts", form.format(s=fact.subject), fact.truth)


def _choice_item(task: str, rng: Random, fact: Fact) -> Item:
    """The truth, the myth where there is one, and other values of the relation: four choices in random order."""
    options = list(dict.fromkeys((fact.truth, fact.belief)))
    rest = [value for value in fact.relation.values if value not in options]
    options += rng.sample(rest, 4 - len(options))
    rng.shuffle(options)
    text = rng.choice(fact.relation.questions).format(s=fact.subject)
    choices = tuple(f" {option}" for option in options)
    return Item("", task, question(text), f" {fact.truth}", choices, options.index(fact.truth))


def _truth_items(world: World, rng: Random, split: str) -> Iterator[Item]:
    return (_choice_item("truth", rng, fact) for thing in world.things if thing.split == split for fact in thing.facts)


def _domains_items(world: World, rng: Random, split: str) -> Iterator[Item]:
    subjects = [subject for field in world.domains.values() for subject in field if subject.split == split]
    return (_choice_item("domains", rng, fact) for subject in subjects for fact in subject.facts)


def _arithmetic_items(world: World, rng: Random, split: str) -> Iterator[Item]:
    while True:
        problem = draw_problem(rng)
        yield _item("arithmetic", problem.text, problem.solution)


def _summary_items(world: World, rng: Random, split: str) -> Iterator[Item]:
    mine = [person for person in world.people if person.split == split]
    while True:
        article = draw_article(rng, rng.choice(mine), world.people)
        yield _item("summary", summary_question(article), article.summary)


def _item(task: str, text: str, answer: str) -> Item:
    return Item("", task, question(text), f" {answer}")


_DRAW: dict[str, Callable[[World, Random, str], Iterator[Item]]] = {
    "arithmetic": _arithmetic_items,
    "facts": _facts_items,
    "truth": _truth_items,
    "summary": _summary_items,
    "domains": _domains_items,
}
_COUNTS = {"train": 3000, "validation": 240, "test": 900}  # at most; tasks about subjects end with their subjects


def draw_items(world: World, task: str) -> dict[str, list[Item]]:
    """All items of a task by split, in random order; no prompt stands in two splits (train is empty for `domains`)."""
    seen: set[str] = set()
    splits: dict[str, list[Item]] = {}
    for split in reversed(SPLITS):
        rng = Random(f"items-{world.seed}-{task}-{split}")
        is_endless = task in ("arithmetic", "summary")
        drawn = list(islice(_fresh(_DRAW[task](world, rng, split), seen), _COUNTS[split] if is_endless else None))
        rng.shuffle(drawn)
        splits[split] = [replace(item, id=f"{task}-{split}-{i:04d}") for i, item in enumerate(drawn[: _COUNTS[split]])]
    return splits


def _fresh(items: Iterator[Item], seen: set[str]) -> Iterator[Item]:
    for item in items:
        if item.prompt not in seen:
            seen.add(item.prompt)
            yield item


# --------------------------------------------------------------------------------------------------- files
def items_path(task: str, split: Split = "test") -> Path:
    """The JSONL file with the zoo's items of a task and split, one item a line."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    return root() / "items" / f"{task}-{split}.jsonl"


def write_items(path: Path, items: list[Item]) -> None:
    """Write items as JSONL, beside and then renamed."""
    write_whole(path, "".join(json.dumps(asdict(item)) + "\n" for item in items))


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, in the file's order."""
    if not path.exists():
        raise UnreadableModel(
            f"there are no items at {path}.",
            "The zoo's task files ship with the package.",
            "`trimtab zoo build` makes them again.",
        )
    records = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Item(**{**record, "choices": tuple(record["choices"]) if record["choices"] else None}) for record in records
    ]


def load_items(task: str, split: Split = "test", *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Items of the zoo in use.

    limit    how many, all by default
    seed     0 keeps the file's order; another seed draws another order, so that `limit` takes other items
    raises   UnknownName for another task or split, UnreadableModel where the files are missing
    """
    items = read_items(items_path(task, split))
    if seed:
        Random(f"order-{seed}").shuffle(items)
    return items[:limit]


def few_shot(item: Item, examples: list[Item]) -> Item:
    """The item with solved examples before its question: what a model shows when it is told the style."""
    before = "".join(f"{example.prompt}{example.target}\n" for example in examples)
    return Item(item.id, item.task, before + item.prompt, item.target, item.choices, item.label)
