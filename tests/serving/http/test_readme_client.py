"""The client lines of README and of docs/serving.md, run as printed, but for this server's name, port and key."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_printed_client_works(server, page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    code = next(block for block in blocks if "from openai" in block)
    places = {"http://127.0.0.1:8000/v1": server.url, 'api_key="none"': f'api_key="{server.key}"'}
    for printed, here in {**places, 'model="facts"': 'model="zoo"'}.items():
        assert code.count(printed) == 1
        code = code.replace(printed, here)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert said.getvalue().strip()
