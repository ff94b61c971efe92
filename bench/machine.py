"""What a measurement ran on: without it a figure means nothing."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trimtab.measure import stamps

ROOT = Path(__file__).parent.parent
MEASURED = (".", ":(exclude)bench/results")  # what a commit stands for


def describe(name: str = "") -> dict[str, Any]:
    """The machine and its software as JSON can hold them.

    name    what to call the machine; empty: its host name
    """
    return {
        "name": name or platform.node(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "allocator": {name: text for name, text in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "versions": stamps.versions(),
    }


def now() -> str:
    """Date and time, UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def commit() -> str:
    """The commit of the working tree, with a + where tracked files differ from it; empty outside a repository.

    Results do not count: each of several benches in a row leaves some.
    """
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED) else head


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"
