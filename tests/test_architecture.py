"""The architecture, checked: imports point down, the public names are frozen, importing is light, help is quick."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError
from pathlib import Path
from time import perf_counter

import pytest

import trimtab
from imports import ALLOWED, SPACES, Source

ROOT = Path(trimtab.__file__).parent
SOURCE = Source(ROOT, trimtab._HOMES)
LEAVES = ("core", "__main__")  # not in the page's table: the one imports nothing, the other only starts the commands
# What users may import. A name that is added, moved or dropped here is a change of the API: it goes into the changelog.
PUBLIC_NAMES = {
    "trimtab": """FusedCausalLM FusedConfig Fusion InputError Strategy Trace TraceStep TrimtabError __version__
        make_strategy""",
    "trimtab.core": """BadSetting Configurable ContextTooLong EmptyPrompt Entry Family InputError MemberMismatch
        MissingPackage NumericalError OfflineError REQUIRED Setting TrimtabError TrimtabWarning UnknownName
        UnreadableModel VocabularyMismatch entropy_nats families find kl_nats make parse setting settings_of""",
    "trimtab.logits": """AMOUNTS Amount CHOOSERS Chooser DeltaTargets FusedCausalLM FusedConfig Fusion Step Strategy
        Trace TraceStep describe_settings make_strategy strategy_from_dict""",
    "trimtab.models": "Member Placement PromptForm Reference digest load_tokenizer locate parse_reference",
}
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "rich", "peft", "lm_eval", "jaxtyping", "ray", "vllm")
QUICK_SECONDS = 0.3


def test_every_module_lies_in_a_known_part() -> None:
    assert set(SOURCE.parts()) <= {*ALLOWED, *SOURCE.spaces, ""}


def test_imports_point_down() -> None:
    assert SOURCE.forbidden() == []


def test_no_module_imports_itself_round_about() -> None:
    SOURCE.check_no_cycle()


def package_of(folder: Path, files: Mapping[str, str]) -> Source:
    """A small package `house` with these files."""
    for name, text in {"__init__.py": "", **files}.items():
        file = folder / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return Source(folder / "house")


PAIRS = [(space, other) for space in SPACES for other in SPACES if space != other]


@pytest.mark.parametrize(("space", "other"), [*PAIRS, ("toy", "logits"), ("logits", "toy")])
def test_a_space_that_imports_a_space_is_seen(tmp_path: Path, space: str, other: str) -> None:
    """The rule that `test_imports_point_down` applies, on a package that breaks it."""
    files = {
        f"{space}/methods/one.py": f"import house.models.loading\ndef run():\n    import house.{other}.registry\n",
        f"{other}/registry.py": "",
        f"{space}/registry.py": "",
        "models/loading.py": "",
    }
    found = package_of(tmp_path, files).forbidden()
    assert found == [f"house.{space}.methods.one imports house.{other}.registry"]


@pytest.mark.parametrize(
    ("part", "other"), [("logits", "measure"), ("core", "models"), ("models", "logits"), ("measure", "zoo")]
)
def test_an_upward_import_is_seen(tmp_path: Path, part: str, other: str) -> None:
    """Also where only annotations need it."""
    text = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.{other} import x\n"
    source = package_of(tmp_path, {f"{part}/a.py": text, f"{other}/x.py": ""})
    assert source.forbidden() == [f"house.{part}.a imports house.{other}.x"]


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    later = "def run():\n    from house.core import a\n"
    with pytest.raises(CycleError):
        package_of(tmp_path / "now", {"core/a.py": "import house.core.b", "core/b.py": later}).check_no_cycle()
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.core import a\n"
    package_of(tmp_path / "typed", {"core/a.py": "import house.core.b", "core/b.py": typed}).check_no_cycle()


ARCHITECTURE = ROOT.parents[1] / "docs" / "architecture.md"


def test_the_page_on_architecture_tells_who_imports_whom() -> None:
    actual = SOURCE.parts()
    told = {
        part: set(re.findall(r"`(\w+)`", imports))
        for part, imports in re.findall(r"^\| `(\w+)` \| (`.*) \|$", ARCHITECTURE.read_text(), flags=re.MULTILINE)
        if part in ALLOWED
    }
    assert told == {part: imports for part, imports in actual.items() if part in ALLOWED and part not in LEAVES}


def test_the_page_on_architecture_names_files_and_calls_that_exist() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    files = set(re.findall(r"\b((?:batch|core|logits|measure|models|serving|studies|zoo)/[\w/]+\.py)", text))
    assert {"logits/solver/match.py", "logits/model.py", "measure/evaluate.py", "zoo/build.py"} <= files
    assert [file for file in files if not (ROOT / file).is_file()] == []
    step = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "logits").rglob("*.py"))
    calls = set(re.findall(r"\b((?:chooser|amount)(?:\.\w+)?)\(", text))
    assert calls == {"chooser.choose", "amount.alphas", "amount.log_probs"}
    assert [call for call in calls if f"{call}(step" not in step] == []


def test_amounts_and_choosers_do_not_import_one_another() -> None:
    methods = [
        name
        for name in SOURCE.modules
        if name.startswith(("trimtab.logits.strategy.amounts.", "trimtab.logits.strategy.choosers."))
    ]
    for name in methods:
        siblings = SOURCE.imports_of(name) & set(methods)
        assert not siblings, f"{name} imports {siblings}: what two methods need moves down"


@pytest.mark.parametrize("package", PUBLIC_NAMES)
def test_public_names_are_frozen(package: str) -> None:
    module, names = importlib.import_module(package), set(PUBLIC_NAMES[package].split())
    assert set(module.__all__) == names
    assert set(module._HOMES) == names - {"__version__"}
    for name in names:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_command_has_a_promise_and_an_example() -> None:
    from trimtab.cli.commands import COMMANDS

    for line in COMMANDS.values():
        command = importlib.import_module(line.module)
        assert command.__doc__
        assert command.EXAMPLE.startswith("trimtab ")


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=environment)


SCRIPT = Path(sys.executable).with_name("trimtab")  # the command that the installation puts beside python


def wall_seconds_of(words: list[str]) -> float:
    """How long one waits for the installed command, less what it stood in line for a processor behind other work."""
    started = perf_counter()
    with subprocess.Popen([str(SCRIPT), *words], stdout=subprocess.DEVNULL) as process:
        if hasattr(os, "waitid"):  # the kernel's account of a process is there until the process is waited for
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = perf_counter() - started
        account = Path(f"/proc/{process.pid}/schedstat")
        in_line = int(account.read_text().split()[1]) / 1e9 if account.exists() else 0.0
    assert process.returncode == 0
    return seconds - in_line


@pytest.mark.parametrize(
    "line", [f"import {name}" for name in (*PUBLIC_NAMES, "trimtab.logits.registry", "trimtab.cli.main")]
)
def test_importing_is_light(line: str) -> None:
    code = f"{line}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


QUICK_COMMANDS = [["--help"], ["list"], ["list", "amounts", "--json"], ["--version"]]


@pytest.mark.parametrize("words", QUICK_COMMANDS)
def test_help_and_listings_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom trimtab.cli.main import main\n"
        f"code = main({words!r})\n"
        f"assert code == 0\nassert not [name for name in {HEAVY!r} if name in sys.modules]"
    )
    run_python("-c", code)


@pytest.mark.parametrize("words", QUICK_COMMANDS)
def test_help_and_listings_answer_within_three_tenths_of_a_second(words: list[str]) -> None:
    """The best of some: other work on the machine only ever makes a run slower."""
    assert min(wall_seconds_of(words) for _ in range(5)) <= QUICK_SECONDS
