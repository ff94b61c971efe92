"""A directory is put in its place at once: old or new, never a half, and nothing left after a failure."""

import os
import signal
import subprocess
import sys

import pytest

from trimtab.core import files
from trimtab.core.files import atomic_directory


def content(folder):
    """Every file below a folder, by its path there."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def old(tmp_path):
    """An existing directory with what is replaced and what is not."""
    folder = tmp_path / "fused"
    (folder / "experts" / "math").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "notes.txt", "experts/math/weights"):
        (folder / name).write_text(f"old {name}")
    (folder / "link").symlink_to("notes.txt")
    return folder


REPLACED = ("config.json", "tokenizer.json", "chat_template.jinja")
OLD = {name: f"old {name}" for name in (*REPLACED, "notes.txt", "experts/math/weights")} | {"link": "old notes.txt"}
NEW = {name: text for name, text in OLD.items() if name not in REPLACED} | {"config.json": "new", "tokenizer.json": "t"}


def write(target):
    with atomic_directory(target, REPLACED) as beside:
        (beside / "config.json").write_text("new")
        (beside / "tokenizer.json").write_text("t")


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_existing_directory_is_replaced_and_the_rest_of_it_stays(old, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    old.chmod(0o750)
    inode = (old / "experts/math/weights").stat().st_ino
    write(old)
    assert content(old) == NEW
    assert (old / "link").is_symlink()
    assert (old / "experts/math/weights").stat().st_ino == inode, "not copied"
    assert old.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in old.parent.iterdir()] == ["fused"]


def test_a_new_directory_an_empty_one_and_one_behind_a_link(tmp_path, old):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "deep" / "er" / "new"):
        write(target)
        assert content(target) == {"config.json": "new", "tokenizer.json": "t"}
        assert target.stat().st_mode & 0o777 == 0o755
    (tmp_path / "there").symlink_to(old)
    write(tmp_path / "there")
    assert (tmp_path / "there").is_symlink()
    assert content(old) == NEW


def test_a_failure_changes_nothing_and_leaves_nothing(tmp_path, old):
    (tmp_path / "empty").mkdir()
    for target in (old, tmp_path / "deep" / "er" / "new", tmp_path / "empty"):
        with pytest.raises(IsADirectoryError), atomic_directory(target, REPLACED) as beside:
            beside.write_text("new")
    assert content(old) == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "fused"]
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_swap_that_fails_brings_the_old_directory_back(old, monkeypatch, in_one_step):
    replace = os.replace

    def broken(source, target):
        if os.fspath(target) == os.fspath(old) and not os.fspath(source).endswith(".old"):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    if in_one_step:
        monkeypatch.setattr(files, "_keep", lambda *args: broken("", old))
    else:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="no space left"):
        write(old)
    assert content(old) == OLD
    assert [path.name for path in old.parent.iterdir()] == ["fused"]


CRASH = """
import os, signal, sys
from pathlib import Path
from trimtab.core.files import atomic_directory

def killer(event, args):
    if event in ("open", "os.rename", "os.link", "os.mkdir", "shutil.rmtree", "os.remove", "os.rmdir", "ctypes.dlopen"):
        counts[0] -= 1
        if counts[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

counts = [int(sys.argv[2])]
sys.addaudithook(killer)
with atomic_directory(Path(sys.argv[1]), ("config.json", "tokenizer.json", "chat_template.jinja")) as beside:
    (beside / "config.json").write_text("new")
    (beside / "tokenizer.json").write_text("t")
print("done")
"""


def test_a_process_killed_at_any_operation_leaves_the_old_or_the_new(old):
    """Killed before its n-th operation on the file system, for every n until it comes through."""
    seen = []
    for count in range(1, 60):
        command = [sys.executable, "-c", CRASH, str(old), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert content(old) in (OLD, NEW), count
        seen.append(content(old) == NEW)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert seen[-1]
    assert len(seen) > 8
    assert not seen[0]
