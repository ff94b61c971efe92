"""Members and fused models that tests of several packages share."""

import pytest

import tiny
from fusing import fuse


@pytest.fixture(scope="session")
def fused():
    """Llamas of two sizes with two experts; do not change it."""
    return fuse()


@pytest.fixture(scope="session")
def members_dir(tmp_path_factory):
    """strong, base, math and facts as directories with tokenizers."""
    folder = tmp_path_factory.mktemp("members")
    base = tiny.make(seed=1)
    models = {"strong": tiny.make(seed=0, width=48, layers=3), "base": base}
    models |= {"math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    return folder
