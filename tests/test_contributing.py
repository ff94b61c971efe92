"""The examples of CONTRIBUTING.md, taken word for word, in a copy of the package: they pass what every method must."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

PACKAGE, TESTS = Path(trimtab.__file__).parent, Path(__file__).parent
TEXT = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"The file `src/(\S+)`[^\n]*\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL))
LINE = re.search(r"Its line in `src/trimtab/logits/registry.py`[^\n]*\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)
AMOUNT = "trimtab/logits/strategy/amounts/gradual.py"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process whose trimtab has the amount and the space of the page."""
    source = tmp_path_factory.mktemp("src")
    shutil.copytree(PACKAGE, source / "trimtab", ignore=shutil.ignore_patterns("data"))
    (source / "trimtab" / "zoo" / "data").symlink_to(PACKAGE / "zoo" / "data")
    for name, text in FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    registry = source / "trimtab" / "logits" / "registry.py"
    head, opening, rest = registry.read_text(encoding="utf-8").partition("    entries={\n")
    assert LINE
    registry.write_text(head + opening + LINE[1] + rest, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(TESTS), *sys.path])}


def run(environment: dict[str, str], *words: str) -> str:
    ran = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_page_shows_an_amount_of_thirty_lines_and_a_space_of_four_files() -> None:
    space = {name for name in FILES if name.startswith("trimtab/toy/")}
    assert set(FILES) == {AMOUNT, *space}
    assert len(FILES[AMOUNT].strip().splitlines()) <= 32
    assert len(space) == 4


def test_the_pages_methods_pass_the_contract_and_the_laws(environment) -> None:
    files = (TESTS / "test_registry.py", TESTS / "logits" / "strategy" / "test_strategy.py")
    words = ("pytest", "-p", "no:cacheprovider", "--noconftest", *map(str, files), "-k", "gradual or turn-flip")
    counted = re.search(r"(\d+) passed", run(environment, *words))
    assert counted
    assert int(counted[1]) >= 2 * 5 + 20  # of the contract, for both, and of the laws


def test_the_pages_methods_are_listed_shown_and_in_the_pages(environment, tmp_path: Path) -> None:
    listed = run(environment, "trimtab", "list")
    assert "The number with the other sign." in listed
    assert "An alpha that grows with" in listed
    assert "what the number is multiplied with" in run(environment, "trimtab", "show", "flip")
    run(environment, "trimtab.cli.docs", str(tmp_path))
    assert "### `flip`" in (tmp_path / "toy.md").read_text(encoding="utf-8")
    assert "### `gradual`" in (tmp_path / "strategies.md").read_text(encoding="utf-8")
