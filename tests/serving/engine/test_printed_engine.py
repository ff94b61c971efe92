"""The Python lines of docs/serving.md, "Use", as a file of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import FusedCausalLM

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


@pytest.mark.thorough
def test_the_printed_engine_answers(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "ask.py").write_text(next(block for block in blocks if "import LLM" in block))
    members = ("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"})
    FusedCausalLM.from_members(*members).save_pretrained(tmp_path / "fused")
    done = subprocess.run(
        [sys.executable, "ask.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1].strip()
