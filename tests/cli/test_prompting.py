"""Prompts reach the model as they were written, and flags of conversations reach its chat template."""

import io
import json
import re
from pathlib import Path

import pytest

from tiny_models import save_members
from trimtab import FusedCausalLM
from trimtab.cli.prompting import lines_in, unescaped

KINDS = {
    "latex": r"Simplify $a \neq b$ and $\nabla f = \nu$",
    "spaces": "  two before, three after   ",
    "only spaces": "   ",
    "line separator": "one\u2028two\u2029three",
    "form feed": "one\x0ctwo\x0bthree\x1cfour\x85five",
    "carriage return": "one\rtwo",
    "umlauts": "Grüße, 世界 🙂",
    "tab": "a\tb\\t",
}
THINKING = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if tools %}T{{ tools | length }}\n{% endif %}{% if add_generation_prompt %}<bot>{% endif %}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}#{% endif %}"
)


@pytest.fixture(scope="module")
def talking_dir(tmp_path_factory):
    """A fused directory with a chat template that knows thinking and tools."""
    folder = tmp_path_factory.mktemp("talking")
    made = save_members(folder)
    fused = FusedCausalLM.from_members(made["strong"], made["base"], {"facts": made["facts"]}, chat_template=THINKING)
    fused.save_pretrained(folder / "fused")
    return str(folder / "fused")


def piped(run, monkeypatch, content: bytes, *words):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    return run("generate", *words, "--max-new-tokens", "1", "--json")


def read(ran):
    assert ran.code == 0, ran.err
    return [row["prompt"] for row in ran.json()["result"]]


def test_piped_lines_are_read_as_they_are(run, monkeypatch, fused_dir) -> None:
    content = "\n".join(KINDS.values()) + "\n"
    assert read(piped(run, monkeypatch, content.encode(), fused_dir)) == list(KINDS.values())
    windows = "\ufeff" + content.replace("\n", "\r\n") + "\r\n"
    assert read(piped(run, monkeypatch, windows.encode(), fused_dir)) == list(KINDS.values())


def test_arguments_and_files_are_read_as_they_are(run, fused_dir, tmp_path) -> None:
    words = ["--max-new-tokens", "1", "--json"]
    assert read(run("generate", fused_dir, *KINDS.values(), *words)) == list(KINDS.values())
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": kind}, ensure_ascii=False) for kind in KINDS.values()]
    file.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read(run("generate", fused_dir, "--file", file, *words)) == list(KINDS.values())


def test_escapes_are_read_where_they_are_asked_for(run, monkeypatch, fused_dir) -> None:
    assert unescaped(r"a\nb\tc\\n \d\ ") == "a\nb\tc\\n \\d\\ "
    words = ["generate", fused_dir, r"one\ntwo", "--max-new-tokens", "1", "--json"]
    plain = run(*words)
    assert read(plain) == [r"one\ntwo"]
    assert r"holds \n and is read as it is; --escapes" in plain.err
    escaped = run(*words, "-e")
    assert (read(escaped), escaped.err) == (["one\ntwo"], "")
    assert read(piped(run, monkeypatch, b"one\\ntwo\n", fused_dir, "-e")) == ["one\ntwo"]
    assert run("generate", fused_dir, "--file", "x", "-e").code == 2


@pytest.mark.parametrize("content", ["", "\n", "\r\n\n"])
def test_no_line_is_no_prompt(run, monkeypatch, fused_dir, content) -> None:
    ran = piped(run, monkeypatch, content.encode(), fused_dir)
    assert (ran.code, "there is no prompt" in ran.err) == (2, True)


def test_bytes_that_are_no_text_are_named_with_their_line(run, monkeypatch, fused_dir) -> None:
    ran = piped(run, monkeypatch, b"good\nbad \xff\n", fused_dir)
    assert ran.code == 2
    assert re.search("stdin, line 2 is no UTF-8: byte 0xff", ran.err)


def test_lines_end_at_line_feeds_only() -> None:
    assert lines_in("a\r\nb\x0bc\u2028d\ne") == ["a", "b\x0bc\u2028d", "e"]


def test_flags_reach_the_chat_template(run, talking_dir, tmp_path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "add"}}]))
    words = ["--max-new-tokens", "4", "--json"]
    flags = ["--system", "Be brief.", "--tools", tools, "--template-arg", "enable_thinking=false"]
    ran = run("generate", talking_dir, "Hi", "--chat", *flags, *words)
    text = "<system> Be brief.\n<user> Hi\nT1\n<bot>#"
    assert ran.json()["result"][0]["texts"] == run("generate", talking_dir, text, *words).json()["result"][0]["texts"]
    assert ran.json()["settings"]["template"]["enable_thinking"] is False
    page = run("explain", talking_dir, "Hi", "--chat", *flags, *words, "-o", tmp_path / "page.html")
    assert page.json()["result"]["trace"]["prompt"] == text


def test_conversations_of_a_file_are_continued(run, talking_dir, tmp_path) -> None:
    file = tmp_path / "talks.jsonl"
    user, begun = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is"}
    file.write_text(json.dumps({"messages": [user, begun]}) + "\n" + json.dumps({"messages": [user]}) + "\n")
    words = ["--max-new-tokens", "4", "--json"]

    def texts(*more):
        return [row["texts"] for row in run("generate", talking_dir, *more, *words).json()["result"]]

    assert texts("--file", file) == texts("<user> Hi\n<assistant> The answer is", "<user> Hi\n<bot>")
    assert texts("--file", file, "--continue-final-message") == texts(
        "<user> Hi\n<assistant> The answer is", "<user> Hi"
    )


def test_chat_keeps_what_was_typed_and_takes_the_flags(run, monkeypatch, talking_dir) -> None:
    content = "  spaces \r\n\r\n\\neq\u2028x\r\n /quit \r\nunheard\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    words = ["--max-new-tokens", "3", "--json", "--system", "S", "--template-arg", "enable_thinking=false"]
    said = run("chat", talking_dir, *words).json()["result"]
    assert [turn["content"] for turn in said[::2]] == ["  spaces ", "\\neq\u2028x"]
    fused = FusedCausalLM.from_pretrained(talking_dir)
    talk = [{"role": "system", "content": "S"}, said[0]]
    wanted = fused.generate_text(talk, {"enable_thinking": False}, max_new_tokens=3, do_sample=False)
    assert said[1]["content"] == wanted[0].strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Hi", "--system", "x"], "--system was given, but a prompt is a text"),
        (["Hi", "--continue-final-message"], "--continue-final-message was given, but a prompt is a text"),
        (["Hi", "--chat", "--template-arg", "x"], "--template-arg x cannot be read"),
        (["Hi", "--chat", "--tools", "gone.json"], "gone.json cannot be read"),
        (["--file", "talks", "--system", "x"], "opens with a system message"),
        (["--file", "none"], 'has no "prompt" and no "messages"'),
        (["Hi", "--chat", "--tools", "none"], "holds no list of tools"),
    ],
)
def test_conversations_that_cannot_be_are_refused(run, talking_dir, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks").write_text(json.dumps({"messages": [{"role": "system", "content": "y"}]}))
    (tmp_path / "none").write_text('{"messages": []}')
    ran = run("generate", talking_dir, *words)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_a_variable_that_no_template_reads_is_told(run, talking_dir) -> None:
    words = ["--template-arg", "thinking=false", "--max-new-tokens", "1"]
    assert "no chat template reads thinking" in run("generate", talking_dir, "Hi", "--chat", *words).err


def test_fuse_writes_the_settings_and_a_tokenizer_that_pads_on_the_left(fused_dir, members) -> None:
    written, strong = (
        json.loads((Path(folder) / "generation_config.json").read_text()) for folder in (fused_dir, members["strong"])
    )
    assert written["eos_token_id"] == strong["eos_token_id"]
    assert json.loads((Path(fused_dir) / "tokenizer_config.json").read_text())["padding_side"] == "left"


def test_the_models_settings_rule_and_flags_come_first(run, talking_dir, tmp_path) -> None:
    fused = FusedCausalLM.from_pretrained(talking_dir)
    fused.generation_config.update(do_sample=True, temperature=0.7, top_k=9, max_new_tokens=3, repetition_penalty=1.5)
    fused.save_pretrained(tmp_path / "warm")
    words = ["generate", tmp_path / "warm", "abc", "--json"]
    asked = run(*words, "--samples", "2").json()["settings"]
    assert {name: asked[name] for name in ("do_sample", "temperature", "top_k", "max_new_tokens")} == {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 9,
        "max_new_tokens": 3,
    }
    flags = ["--temperature", "2", "--top-k", "5", "--max-new-tokens", "2", "--repetition-penalty", "1.1"]
    asked = run(*words, *flags).json()["settings"]
    named = ("temperature", "top_k", "max_new_tokens", "repetition_penalty")
    assert [asked[name] for name in named] == [2, 5, 2, 1.1]
    greedy = run(*words, "--temperature", "0").json()
    assert greedy["settings"]["do_sample"] is False
    wanted = fused.generate_text("abc", do_sample=False)
    assert greedy["result"][0]["texts"] == wanted
