"""The architecture, checked: imports point down, the public names are frozen, importing is light, help is quick."""

import ast
import importlib
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from time import perf_counter

import pytest

import trimtab

ROOT = Path(trimtab.__file__).parent
# What each part may import besides itself. The package root holds the version and lazy names; errors live in core.
ALLOWED = {
    "core": set(),
    "measure": {"core"},
    "zoo": {"core"},
    "models": {"core", "zoo"},
    "logits": {"core", "models"},
    "serving": {"core", "models", "logits"},
    "batch": {"core", "models", "logits", "serving"},
    "studies": {"core", "zoo", "models", "logits", "measure"},
    "cli": {"core", "measure", "studies", "zoo", "models", "logits", "batch", "serving"},
    "__main__": {"cli"},
}
LEAVES = ("core", "__main__")  # not in the page's table: the one imports nothing, the other only starts the commands
PUBLIC_NAMES = {
    "FusedCausalLM",
    "FusedConfig",
    "Fusion",
    "InputError",
    "Strategy",
    "Trace",
    "TraceStep",
    "TrimtabError",
    "__version__",
    "make_strategy",
}
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "rich", "peft", "lm_eval", "jaxtyping", "ray", "vllm")
QUICK_SECONDS = 0.3


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it; names of the root count as their home."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, line {node.lineno}"
            homes = {alias.name: trimtab._HOMES.get(alias.name) for alias in node.names}
            for name, home in homes.items():
                is_module = f"{node.module}.{name}" in MODULES
                is_lazy = node.module == "trimtab" and home
                found.add(home if is_lazy else f"{node.module}.{name}" if is_module else node.module or "")
    return {name for name in found if name == "trimtab" or name.startswith("trimtab.")}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [name for name in MODULES if name != "trimtab"])
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"{module} lies in no known part of the package"
    upward = {name for name in imports_of(module) if part_of(name) not in ALLOWED[part] | {part, ""}}
    assert not upward, f"{module} imports upward: {', '.join(sorted(upward))}"


def test_no_module_imports_itself_round_about() -> None:
    # The root's lazy names are no imports, and annotations under TYPE_CHECKING are none either.
    graph = {name: imports_of(name) - {"trimtab", name} for name in MODULES if name != "trimtab"}
    TopologicalSorter(graph).prepare()


ARCHITECTURE = ROOT.parents[1] / "docs" / "architecture.md"


def test_the_page_on_architecture_tells_who_imports_whom() -> None:
    actual: dict[str, set[str]] = {}
    for module in MODULES:
        part = part_of(module)
        actual.setdefault(part, set()).update({part_of(name) for name in imports_of(module)} - {part, ""})
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
        for name in MODULES
        if name.startswith(("trimtab.logits.strategy.amounts.", "trimtab.logits.strategy.choosers."))
    ]
    for name in methods:
        siblings = imports_of(name) & set(methods)
        assert not siblings, f"{name} imports {siblings}: what two methods need moves down"


def test_public_names_are_frozen() -> None:
    assert set(trimtab.__all__) == PUBLIC_NAMES
    assert set(trimtab._HOMES) == PUBLIC_NAMES - {"__version__"}
    for name in PUBLIC_NAMES:
        assert getattr(trimtab, name) is not None


def test_every_registered_name_can_be_imported() -> None:
    from trimtab.cli.commands import COMMANDS
    from trimtab.core.registry import find
    from trimtab.logits.registry import AMOUNTS, CHOOSERS

    for table in (AMOUNTS, CHOOSERS):
        for name in table:
            assert callable(find(table, name)) or isinstance(find(table, name), type)
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


@pytest.mark.parametrize("line", ["import trimtab", "import trimtab.logits.registry", "import trimtab.cli.main"])
def test_importing_is_light(line: str) -> None:
    code = f"{line}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


QUICK_COMMANDS = [["--help"], ["list"], ["list", "--json"], ["--version"]]


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
