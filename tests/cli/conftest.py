"""Fused directories of tiny models, and a way to run commands in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tiny_models import save_members
from trimtab.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys) -> Callable[..., Ran]:
    """run("list", "--json") -> exit code, stdout, stderr."""

    def run_command(*words: str) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run_command


@pytest.fixture(scope="session")
def members(tmp_path_factory) -> dict[str, str]:
    return save_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="session")
def inline(members) -> list[str]:
    """The members as command-line options."""
    experts = [f"--expert={name}={members[name]}" for name in ("facts", "sums")]
    return ["--strong", members["strong"], "--base", members["base"], *experts]


@pytest.fixture(scope="session")
def fused_dir(members, inline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fused") / "model"
    assert main(["fuse", *inline, "-o", str(folder)]) == 0
    return str(folder)
