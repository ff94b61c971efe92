"""`trimtab batch` with vLLM and with transformers on Ray: equal greedy texts, valid responses, the whole command."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from vllm.entrypoints.launchers.run_batch import BatchRequestInput, BatchRequestOutput

from asking import body, chat, complete, read_rows, texts, write_rows
from trimtab import zoo
from trimtab.cli.main import main

SCHEMA = {"type": "string", "enum": ["cat", "dog"]}


@pytest.fixture(scope="module")
def fused_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "facts"
    words = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts", "-o", str(folder)]
    assert main(["fuse", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def rows():
    prompts = [item.prompt for item in zoo.load_items("facts", "test", limit=24)]
    make = [complete, chat]
    made = [make[at % 2](f"row-{at}", prompt, max_tokens=10) for at, prompt in enumerate(prompts)]
    made += [
        complete("logprobs", prompts[0], max_tokens=6, logprobs=3),
        chat("chat-logprobs", prompts[1], max_tokens=6, logprobs=True, top_logprobs=2),
        complete("stop", prompts[2], max_tokens=10, stop=["e", "a"]),
        complete("several", prompts[:3], max_tokens=8),
        *(complete(f"seed-{n}", "Q: Where", temperature=1.0, seed=n % 3, max_tokens=8) for n in range(6)),
        complete("n", "Q: Where", temperature=1.0, seed=1, n=3, max_tokens=8),
        complete("penalty", "Q: Where", max_tokens=48, ignore_eos=True, frequency_penalty=2.0),
        complete("plain", "Q: Where", max_tokens=48, ignore_eos=True),
        chat(
            "schema",
            "Which pet?",
            max_tokens=40,
            response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
        ),
        complete("long", "x " * 3000),
        complete("unknown", "x", max_tokenz=3),
        "{this is no json",
    ]
    random.Random(5).shuffle(made)
    return made


def readme_lines():
    """What the README prints: the line that makes a request file, and the command."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Batches that survive")[1].split("```")[1].strip().splitlines()
    return block[1:]


@pytest.fixture(scope="module")
def by_vllm(fused_dir, rows, tmp_path_factory):
    """The README's lines as printed, with more rows in the file that the first one makes: on Ray, vLLM is found."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs").mkdir()
    (folder / "runs" / "facts").symlink_to(fused_dir)
    more = write_rows(tmp_path_factory.mktemp("more") / "rows", rows)
    echo, command = readme_lines()
    script = f"set -e\n{echo}\ncat {more} >> questions.jsonl\n{command}\n"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran, folder


@pytest.fixture(scope="module")
def by_transformers(fused_dir, by_vllm, tmp_path_factory):
    """The same file, compressed, in another order, by two workers on Ray."""
    folder = tmp_path_factory.mktemp("transformers")
    lines = (by_vllm[1] / "questions.jsonl").read_text().splitlines()
    random.Random(8).shuffle(lines)
    source, target = write_rows(folder / "in.jsonl.gz", lines), folder / "out.jsonl.gz"
    command = [sys.executable, "-m", "trimtab", "batch", *map(str, (fused_dir, source, target))]
    options = ["--engine", "transformers", "--workers", "2", "--batch-size", "8", "--json"]
    ran = subprocess.run([*command, *options], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), lines, target


@pytest.fixture(scope="module")
def answers(by_vllm, by_transformers):
    """engine -> custom_id -> row."""
    written = {"vllm": by_vllm[1] / "answers.jsonl", "transformers": by_transformers[2]}
    return {engine: {row["custom_id"]: row for row in read_rows(path)} for engine, path in written.items()}


def test_the_readmes_lines_work_as_printed(by_vllm, rows):
    ran, folder = by_vllm
    assert readme_lines()[1].startswith("trimtab batch runs/facts ")
    assert ran.stdout == f"answers.jsonl: {len(rows) + 1} responses\n"
    drafting, warning = ran.stderr.splitlines()
    assert drafting.startswith("Nobody drafts: ")
    assert warning.startswith("warning: 3 rows hold an error")
    assert sorted(file.name for file in folder.iterdir()) == ["answers.jsonl", "questions.jsonl", "runs"]
    written = read_rows(folder / "answers.jsonl")
    assert texts(written[0])[0].strip()
    assert [row["custom_id"] for row in written[1:]] == [
        None if isinstance(row, str) else row["custom_id"] for row in rows
    ]


def test_several_workers_and_compressed_files(by_transformers):
    document, lines, target = by_transformers
    result = document["result"]
    assert (result["engine"], result["rows"], result["failed"]) == ("transformers", len(lines), 6)
    assert target.read_bytes().startswith(gzip.compress(b"")[:2])
    asked = [json.loads(line)["custom_id"] if not line.startswith("{this") else None for line in lines]
    assert [row["custom_id"] for row in read_rows(target)] == asked


def test_both_engines_write_the_same_greedy_texts(answers):
    ours, theirs = answers["transformers"], answers["vllm"]
    greedy = [name for name in ours if ours[name]["error"] is None and name != "n" and not name.startswith("seed-")]
    same = [name for name in greedy if texts(ours[name]) == texts(theirs[name])]
    assert len(greedy) == 29
    assert len(same) >= 28, "at most one row may part at a close call"
    assert len({text for name in same for text in texts(ours[name])}) > 10
    for name in same:
        assert body(ours[name])["usage"] == body(theirs[name])["usage"]
        assert [c["finish_reason"] for c in body(ours[name])["choices"]] == [
            c["finish_reason"] for c in body(theirs[name])["choices"]
        ]


def test_both_engines_report_the_same_log_probabilities(answers):
    ours, theirs = (body(answers[engine]["logprobs"])["choices"][0]["logprobs"] for engine in answers)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)
    assert [sorted(top) for top in ours["top_logprobs"]] == [sorted(top) for top in theirs["top_logprobs"]]
    ours, theirs = (body(answers[engine]["chat-logprobs"])["choices"][0]["logprobs"]["content"] for engine in answers)
    assert [[t["token"] for t in step["top_logprobs"]] for step in ours] == [
        [t["token"] for t in step["top_logprobs"]] for step in theirs
    ]


def test_rows_have_the_form_of_vllms_own_batches_and_of_openai(answers, rows):
    for row in rows:
        if isinstance(row, dict) and row["url"].startswith("/v1/chat") and row["custom_id"] != "unknown":
            BatchRequestInput.model_validate(row)
    for by_id in answers.values():
        for custom_id, row in by_id.items():
            if row["error"] is not None:
                assert custom_id in (None, "long", "unknown", "penalty", "plain", "schema")
                assert row["response"]["status_code"] == row["error"]["error"]["code"] == 400
                continue
            is_chat = row["response"]["body"]["object"] == "chat.completion"
            (ChatCompletion if is_chat else Completion).model_validate(row["response"]["body"], strict=False)
            if is_chat:
                assert set(BatchRequestOutput.model_fields) == set(row)
                BatchRequestOutput.model_validate(row)


def test_vllm_follows_seeds_schemas_and_penalties_whatever_batch_a_row_falls_in(answers):
    by_id = answers["vllm"]
    found = [texts(by_id[f"seed-{n}"])[0] for n in range(6)]
    assert found[:3] == found[3:]
    assert len(set(found)) == 3
    assert len(set(texts(by_id["n"]))) == 3
    assert texts(by_id["penalty"]) != texts(by_id["plain"])
    assert body(by_id["plain"])["usage"]["completion_tokens"] == 48
    assert json.loads(texts(by_id["schema"])[0]) in ("cat", "dog")


def test_transformers_follows_seeds_and_says_what_it_cannot_follow(answers):
    by_id = answers["transformers"]
    found = [texts(by_id[f"seed-{n}"])[0] for n in range(6)]
    assert found[:3] == found[3:]
    assert len(set(found)) == 3
    for name, field in {"penalty": "frequency_penalty", "plain": "ignore_eos", "schema": "response_format"}.items():
        assert f"{field} is " in by_id[name]["error"]["error"]["message"]
