"""What a result depends on: versions of packages, read without importing any of them."""

import contextlib

PACKAGES = ("trimtab", "torch", "transformers", "peft")


def versions(*more: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # a quarter of what `trimtab --help` would cost

    found = {}
    for package in (*PACKAGES, *more):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
