"""Shapes in annotations are compared with the real tensors while tests run, and only then."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("trimtab", "beartype.beartype")

pytest_plugins = ["shared_members"]  # after the hook: it imports the package
