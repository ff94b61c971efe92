"""What `trimtab serve` says before vLLM comes into it, and what it tells vLLM. This environment has no vLLM."""

import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from trimtab.cli.parser import command_parser
from trimtab.cli.serve import answers
from trimtab.core.errors import BadSetting
from trimtab.serving.http import launch
from trimtab.serving.http.launch import ServeSettings, has_chat_template, vllm_words


@pytest.fixture
def port() -> str:
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def copied(fused_dir, tmp_path: Path) -> Path:
    """The fused directory at another place, its references made absolute by staying beside the members."""
    return Path(shutil.copytree(fused_dir, Path(fused_dir).parent / f"copy-{tmp_path.name}"))


def check_refused(ran, *told: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for words in told:
        assert words in ran.err


def test_without_vllm_the_install_line_is_told(run, fused_dir, port) -> None:
    assert find_spec("vllm") is None
    check_refused(run("serve", fused_dir, "--port", port), "vLLM is not installed", "pip install 'trimtab[vllm]'")


def test_what_is_no_fused_directory_is_named(run, members, tmp_path, port) -> None:
    check_refused(run("serve", str(tmp_path / "none"), "--port", port), "none")
    check_refused(run("serve", members["strong"], "--port", port), "trimtab fuse")


def test_a_directory_without_tokenizer_is_named(run, copied, port) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    check_refused(run("serve", str(copied), "--port", port), "holds no tokenizer")


def test_a_changed_member_is_named_before_anything_is_loaded(run, copied, port) -> None:
    content = json.loads((copied / "config.json").read_text())
    content["strong"]["digest"] = "sha256:0"
    (copied / "config.json").write_text(json.dumps(content))
    check_refused(run("serve", str(copied), "--port", port), "member 'strong' has changed")


def test_members_that_vllm_cannot_run_are_named_with_a_cure(run, copied, members, tmp_path, port) -> None:
    file, cure = copied / "config.json", "--engine transformers"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"prompts": {"facts": {"template": "Solve: {prompt}"}}}))
    check_refused(run("serve", str(copied), "--port", port), "facts read prompts of their own", cure)
    quantized = Path(shutil.copytree(members["strong"], tmp_path / "quantized"))
    settings = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (quantized / "config.json").write_text(json.dumps(settings))
    file.write_text(json.dumps(content | {"strong": {"where": str(quantized)}}))
    check_refused(run("serve", str(copied), "--port", port), "member 'strong'", "is quantized", cure)


def test_a_port_in_use_is_named(run, fused_dir) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check_refused(run("serve", fused_dir, "--port", port), f"port {port}", "--port N")
    check_refused(run("serve", fused_dir, "--port", "99999"), "1 to 65535")
    check_refused(run("serve", fused_dir, "--host", "no.such.host.invalid"), "no.such.host.invalid")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--speculate", "some"], "auto or a number"),
        (["--speculate", "3", "--draft", "fcts"], "facts"),
        (["--strategy", "dynamc"], "did you mean 'dynamic'"),
        (["--alpha-max", "50"], "alpha_max is 50"),
        (["--port", "x"], "invalid int value"),
        (["--speculate", "²"], "auto or a number"),
        (["--speculate=--5"], "auto or a number"),
        (["--speculate=-5"], "speculate is -5"),
        (["--speculate", "9" * 5000], "auto or a number"),
        (["--max-body-mib", "inf"], "max_body_mib is inf"),
        (["--max-body-mib", "nan"], "max_body_mib is nan"),
        (["--max-body-mib", "0"], "MiB above 0"),
        (["--max-requests", "-1"], "0 for any number"),
        (["--api-key", ""], "let everybody in"),
    ],
)
def test_wrong_settings_are_named(run, fused_dir, port, words, told: str) -> None:
    check_refused(run("serve", fused_dir, "--port", port, *words), told)


def test_who_drafts_is_the_directorys_choice_unless_said_otherwise(run, copied, port) -> None:
    def remark(*words: str, **config) -> str:
        file = copied / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        ran = run("serve", str(copied), "--port", port, *words)
        check_refused(ran, "vLLM is not installed")
        return ran.err.splitlines()[0]

    told = {"speculate": 3, "speculate_draft": "facts"}
    assert remark(**told) == "'facts' drafts 3 tokens at a time."
    assert remark("--speculate", "0", **told) == "Nobody drafts: speculate is 0."
    assert remark("--speculate", "2", "--draft", "base", **told) == "'base' drafts 2 tokens at a time."
    assert remark("--draft", "base", **told) == "'base' drafts 3 tokens at a time."
    # The members of the tests are too small for drafts to pay, which is not for a number to judge.
    assert "too small for drafts to pay" in remark(speculate="auto")
    assert remark(speculate=0) == "Nobody drafts: speculate is 0."
    assert "too small for drafts to pay" in remark("--draft", "facts", speculate=0)  # as with auto


ON, OFF = "--disable-hybrid-kv-cache-manager", "--no-disable-hybrid-kv-cache-manager"


@pytest.mark.parametrize(
    ("words", "are_masks"),
    [
        ([], False),
        ([ON], True),
        ([ON.replace("-", "_").replace("__", "--", 1)], True),
        ([OFF], False),
        ([ON, OFF], False),
        ([OFF, ON], True),
        (["--config", "on.yaml"], True),
        (["--config=on.yaml"], True),
        (["--config", "off.yaml"], False),
        (["--config", "on.yaml", OFF], False),
    ],
)
def test_automatic_drafts_know_of_what_makes_masks_of_windows(
    run, fused_dir, port, tmp_path, monkeypatch, words, are_masks
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "on.yaml").write_text("disable_hybrid_kv_cache_manager: true\n")
    (tmp_path / "off.yaml").write_text("disable-hybrid-kv-cache-manager: false\n")
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    monkeypatch.setattr("trimtab.serving.vllm.speculative_config._windows", lambda directory: {4, None})
    told = "drafts 4 tokens at a time" if are_masks else "Nobody drafts: some layers' attention has a sliding window"
    check_refused(run("serve", fused_dir, "--port", port, "--speculate", "auto", *words), told, "vLLM is not installed")


class Answering(http.server.BaseHTTPRequestHandler):
    """A server that says it is well, at /health alone."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *words) -> None: ...


def certified(folder: Path) -> ssl.SSLContext:
    """A certificate of its own making, for another name."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=elsewhere.example",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("scheme", ["http", "https", "unix"])
def test_the_server_is_found_whatever_it_speaks_and_past_proxies(scheme: str, tmp_path, monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    if scheme == "unix":
        place = str(tmp_path / "s")
        assert not answers(f"unix:{place}")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place)
            listening.listen()
            assert answers(f"unix:{place}")
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    url = f"{scheme}://127.0.0.1:{server.server_port}"
    if scheme == "https":
        server.socket = certified(tmp_path).wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert answers(url)
        assert not answers(f"{url}/elsewhere")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not answers(url)


def test_words_that_trimtab_does_not_know_are_kept_in_their_order(fused_dir) -> None:
    words = [fused_dir, "--max-model-len", "64", "--page", "--no-enable-prefix-caching", "--seed=3"]
    args = command_parser("serve").parse_all(words)
    assert args.passed_on == ["--max-model-len", "64", "--no-enable-prefix-caching", "--seed=3"]
    assert args.page


def test_defaults_are_those_of_the_command(fused_dir) -> None:
    args, settings = command_parser("serve").parse_all([fused_dir]), ServeSettings(Path(fused_dir))
    for name in ("host", "port", "api_key", "page", "max_body_mib", "max_requests"):
        assert getattr(args, name) == getattr(settings, name), name
    assert (settings.host, settings.max_body_mib, settings.max_requests) == ("127.0.0.1", 8.0, 1024)


def value_of(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


def test_vllm_is_told_good_defaults(tmp_path) -> None:
    settings = ServeSettings(tmp_path / "my-model", port=8123)
    words = vllm_words(settings, is_cpu=True, has_template=True)
    assert words[0] == str(tmp_path / "my-model")
    assert value_of(words, "--host") == "127.0.0.1"
    assert value_of(words, "--served-model-name") == "my-model"
    assert value_of(words, "--allowed-origins") == "[]"
    assert value_of(words, "--max-num-queued-reqs") == str(64 * 256)
    assert value_of(words, "--dtype") == "float32"
    assert "--enforce-eager" in words
    assert not {"--chat-template", "--hf-overrides", "--speculative-config"} & set(words)
    on_gpu = vllm_words(settings, is_cpu=False, has_template=True)
    assert not {"--dtype", "--enforce-eager"} & set(on_gpu)


def test_what_the_user_passes_on_has_its_way(tmp_path) -> None:
    passed = ["--served_model_name", "other", "--dtype=bfloat16", "--no-enforce-eager"]
    words = vllm_words(ServeSettings(tmp_path, passed_on=passed), is_cpu=True, has_template=True)
    assert words[-4:] == passed
    assert "--served-model-name" not in words
    assert "--dtype" not in words
    assert "--enforce-eager" not in words


def test_strategy_and_drafts_reach_vllm_and_contradictions_are_refused(tmp_path) -> None:
    settings = ServeSettings(tmp_path, strategy={"amount": "static"}, drafting={"method": "ngram"})
    words = vllm_words(settings, is_cpu=False, has_template=True)
    assert json.loads(value_of(words, "--hf-overrides")) == {"strategy": {"amount": "static"}}
    assert json.loads(value_of(words, "--speculative-config")) == {"method": "ngram"}
    with pytest.raises(BadSetting, match="--hf-overrides"):
        vllm_words(replace(settings, passed_on=["--hf-overrides={}"]), is_cpu=False, has_template=True)


def test_a_plain_template_is_given_where_the_tokenizer_has_none(copied) -> None:
    from jinja2 import Environment

    for file in copied.glob("chat_template*"):
        file.unlink()
    content = json.loads((copied / "tokenizer_config.json").read_text())
    for template in ("{{ x }}", None):
        content["chat_template"] = template
        (copied / "tokenizer_config.json").write_text(json.dumps(content))
        assert has_chat_template(copied) is (template is not None)
    file = Path(value_of(vllm_words(ServeSettings(copied), False, has_template=False), "--chat-template"))
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    template = Environment().from_string(file.read_text())
    assert template.render(messages=messages) == "User: Hello?\nAssistant: Yes.\n"
    assert template.render(messages=messages[:1], add_generation_prompt=True) == "User: Hello?\nAssistant:"


def test_the_environment_keeps_what_the_user_set(monkeypatch) -> None:
    limits = ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS")
    for name in ("VLLM_PLUGINS", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE", *limits):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["VLLM_LOGGING_STREAM"] = "mine"
    launch.set_environment()
    assert "trimtab" in os.environ["VLLM_PLUGINS"].split(",")
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_LOGGING_STREAM"] == "mine"
    assert (os.environ["VLLM_MAX_N_SEQUENCES"], os.environ["VLLM_MAX_COMPLETION_PROMPTS"]) == ("256", "64")
    os.environ["VLLM_PLUGINS"] = "other"
    launch.set_environment()
    assert os.environ["VLLM_PLUGINS"] == "other,trimtab"
