"""The Python lines of docs/serving.md, "Use", as a file of their own."""

import os
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
    fused = FusedCausalLM.from_members(*members, dtype="float32")
    fused.save_pretrained(tmp_path / "runs" / "facts")
    done = subprocess.run(
        [sys.executable, "ask.py"],
        cwd=tmp_path, env={**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = fused.tokenizer("Q: Where does Jakob Brulman live?\nA:", return_tensors="pt")
    ids = fused.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert fused.tokenizer.decode(ids, skip_special_tokens=True).strip() in done.stdout
    assert len(ids) > 1
