"""A fused directory of tiny members, in the batch's own tests without Ray and vLLM."""

import pytest

import tiny
from trimtab import FusedCausalLM


@pytest.fixture(scope="session")
def fused_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    base = tiny.make(seed=1)
    for name, model in {"strong": tiny.make(width=48, layers=3), "base": base, "math": tiny.tuned(base, 10)}.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer(chat_template=tiny.CHAT).save_pretrained(folder / name)
    fused = FusedCausalLM.from_members(*(str(folder / n) for n in ("strong", "base")), {"math": str(folder / "math")})
    fused.save_pretrained(folder / "fused")
    return folder / "fused"
