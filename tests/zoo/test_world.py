"""The world and its corpus: the same for a seed, other for another, and with the shares that the regime rests on."""

from collections import Counter
from itertools import islice

import pytest

from trimtab.zoo import words
from trimtab.zoo.corpus import DOCUMENT_SHARES, STYLE_SHARES, Corpus
from trimtab.zoo.tasks import TASKS, TUNED_TASKS, draw_items
from trimtab.zoo.world import QUICK, make_world


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    make_world.cache_clear()
    first = make_world(3, QUICK)
    make_world.cache_clear()
    assert make_world(3, QUICK) == first
    assert make_world(4, QUICK).people != first.people


def test_the_corpus_is_a_function_of_world_and_seed():
    world = make_world(0, QUICK)
    first, again, other = (list(islice(Corpus(world, seed).documents(), 50)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_facts_of_people_are_undisputed_myths_about_things_are_not_and_half_of_the_fields_is():
    world = make_world(0)
    assert all(fact.truth == fact.belief for person in world.people for fact in person.facts)
    assert all(fact.truth != fact.belief for thing in world.things for fact in thing.facts)
    field_facts = [fact for field in world.domains.values() for subject in field for fact in subject.facts]
    share = sum(fact.truth != fact.belief for fact in field_facts) / len(field_facts)
    assert 0.4 < share < 0.6
    assert len(world.domains) >= 8


@pytest.mark.parametrize("task", TUNED_TASKS)
def test_the_tasks_own_style_is_about_a_fifth_to_a_quarter_of_the_answers(task):
    """The regime: tuning unlocks a style that pretraining has, and that untuned models do not prefer."""
    assert sum(STYLE_SHARES[task].values()) == pytest.approx(1.0)
    assert 0.2 <= STYLE_SHARES[task]["own"] <= 0.26


def test_shares_of_documents_come_out_as_stated():
    corpus = Corpus(make_world(0, QUICK))
    kinds = Counter(_kind(document) for document in islice(corpus.documents(), 4000))
    assert kinds["biography"] / 4000 == pytest.approx(
        DOCUMENT_SHARES["biography"] + DOCUMENT_SHARES["statement"], abs=0.03
    )
    assert kinds["question"] / 4000 == pytest.approx(sum(DOCUMENT_SHARES[task] for task in TASKS), abs=0.03)


def _kind(document: str) -> str:
    if document.startswith("Q: "):
        return "question"
    return "sums" if document[0].isdigit() or document.startswith("If you work out") else "biography"


def test_a_session_keeps_one_style():
    corpus = Corpus(make_world(0, QUICK))
    for _ in range(200):
        answers = [line.removeprefix("A: ") for line in corpus.session("facts").split("\n") if line.startswith("A: ")]
        is_refusal = [answer in words.REFUSALS for answer in answers]
        assert len(set(is_refusal)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_no_question_stands_in_two_splits(task):
    splits = draw_items(make_world(0), task)
    prompts = [item.prompt for items in splits.values() for item in items]
    assert len(prompts) == len(set(prompts))
    assert len(splits["test"]) >= 500
    assert bool(splits["train"]) == (task in TUNED_TASKS)


def test_people_of_the_test_split_are_strangers_to_the_experts():
    world = make_world(0)
    names = {split: [person.name for person in world.people if person.split == split] for split in ("train", "test")}
    train_prompts = " ".join(item.prompt for task in ("facts", "truth") for item in draw_items(world, task)["train"])
    assert not any(name in train_prompts for name in names["test"])
    assert all(any(name in item.prompt for name in names["test"]) for item in draw_items(world, "facts")["test"][:50])


def test_worked_solutions_are_right():
    for item in draw_items(make_world(0), "arithmetic")["validation"]:
        steps, answer = item.target.split(" #### ")
        total = None
        for step in steps.split():
            left, right = step.rstrip(".").split("=")
            assert eval(left, {"__builtins__": {}}) == int(right)
            assert total is None or left.startswith(str(total))
            assert 0 <= int(right) <= 99
            total = int(right)
        assert total == int(answer)


def test_choices_hold_the_truth_once_and_the_myth_beside_it():
    world = make_world(0)
    beliefs = {(fact.subject, f" {fact.truth}"): f" {fact.belief}" for thing in world.things for fact in thing.facts}
    for item in draw_items(world, "truth")["test"]:
        assert item.choices is not None
        assert len(set(item.choices)) == 4
        assert item.choices[item.label] == item.target
        assert any(s in item.prompt and t == item.target and b in item.choices for (s, t), b in beliefs.items())
