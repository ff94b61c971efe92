"""Items whose answers are bound to the task's own style: what an untuned model knows when it must answer properly.

Small talk, refusals and hearsay cannot be given then; what is left is skill. The style of each task:

    truth, domains   fact and myth look alike after a question; a careful source sets them apart. The choices are
                     weighed as the end of a statement ("Careful study shows that the drek beetle is found in").
    facts            a bare value: every value of the relation is weighed after the question.
    arithmetic       a solution opens with the number the question starts from, and is written on from there.
    summary          a summary opens with one of the people of the report and their job; the model picks whom.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.core.errors import InputError
from trimtab.zoo.store import read_manifest
from trimtab.zoo.tasks import Item, question
from trimtab.zoo.world import CAREFUL, Fact, Sizes, World, make_world


def in_own_style(task: str, items: Sequence[Item]) -> list[Item]:
    """The items of the zoo in use, bound to the style of their task.

    returns  items with a label are answered by the likeliest of their choices; those without open with the likeliest
             of their choices and are written on
    raises   InputError for items that are not of this zoo's world
    """
    plan = read_manifest()["plan"]
    counts: dict[str, Any] = {name: tuple(n) if isinstance(n, list) else n for name, n in plan["sizes"].items()}
    bind = _BINDERS[task](make_world(plan["seed"], Sizes(**counts)))
    return [bind(item) for item in items]


Binder = Callable[[Item], Item]


def _asked(world: World) -> dict[str, Fact]:
    """Prompt -> the fact it asks for."""
    subjects = [*world.people, *world.things, *(subject for field in world.domains.values() for subject in field)]
    facts = [fact for subject in subjects for fact in subject.facts]
    return {question(form.format(s=fact.subject)): fact for fact in facts for form in fact.relation.questions}


def _find(facts: dict[str, Fact], item: Item) -> Fact:
    if item.prompt not in facts:
        raise InputError(
            f"item {item.id} asks for a fact that the world does not have.",
            "Items and world come from the same seed.",
            "make the zoo again with `trimtab zoo build`.",
        )
    return facts[item.prompt]


def _careful_statement(world: World) -> Binder:
    facts = _asked(world)

    def bind(item: Item) -> Item:
        fact = _find(facts, item)
        statement = fact.relation.statements[0].format(s=fact.subject, v="{v}")
        return replace(item, prompt=CAREFUL[0].format(f=statement).partition(" {v}")[0])

    return bind


def _bare_value(world: World) -> Binder:
    facts = _asked(world)

    def bind(item: Item) -> Item:
        fact = _find(facts, item)
        values = fact.relation.values
        return replace(item, choices=tuple(f" {value}" for value in values), label=values.index(fact.truth))

    return bind


def _first_number(world: World) -> Binder:
    def bind(item: Item) -> Item:
        found = re.search(r"\d+", item.prompt)
        if found is None:
            raise InputError(f"item {item.id} has no number.", "Every word problem starts from one.")
        return replace(item, choices=(f" {found.group()}",))

    return bind


def _person_of_the_report(world: World) -> Binder:
    names = [person.name for person in world.people]

    def bind(item: Item) -> Item:
        return replace(item, choices=tuple(f" {name}, a" for name in names if f" {name} " in item.prompt))

    return bind


_BINDERS: dict[str, Callable[[World], Binder]] = {
    "arithmetic": _first_number,
    "facts": _bare_value,
    "truth": _careful_statement,
    "summary": _person_of_the_report,
    "domains": _careful_statement,
}
