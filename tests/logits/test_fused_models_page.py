"""The examples on docs/fused-models.md run, one after the other, as they stand."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "fused-models.md"


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(names["texts"]) == 2
    assert names["nats"].shape == (2,)
    assert names["loss"] > 0
    assert torch.equal(
        *(
            model.generate(**names["inputs"], max_new_tokens=4, do_sample=False)
            for model in (names["fused"], names["same"])
        )
    )
    assert "generated_text" in capsys.readouterr().out
