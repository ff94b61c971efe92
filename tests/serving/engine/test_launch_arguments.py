"""What vLLM's server is told in the end: keys from wherever they come, options from files, and what is refused."""

import os
import socket

import pytest

from trimtab import FusedCausalLM
from trimtab.cli.main import main
from trimtab.core.errors import BadSetting, InputError
from trimtab.serving.http.launch import ServeSettings, open_to_all, prepared, url_of

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("told") / "serve"  # also the name of a command of vLLM's
    FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"}).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _own_environment():
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("VLLM_MAX_")]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def told(directory, *passed_on, **settings):
    return prepared(ServeSettings(directory, passed_on=passed_on, **settings))


def written(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("text", [f"api-key: {KEY}", f"api_key: [{KEY}]", f"max-num-seqs: 3\napi-key: {KEY}"])
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_key_in_a_file_of_options_is_kept(directory, tmp_path, text, form):
    words = form.format(written(tmp_path, text)).split()
    assert told(directory, *words).api_key == [KEY]


def test_keys_of_trimtab_of_words_passed_on_and_of_the_environment(directory, tmp_path, monkeypatch):
    file = ["--config", written(tmp_path, "api-key: another")]
    assert told(directory, *file, api_key=KEY).api_key == [KEY]
    assert told(directory, "--api_key", KEY, "other").api_key == [KEY, "other"]
    assert told(directory).api_key == []
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert told(directory).api_key == [KEY]
    assert told(directory, *file).api_key == ["another"]


def test_an_empty_key_is_refused(directory, tmp_path, monkeypatch):
    with pytest.raises(BadSetting, match="let everybody in"):
        told(directory, api_key="")
    with pytest.raises(BadSetting, match="let everybody in"):
        told(directory, "--config", written(tmp_path, 'api-key: ""'))
    monkeypatch.setenv("VLLM_API_KEY", "")  # as of a file that is missing
    with pytest.raises(BadSetting, match="let everybody in"):
        told(directory)


def test_a_file_of_options_has_its_way_over_defaults(directory, tmp_path):
    text = "served-model-name: other\ndtype: bfloat16\nenforce_eager: false\nmax-num-queued-reqs: 7\nmax-num-seqs: 3"
    args = told(directory, "--config", written(tmp_path, text), "--max-num-seqs", "5")
    assert (args.served_model_name, args.dtype, args.enforce_eager) == (["other"], "bfloat16", False)
    assert (args.max_num_queued_reqs, args.max_num_seqs) == (7, 5)
    assert (args.model_tag, args.host, args.port) == (str(directory), "127.0.0.1", 8000)


@pytest.mark.parametrize(
    ("text", "why"),
    [("host: 0.0.0.0", "sets host"), ("port: 9", "sets port"), ("- a", "no options"), ("{", "cannot be")],
)
def test_a_file_of_options_that_cannot_be_is_refused(directory, tmp_path, text, why):
    with pytest.raises(InputError, match=why):
        told(directory, "--config", written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(directory, tmp_path):
    with pytest.raises(InputError, match="none"):
        told(directory, "--config", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="cannot be read"):
        told(directory, "--config")


ALONE = [
    ["--data-parallel-size", "2"],
    ["-dp", "2"],
    ["--api-server-count", "2"],
    ["--api-server-count=0"],
    ["--headless"],
    ["--grpc"],
]


@pytest.mark.parametrize("words", ALONE, ids=" ".join)
def test_more_than_one_server_or_engine_is_refused(directory, words):
    with pytest.raises(BadSetting, match="one HTTP server with one engine"):
        told(directory, *words)


def test_more_than_one_engine_is_refused_from_a_file_and_the_environment_too(directory, tmp_path, monkeypatch):
    with pytest.raises(BadSetting, match="data-parallel-size 2"):
        told(directory, "--config", written(tmp_path, "data-parallel-size: 2"))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(BadSetting, match="VLLM_USE_RUST_FRONTEND"):
        told(directory)


def test_choices_and_prompts_of_requests_are_limited(directory):
    from vllm import envs

    args = told(directory)
    assert (envs.VLLM_MAX_N_SEQUENCES, envs.VLLM_MAX_COMPLETION_PROMPTS) == (256, 64)
    assert args.max_num_queued_reqs == 256 * 64
    assert told(directory, "--max_num_queued_reqs=9").max_num_queued_reqs == 9


def test_prompts_allowed_are_those_of_the_environment(directory, monkeypatch):
    assert told(directory).trimtab_max_prompts == 64
    monkeypatch.setenv("VLLM_MAX_COMPLETION_PROMPTS", "7")
    assert told(directory).trimtab_max_prompts == 7


def test_who_serves_other_machines_without_a_key_is_warned(directory, tmp_path, monkeypatch, capsys):
    assert open_to_all(told(directory)) is None
    assert open_to_all(told(directory, host="localhost")) is None
    assert open_to_all(told(directory, host="0.0.0.0", api_key=KEY)) is None
    assert open_to_all(told(directory, "--config", written(tmp_path, f"api-key: {KEY}"), host="::")) is None
    assert open_to_all(told(directory, "--uds", "/run/x", host="0.0.0.0")) is None
    assert "other machines reach ::" in open_to_all(told(directory, host="::"))
    # The command says so; vLLM's server, which would come next, is left out.
    monkeypatch.setattr("trimtab.serving.http.launch.run", lambda args: None)
    monkeypatch.setattr("trimtab.cli.serve.answers", lambda url: True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert main(["serve", str(directory), "--host", "0.0.0.0", "--port", port]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: no key")]
    assert "--api-key" in line


def test_the_address_follows_certificates_sockets_and_files(directory, tmp_path):
    assert url_of(told(directory)) == "http://127.0.0.1:8000"
    assert url_of(told(directory, host="::", port=81)) == "http://[::1]:81"
    assert url_of(told(directory, "--ssl-keyfile", "k", "--ssl-certfile=c", host="0.0.0.0")) == "https://127.0.0.1:8000"
    assert url_of(told(directory, "--config", written(tmp_path, "ssl-certfile: c"))) == "https://127.0.0.1:8000"
    assert url_of(told(directory, "--uds", "/run/x")) == "unix:/run/x"
