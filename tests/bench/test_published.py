"""The published loops give the tokens that ours gives with the same strategy; otherwise speeds compare nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from bench import members, published
from trimtab import FusedCausalLM
from trimtab.zoo import resolve

TASKS = ("arithmetic", "facts")


@pytest.fixture(scope="module")
def loaded():
    names = ("strong", "small", *(f"small/{task}" for task in TASKS))
    return [AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval() for name in names]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["static", "grid"])
def test_published_loops_write_what_ours_writes(loaded, name, count, batch):
    strong, base, *experts = loaded
    tokenizer = members.load_tokenizer()
    strategy = {"amount": name, "chooser": "sum" if name == "static" else "joint_objective"}
    named = dict(zip(TASKS[:count], experts[:count], strict=True))
    fused = FusedCausalLM.from_members(strong, base, named, strategy, tokenizer)
    inputs = members.encode(tokenizer, members.prompts_of(TASKS[:count], batch))
    fuse = {"static": published.fuse_static, "grid": published.fuse_grid}[name]
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    for limits in ({"max_new_tokens": 24}, {"max_new_tokens": 30, "min_new_tokens": 30}):
        ours = fused.generate(**inputs, **limits, do_sample=False, speculate=0)
        theirs = published.generate(strong, base, experts[:count], fuse, inputs, **ends, **limits)
        assert torch.equal(ours, theirs)


def test_the_two_rules_differ():
    generator = torch.Generator().manual_seed(0)
    strong, base = (torch.randn(3, tiny.VOCAB, generator=generator) for _ in range(2))
    experts = base + torch.randn(2, 3, tiny.VOCAB, generator=generator)
    static = published.fuse_static(strong, base, experts).log_softmax(dim=-1)
    assert not torch.allclose(static, published.fuse_grid(strong, base, experts), atol=0.1)
    # An expert that learned nothing moves nothing.
    unmoved = published.fuse_grid(strong, base, base.expand(2, -1, -1))
    torch.testing.assert_close(unmoved, strong.log_softmax(dim=-1))
