"""`measure` is a library: its source names no strategy, no chooser, no pair and no task."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab.measure
from trimtab import zoo
from trimtab.logits.registry import AMOUNTS, CHOOSERS
from trimtab.studies.models import SMALL_OF

FOLDER = Path(trimtab.measure.__file__).parent
NAMES = {*AMOUNTS, *CHOOSERS, *zoo.TASKS, *SMALL_OF, *SMALL_OF.values()}
COMMON = {"sum", "filter", "grid"}  # Python's functions and the type of tables; as texts they are names of strategies


def names_in(source: str) -> Iterator[str]:
    """Every identifier, and every word of a text that stands alone in it; docstrings and comments may explain."""
    tree = ast.parse(source)
    bodies = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    documented = {id(n.body[0].value) for n in bodies if n.body and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value
            yield from node.value.split("/")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string not in COMMON:
            yield token.string


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_measure_names_no_strategy_no_pair_and_no_task(file: Path) -> None:
    assert set(names_in(file.read_text(encoding="utf-8"))) & NAMES == set()


@pytest.mark.parametrize("line", ['x = "dynamic"', 'role = "small/mixed"', "facts = 1", 'table["sum"]'])
def test_a_name_would_be_found(line: str) -> None:
    assert set(names_in(line)) & NAMES
    assert not set(names_in(f"'''About {line} .'''")) & NAMES
