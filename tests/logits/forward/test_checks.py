"""At opening each member is read on a few tokens, as its model computes by itself: what it costs and finds."""

import copy
import warnings

import pytest
import torch

import tiny
from fusing import fuse
from trimtab import FusedCausalLM
from trimtab.core.errors import MemberMismatch, TrimtabWarning
from trimtab.logits.forward.checks import check_groups
from trimtab.logits.forward.groups import Limits
from trimtab.models.probe import PROBE_TOKENS, other_shapes_tolerance, same_shapes_tolerance


def count_forwards(models):
    """Counts forwards and the tokens that they read; call what is returned to stop."""
    seen = []
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for model in models
    ]
    return seen, lambda: [hook.remove() for hook in hooks]


def test_opening_reads_each_member_six_times_and_some_tokens():
    base = tiny.make(seed=1)
    models = [tiny.make(seed=0, width=48), base, tiny.tuned(base, 3)]
    seen, stop = count_forwards(models)
    fused = FusedCausalLM.from_members(*models[:2], {"a": models[2]}, tokenizer=tiny.make_tokenizer(), one_pass=False)
    stop()
    # By itself, as it is read, and with a cache: a prompt, another text, two tokens, one token, in two rows each.
    by_itself, cached = 2 * PROBE_TOKENS, 2 * (PROBE_TOKENS + PROBE_TOKENS - 3)
    assert len(seen) == 6 * len(models)
    assert sum(seen) == (by_itself + cached) * len(models)
    assert all(group.limits == Limits() for group in fused.reader.groups)


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("mistral", "gemma2"), ("qwen3", "gemma")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_rounding_is_no_difference(kinds, dtype):
    base = tiny.make(kinds[1], seed=1).to(dtype)
    strong = tiny.make(kinds[0], seed=0, width=48).to(dtype)
    children = {name: tiny.tuned(base, seed) for seed, name in enumerate("ab")}
    fused = FusedCausalLM.from_members(strong, base, children, tokenizer=tiny.make_tokenizer())
    assert all(group.limits == Limits() for group in fused.reader.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_a_member_that_is_read_as_another_is_named_with_the_figure(dtype):
    fused = fuse()
    for body in fused.bodies:
        body.to(dtype)
    members = list(fused.members)
    for member in members:
        member.own_logits = fused.reader.read_alone(member, torch.arange(3, 3 + 7 * PROBE_TOKENS, 7).unsqueeze(0))
    check_groups(fused.reader.groups)
    facts = fused.members.experts["facts"]
    facts.own_logits = facts.own_logits.clone()
    away = 3 * max(same_shapes_tolerance(facts.model), 2 * other_shapes_tolerance(facts.model))
    facts.own_logits[0, 2, 5] += away * facts.own_logits.abs().max()
    with pytest.raises(MemberMismatch, match=r"member 'facts' is read as another model: its logits differ by \d"):
        check_groups(fused.reader.groups)


def test_a_strong_model_with_int8_layers_of_torch_is_a_member():
    """Its linear layers have a method `weight`, and round by a scale that all rows of a batch share."""
    base, strong = tiny.make(seed=1), tiny.make(seed=0, width=48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(strong), {torch.nn.Linear}, dtype=torch.qint8)
    alpha_0 = {"amount": "static", "settings": {"alpha": 0.0}}
    tokenizer = tiny.make_tokenizer()
    fused = FusedCausalLM.from_members(small, base, {"a": tiny.tuned(base, 3)}, alpha_0, tokenizer)
    ids = torch.tensor([[5, 6, 7]])
    assert fused.members.strong.rows == tiny.VOCAB
    own = small.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(fused.generate(ids, max_new_tokens=8, do_sample=False), own)
    torch.testing.assert_close(fused(ids).logits, small(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.warns(TrimtabWarning, match="adds nothing"):
        as_base = FusedCausalLM.from_members(strong, small, {"a": small}, "static", tokenizer)
    torch.testing.assert_close(as_base(ids).logits, strong(ids).logits, atol=1e-4, rtol=1e-4)
