"""References: paths, zoo names, hub ids; digests that notice a change."""

import errno
import importlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from trimtab import zoo
from trimtab.core.errors import OfflineError, TrimtabError, UnreadableModel
from trimtab.models import checkpoint, references
from trimtab.models.references import Reference, locate, parse_reference


def test_a_reference_is_read_as_it_is_written(tmp_path):
    assert parse_reference("zoo:small/facts") == Reference("zoo:small/facts")
    assert parse_reference("owner/name@abc123") == Reference("owner/name", revision="abc123")
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert parse_reference(odd) == Reference(str(odd))


def test_a_path_becomes_absolute(members_dir, monkeypatch):
    monkeypatch.chdir(members_dir)
    assert locate(parse_reference("base")) == (Reference(str(members_dir / "base")), members_dir / "base")
    assert locate(Reference("../base"), beside=members_dir / "math")[1] == members_dir / "base"


def test_a_zoo_name_is_resolved_by_the_zoo(members_dir, monkeypatch):
    monkeypatch.setattr(zoo, "resolve", lambda name: members_dir / name.removeprefix("zoo:"))
    assert locate(parse_reference("zoo:base")) == (Reference("zoo:base"), members_dir / "base")


def test_a_hub_id_needs_the_network_once():
    with pytest.raises(OfflineError, match=r"(?s)'no-one/nothing' is no directory here.*unset HF_HUB_OFFLINE"):
        locate(parse_reference("no-one/nothing"))


def http_error(kind, status, message):
    """An error as huggingface_hub raises it, about an answer of the hub."""
    answer = next(c for c in kind.__mro__ if c.__name__ == "HTTPError").__module__.split(".")[0]  # its HTTP library
    http = importlib.import_module(answer)
    request = http.Request("GET", "https://huggingface.co/api/models/o/n")
    return kind(message, response=http.Response(status, request=request))


def caused(error, cause):
    """`raise error from cause`, caught."""
    error.__cause__ = cause
    return error


HUB_FAILURES = {
    "gated": (
        http_error(errors.GatedRepoError, 403, "Client Error.\nAccess to model o/n is restricted."),
        UnreadableModel,
        r"(?s)'o/n' is a gated .*Access to model o/n is restricted.*access at https://huggingface.co/o/n, .*hf a",
    ),
    "missing": (
        http_error(errors.RepositoryNotFoundError, 404, "404 Client Error.\nRepository Not Found."),
        UnreadableModel,
        r"(?s)'o/n' is neither a directory here nor a repository on the hub.*Repository Not Found.*private.*hf auth",
    ),
    "revision": (
        http_error(errors.RevisionNotFoundError, 404, "Revision Not Found."),
        UnreadableModel,
        r"(?s)'o/n' has no revision 'v9'.*correct what follows the @",
    ),
    "unauthorised": (
        http_error(errors.HfHubHTTPError, 401, "Invalid credentials."),
        UnreadableModel,
        r"(?s)does not let this machine read 'o/n' \(401\).*Invalid credentials.*hf auth login",
    ),
    "forbidden": (http_error(errors.HfHubHTTPError, 403, "Forbidden."), UnreadableModel, r"read 'o/n' \(403\)"),
    "hub is down": (
        caused(errors.LocalEntryNotFoundError("Got: HfHubHTTPError"), http_error(errors.HfHubHTTPError, 503, "Busy.")),
        OfflineError,
        r"(?s)the hub cannot give 'o/n' now: it answers 503.*Busy.*try again later",
    ),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device"),
        TrimtabError,
        r"(?s)'o/n' cannot be stored in the local cache /.*: No space left on device.*make room on the disk, or",
    ),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "/cache/models--o--n"),
        TrimtabError,
        r"(?s)cannot be stored in the local cache .*: Permission denied.*make that directory writable",
    ),
    "switched off": (
        caused(errors.LocalEntryNotFoundError("Cannot find it."), errors.OfflineModeIsEnabled("Offline mode.")),
        OfflineError,
        r"(?s)the hub cannot be asked: HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE",
    ),
    "no network": (
        caused(errors.LocalEntryNotFoundError("Cannot find it."), ConnectionError("Name or service not known")),
        OfflineError,
        r"(?s)the hub cannot be asked: Name or service not known.*or try again with a network",
    ),
    "no hub id": (errors.HFValidationError("Repo id must ..."), UnreadableModel, "(?s)is neither .*Repo id must"),
}


@pytest.mark.parametrize("what", HUB_FAILURES)
def test_each_failure_of_the_hub_is_told_with_its_own_fix(monkeypatch, what):
    error, kind, message = HUB_FAILURES[what]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TrimtabError, match=message) as caught:
        references.fetch(parse_reference("o/n@v9"))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error


def test_a_connection_that_breaks_while_downloading_is_no_traceback(monkeypatch):
    library = importlib.import_module(errors.HTTPError.__module__.split(".")[0])

    def fail(*args, **kwargs):
        raise getattr(library, "ReadError", ConnectionError)("the peer closed the connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OfflineError, match="the hub cannot be asked: the peer closed the connection"):
        references.fetch(parse_reference("o/n"))


HUB = {  # files of a repository -> which of them are fetched
    "weights twice": {
        **dict.fromkeys(("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tekken.json"), True),
        **dict.fromkeys(("model.safetensors.index.json", "chat_template.jinja", "generation_config.json"), True),
        **dict.fromkeys(("consolidated.safetensors", "consolidated.00.pth", "params.json", "pytorch_model.bin"), False),
        **dict.fromkeys(("original/model.safetensors", "original/config.json", "metal/model.bin"), False),
        **dict.fromkeys(("model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors"), False),
        **dict.fromkeys(("onnx/model.onnx", "small-Q4_K_M.gguf", "modeling_x.py", "README.md"), False),
    },
    "adapter": {
        **dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), True),
        **dict.fromkeys(("checkpoint-8/adapter_model.safetensors", "optimizer.pt", "adapter_model.bin"), False),
    },
}


@pytest.mark.parametrize("what", HUB)
def test_of_a_repository_only_what_is_read_is_fetched(what):
    fetched = filter_repo_objects(list(HUB[what]), allow_patterns=references.HUB_FILES)
    assert set(fetched) == {name for name, is_read in HUB[what].items() if is_read}


class Hub:
    """The hub's side of a download: a repository's files, put into a snapshot as far as the patterns ask for them."""

    def __init__(self, folder, files):
        self.folder, self.files = folder, files

    def __call__(self, repo, revision=None, allow_patterns=None):
        snapshot = self.folder / repo / "abc123"
        for name in filter_repo_objects(list(self.files), allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(self.files[name])
        return str(snapshot)


def test_shards_of_other_names_are_fetched_where_the_index_names_them(monkeypatch, tmp_path):
    index = b'{"metadata": {}, "weight_map": {"a": "weights-a.safetensors"}}'
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "weights-a.safetensors": b"", "b.bin": b""}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, files))
    snapshot = references.fetch(parse_reference("o/n"))
    assert {file.name for file in snapshot.iterdir()} == files.keys() - {"b.bin"}


def test_a_gguf_file_is_fetched_when_it_is_asked_for_by_name(monkeypatch, tmp_path):
    files = {"small-Q4.gguf": b"GGUF", "small-Q8.gguf": b"GGUF", "tokenizer.json": b"{}", "model.safetensors": b""}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, files))
    reference, file = locate(parse_reference("o/n/small-Q4.gguf"))
    assert reference == Reference("o/n/small-Q4.gguf", revision="abc123")
    assert {part.name for part in file.parent.iterdir()} == {"small-Q4.gguf", "tokenizer.json"}
    with pytest.raises(UnreadableModel, match=r"'o/n' holds no file 'small-Q5.gguf'"):
        locate(parse_reference("o/n/small-Q5.gguf"))


@pytest.mark.parametrize("where", ["/no/such/place", "./nowhere", "a/b/c", "with space"])
def test_what_can_be_no_hub_id_is_a_wrong_path(where):
    with pytest.raises(UnreadableModel, match=r"there is no directory"):
        locate(parse_reference(where))


def test_a_file_is_no_model(members_dir):
    with pytest.raises(UnreadableModel, match=r"is a file"):
        locate(parse_reference(members_dir / "base" / "config.json"))


def test_directories_without_configuration_or_safetensors_are_refused(members_dir, tmp_path):
    with pytest.raises(UnreadableModel, match=r"holds no config.json"):
        checkpoint.check_directory(tmp_path)
    shutil.copy(members_dir / "base" / "config.json", tmp_path)
    with pytest.raises(UnreadableModel, match=r"holds no safetensors"):
        checkpoint.check_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnreadableModel, match=r"holds pickled weights only \(pytorch_model.bin\)"):
        checkpoint.check_directory(tmp_path)


def test_the_digest_notices_a_changed_byte_anywhere(tmp_path, monkeypatch):
    for whole_bytes, changed in ((10**9, 700_001), (1000, 0), (1000, 1_999_999)):
        monkeypatch.setattr(references, "WHOLE_BYTES", whole_bytes)
        (tmp_path / "config.json").write_text("{}")
        content = bytearray(2_000_000)
        (tmp_path / "model.safetensors").write_bytes(content)
        before = references.digest(tmp_path)
        content[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        assert references.digest(tmp_path) != before
        (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
        assert references.digest(tmp_path) == before
        (tmp_path / "config.json").write_text("{ }")
        assert references.digest(tmp_path) != before
