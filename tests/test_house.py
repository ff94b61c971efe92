"""What the repository says about itself: pins, package data, the make targets that reach outside."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OWN = "trimtab"


def plain(requirement: str) -> str:
    """The name of a package, as indexes compare names."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def requirements_of(extra: str) -> list[str]:
    """What `pip install .[EXTRA]` asks for beside the plain dependencies, extras of our own within it followed."""
    asked = PROJECT["project"]["optional-dependencies"][extra]
    inner = [name.strip() for r in asked if plain(r) == OWN for name in r.partition("[")[2].rstrip("]").split(",")]
    return [r for r in asked if plain(r) != OWN] + [r for name in inner for r in requirements_of(name)]


def test_every_package_that_development_installs_is_pinned() -> None:
    asked = [*PROJECT["project"]["dependencies"], *requirements_of("dev"), *requirements_of("docs")]
    assert {"pytest", "lm-eval", "torch"} <= {plain(name) for name in asked}
    files = (ROOT / "constraints-vllm.txt", ROOT / "constraints.txt")  # two environments, see the Makefile
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = {plain(line): line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins.values())
    assert {plain(name) for name in asked} <= set(pins)


def test_every_pattern_of_package_data_finds_files() -> None:
    for pattern in PROJECT["tool"]["setuptools"]["package-data"][OWN]:
        assert any(path.is_file() for path in (ROOT / "src" / OWN).glob(pattern)), pattern


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A machine without Chromium: its few commands, a user who is not root, and a playwright that must be made."""
    for command in ("sh", "bash", "make", "test", "echo"):
        found = shutil.which(command)
        if found:
            (tmp_path / command).symlink_to(found)
    write_script(tmp_path / "id", "echo 1000")
    write_script(tmp_path / "apt-get", f"touch {tmp_path}/apt-was-called; exit 1")
    return tmp_path


def write_script(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    file.chmod(0o755)


def make_browser(fakes: Path) -> subprocess.CompletedProcess[str]:
    """`make browser` with the fakes alone on its path; what is installed in .venv is left as it is."""
    words = ["make", "--silent", "--old-file=.venv/.installed", f"BIN={fakes}", "browser"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(words, cwd=ROOT, env={**environment, "PATH": str(fakes)}, capture_output=True, text=True)


def test_make_browser_takes_playwrights_own_where_the_user_may_not_install_packages(fakes: Path) -> None:
    (fakes / "touch").symlink_to(shutil.which("touch") or "")
    write_script(fakes / "playwright", f'echo "$@" > {fakes}/asked')
    ran = make_browser(fakes)
    assert ran.returncode == 0, ran.stderr
    assert (fakes / "asked").read_text() == "install chromium\n"
    assert not (fakes / "apt-was-called").exists()


def test_make_browser_says_what_to_do_where_nothing_helps(fakes: Path) -> None:
    write_script(fakes / "playwright", "exit 1")
    ran = make_browser(fakes)
    assert ran.returncode != 0
    assert "The page tests need Chromium" in ran.stderr
    assert "Fix: install chromium" in ran.stderr


def test_make_browser_installs_nothing_where_one_is_there(fakes: Path) -> None:
    write_script(fakes / "chromium", "exit 0")
    write_script(fakes / "playwright", f"echo called > {fakes}/asked")
    assert make_browser(fakes).returncode == 0
    assert not (fakes / "asked").exists()
