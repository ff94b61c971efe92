"""The examples on the pages about fused models run, one after the other, as they stand."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("getting-started", "fused-models", "own-models", "prompts", "speculation")


@pytest.mark.parametrize("name", PAGES)
def test_every_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, names = DOCS / f"{name}.md", {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert "FusedCausalLM" in names
    if name == "fused-models":
        assert len(names["texts"]) == 2
        assert names["nats"].shape == (2,)
        assert names["loss"] > 0
        inputs = names["inputs"]
        ids = [names[who].generate(**inputs, max_new_tokens=4, do_sample=False) for who in ("fused", "same")]
        assert torch.equal(*ids)
        assert "generated_text" in capsys.readouterr().out
