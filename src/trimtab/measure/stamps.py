"""What a result depends on: versions of packages, read without importing any of them."""

import contextlib
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("trimtab", "torch", "transformers", "peft")


def versions(*more: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in (*PACKAGES, *more):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
