"""The examples on the pages about fused models run, one after the other, as they stand."""

import re
from pathlib import Path

import pytest
import torch

from trimtab import FusedCausalLM

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("getting-started", "fused-models", "own-models", "prompts", "speculation")


def test_the_readmes_lines_run_and_pad_on_the_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"}).save_pretrained("fused")
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from_pretrained" in b)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["inputs"]["attention_mask"][:, -1].all()
    assert not names["inputs"]["attention_mask"].all()


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
