"""The tables of names: every line leads to an object that says who described it."""

import dataclasses
import sys

import pytest

from trimtab.core.errors import UnknownName
from trimtab.core.registry import find
from trimtab.logits.registry import AMOUNTS, CHOOSERS

LINES = [(table, name) for table in (AMOUNTS, CHOOSERS) for name in table]


@pytest.mark.parametrize(("table", "name"), LINES, ids=[name for _, name in LINES])
def test_every_line_leads_to_a_frozen_dataclass_with_a_documented_module(table, name):
    kind = find(table, name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert table[name].summary.endswith(".")
    assert len(table[name].summary) <= 100
    assert table[name].source
    assert "Source: " in sys.modules[kind.__module__].__doc__


def test_no_name_means_two_things():
    assert not set(AMOUNTS) & set(CHOOSERS)


@pytest.mark.parametrize(("given", "near"), [("dinamic", "dynamic"), ("statik", "static"), ("Grid", "grid")])
def test_a_wrong_name_is_answered_with_the_nearest_one(given, near):
    with pytest.raises(UnknownName, match=f"no amount '{given}'(?s:.*)did you mean '{near}'"):
        find(AMOUNTS, given)
