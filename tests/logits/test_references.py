"""References: paths, zoo names, hub ids; digests that notice a change."""

import shutil

import pytest

from trimtab import zoo
from trimtab.core.errors import OfflineError, UnreadableModel
from trimtab.logits import references
from trimtab.logits.references import Reference, locate, parse_reference


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


@pytest.mark.parametrize("where", ["/no/such/place", "./nowhere", "a/b/c", "with space"])
def test_what_can_be_no_hub_id_is_a_wrong_path(where):
    with pytest.raises(UnreadableModel, match=r"there is no directory"):
        locate(parse_reference(where))


def test_a_file_is_no_model(members_dir):
    with pytest.raises(UnreadableModel, match=r"is a file"):
        locate(parse_reference(members_dir / "base" / "config.json"))


def test_directories_without_configuration_or_safetensors_are_refused(members_dir, tmp_path):
    with pytest.raises(UnreadableModel, match=r"holds no config.json"):
        references.check_directory(tmp_path)
    shutil.copy(members_dir / "base" / "config.json", tmp_path)
    with pytest.raises(UnreadableModel, match=r"holds no safetensors"):
        references.check_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnreadableModel, match=r"holds pickled weights only \(pytorch_model.bin\)"):
        references.check_directory(tmp_path)


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
