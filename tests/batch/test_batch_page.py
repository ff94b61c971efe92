"""docs/batch.md and the README: the requests that they show are requests, and what they name is there."""

import re
from pathlib import Path

from trimtab.batch.files import read_lines
from trimtab.batch.requests import CHAT, IDLE, NUMBERS, OWN, SHARED, TRANSFORMERS_LACKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")


def test_the_requests_that_are_shown_are_requests(tmp_path):
    shown = re.findall(r"^\{\"custom_id\".*$", PAGE, flags=re.MULTILINE)
    shown += re.findall(r"^echo '(.*)' >", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(shown) == 3
    for number, line in enumerate(shown):
        (tmp_path / "in.jsonl").write_text(line.replace("q1", f"q{number}"))
        (read,) = read_lines(tmp_path / "in.jsonl", "transformers", TRANSFORMERS_LACKS)
        assert read.row is not None, read.error


def test_the_page_names_every_field_that_is_followed():
    section = PAGE.split("## What a request may ask")[1].split("\n\n")[1]  # the table
    named = set(re.findall(r"`(\w+)`", section))
    fields = {*NUMBERS, *SHARED, *(name for names in OWN.values() for name in names)} - {"model"}
    assert fields <= named
    assert not named & set(IDLE) - set(OWN[CHAT])
    beyond = section.split("vLLM also")[1]
    assert set(re.findall(r"`(\w+)`", beyond)) == set(TRANSFORMERS_LACKS)


def test_the_page_names_files_that_exist():
    files = set(re.findall(r"`(\w+\.py)`", PAGE))
    assert len(files) >= 7
    assert [file for file in files if not (ROOT / "src" / "trimtab" / "batch" / file).is_file()] == []
