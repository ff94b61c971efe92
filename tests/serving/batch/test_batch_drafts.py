"""Batches on vLLM in this process: drafts as the directory says, and conversations without a chat template."""

import gc
import json
import shutil

import pytest
import torch

import tiny
from asking import chat, complete, read_rows, texts, write_rows
from trimtab import FusedCausalLM
from trimtab.batch.job import Settings, Workers, make_answering, run_batch
from trimtab.batch.vllm_engine import VllmEngine
from trimtab.cli.main import main

ROWS = [complete(f"t{n}", prompt, max_tokens=16) for n, prompt in enumerate(("12+7", "Where is Ada?", "a"))]
ROWS += [chat("c", "", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}])]
ROWS[-1]["body"]["max_tokens"] = 16


@pytest.fixture(scope="module")
def fused_dir(tmp_path_factory):
    """Drafts of three tokens are asked for; the tokenizer has no chat template."""
    folder, base = tmp_path_factory.mktemp("drafts"), tiny.make(seed=1)
    models = {"strong": tiny.make(width=48), "base": base, "math": tiny.tuned(base, 10)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    fused = FusedCausalLM.from_members(*(str(folder / n) for n in ("strong", "base")), {"math": str(folder / "math")})
    fused.config.speculate, fused.config.speculate_draft = 3, "math"
    fused.save_pretrained(folder / "fused")
    return folder / "fused"


@pytest.fixture
def engines(monkeypatch):
    """The engines that are opened meanwhile; ended afterwards."""
    opened, make = [], VllmEngine.__init__

    def kept(self, *args):
        make(self, *args)
        opened.append(self)

    monkeypatch.setattr(VllmEngine, "__init__", kept)
    yield opened
    for engine in opened:
        engine._llm.llm_engine.engine_core.shutdown()
        del engine._llm
    gc.collect()


def test_the_directorys_drafter_drafts_it_is_said_and_texts_stay_the_fused_models(fused_dir, tmp_path, engines, capsys):
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    words = [str(fused_dir), str(source), str(tmp_path / "vllm.jsonl"), "--engine", "vllm", "--workers", "0"]
    words += ["--dtype", "float32", "--engine-option", "max_num_seqs=8", "--engine-option", "disable_log_stats=false"]
    with torch.random.fork_rng():
        assert main(["batch", *words]) == 0
    assert "'math' drafts 3 tokens at a time.\n" in capsys.readouterr().err
    told = {metric.name: metric.value for metric in engines[0]._llm.get_metrics() if hasattr(metric, "value")}
    assert told["vllm:spec_decode_num_draft_tokens"] > 0
    run_batch(fused_dir, source, tmp_path / "ours.jsonl", Settings("transformers", dtype="float32"), Workers(0))
    theirs, ours = (read_rows(tmp_path / name) for name in ("vllm.jsonl", "ours.jsonl"))
    assert [texts(row) for row in theirs] == [texts(row) for row in ours]
    usages = [[row["response"]["body"]["usage"] for row in rows] for rows in (theirs, ours)]
    assert usages[0] == usages[1]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (complete("m", "12+7", max_tokens=4, temperature=1.0, min_p=0.1), 'row "m" asks for min_p'),
        (complete("t", "12+7", max_tokens=4, min_tokens=2), 'row "t" asks for min_tokens'),
        (complete("s", "12+7", max_tokens=4, temperature=1.0, seed=0), 'row "s" draws by a seed'),
    ],
)
def test_nobody_drafts_where_a_row_asks_for_what_drafts_would_break(fused_dir, tmp_path, monkeypatch, row, why):
    source, told = write_rows(tmp_path / "in.jsonl", [*ROWS, row]), []

    def run_until_told(remark):
        told.append(remark)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(fused_dir, source, tmp_path / "out.jsonl", Settings("vllm"), Workers(0), tell=run_until_told)
    assert told[0].startswith(f"Nobody drafts: {why}")
    assert not (tmp_path / "out.jsonl.part").exists()
    source = write_rows(source, [*ROWS, row | {"body": row["body"] | {"temperature": 0, "min_p": 0, "min_tokens": 1}}])
    with pytest.raises(KeyboardInterrupt):
        run_batch(fused_dir, source, tmp_path / "out.jsonl", Settings("vllm"), Workers(0), tell=run_until_told)
    assert told[1] == "'math' drafts 3 tokens at a time."


def test_texts_of_one_length_only_are_drafted_too(fused_dir, tmp_path, engines):
    """Their end is forbidden all the time, which vLLM's fault does not touch."""
    rows = [*ROWS, complete("t", "12+7", max_tokens=4, min_tokens=4), chat("u", "1+1", min_tokens=4)]
    rows[-1]["body"].pop("max_tokens", None)
    rows[-1]["body"]["max_completion_tokens"] = 4
    source, told = write_rows(tmp_path / "in.jsonl", rows), []
    settings = Settings("vllm", dtype="float32", options={"max_num_seqs": 8})
    run_batch(fused_dir, source, tmp_path / "vllm.jsonl", settings, Workers(0), tell=told.append)
    assert told == ["'math' drafts 3 tokens at a time."]
    run_batch(fused_dir, source, tmp_path / "ours.jsonl", Settings("transformers", dtype="float32"), Workers(0))
    theirs, ours = (read_rows(tmp_path / name) for name in ("vllm.jsonl", "ours.jsonl"))
    assert [texts(row) for row in theirs] == [texts(row) for row in ours]
    assert [row["response"]["body"]["usage"]["completion_tokens"] for row in theirs[-2:]] == [4, 4]


@pytest.mark.parametrize(("option", "are_masks"), [(True, True), (False, False), ("False", False), ("yes", True)])
def test_automatic_drafts_know_of_an_option_with_which_windows_are_masks(
    fused_dir, tmp_path, monkeypatch, option, are_masks
):
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    monkeypatch.setattr("trimtab.serving.vllm.speculative_config._windows", lambda directory: {4, None})
    shutil.copytree(fused_dir.parent, tmp_path / "all")
    file = tmp_path / "all" / "fused" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"speculate": "auto"}))
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    settings = Settings("vllm", options={"disable_hybrid_kv_cache_manager": option})
    remark = "'math' drafts 4 tokens" if are_masks else "Nobody drafts: some layers' attention has a sliding window"

    def stop(said):
        assert said.startswith(remark)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(tmp_path / "all" / "fused", source, tmp_path / "out.jsonl", settings, Workers(0), tell=stop)
    if are_masks:
        given = []

        def open_engine(*words):
            given.extend(words)
            raise KeyboardInterrupt

        monkeypatch.setattr("trimtab.batch.vllm_engine.VllmEngine", open_engine)
        for drafts in (True, False):
            with pytest.raises(KeyboardInterrupt):
                make_answering(tmp_path / "all" / "fused", settings, ("fused",), drafts)
        assert given[2]["speculative_config"]["num_speculative_tokens"] == 4
        assert "speculative_config" not in given[5]
