"""The architecture, checked: imports point down, the public names are frozen, importing is light, help is quick."""

import ast
import importlib
import math
import os
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
    "registry": {"core"},
    "measure": {"core"},
    "zoo": {"core"},
    "logits": {"core", "registry", "measure", "zoo"},
    "cli": {"core", "registry", "measure", "zoo", "logits"},
    "__main__": {"cli"},
}
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
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "rich", "peft", "lm_eval", "jaxtyping")
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


def test_amounts_and_choosers_do_not_import_one_another() -> None:
    methods = [name for name in MODULES if name.startswith(("trimtab.logits.amounts.", "trimtab.logits.choosers."))]
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
    from trimtab.registry import AMOUNTS, CHOOSERS, find

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
    """How long one waits for the installed command."""
    started = perf_counter()
    subprocess.run([str(SCRIPT), *words], capture_output=True, check=True)
    return perf_counter() - started


@pytest.mark.parametrize("line", ["import trimtab", "import trimtab.registry", "import trimtab.cli.main"])
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
    """The best of many: other work on the machine only ever makes a run slower."""
    best = math.inf
    for _ in range(20):
        best = min(best, wall_seconds_of(words))
        if best <= QUICK_SECONDS:
            break
    assert best <= QUICK_SECONDS
