"""Fused models of tiny random members, and the margin rule for comparing tokens."""

import torch

import tiny
from trimtab import FusedCausalLM

PROMPTS = ["Where does Ada live?", "Q: 12+7", "The quick brown fox (a small one) sleeps."]


def fuse(kinds=("llama", "llama"), strategy="dynamic", experts=2, **options):
    """strong of the first architecture, base and experts of the second."""
    base = tiny.make(kinds[1], seed=1)
    children = {name: tiny.tuned(base, seed) for seed, name in enumerate(["math", "facts"][:experts], start=10)}
    strong = tiny.make(kinds[0], seed=0, width=48, layers=3)
    return FusedCausalLM.from_members(strong, base, children, strategy, tiny.make_tokenizer(), **options)


def check_same_tokens(model, ours, theirs, prompt, tolerance=1e-3, most=0):
    """Two generations agree; they may part only where the best two tokens are closer than the tolerance (counted).

    ours, theirs    generated ids [row, time] after `prompt`, which is what `encode` gave for these rows
    most            how many rows may part in this way
    """
    assert ours.shape[0] == theirs.shape[0]
    close = 0
    for row in range(ours.shape[0]):
        length = min(ours.shape[1], theirs.shape[1])
        differing = (ours[row, :length] != theirs[row, :length]).nonzero()
        if len(differing) == 0:
            rest = torch.cat([ours[row, length:], theirs[row, length:]])
            assert (rest == model.config.pad_token_id).all()
            continue
        at = int(differing[0])
        parts = {name: part[row : row + 1] for name, part in prompt.items() if isinstance(part, torch.Tensor)}
        parts["input_ids"] = torch.cat([parts["input_ids"], ours[row : row + 1, :at]], dim=-1)
        parts["attention_mask"] = torch.cat([parts["attention_mask"], torch.ones(1, at, dtype=torch.long)], dim=-1)
        best = model(**parts, use_cache=False, logits_to_keep=1).logits[0, -1].topk(2).values
        assert best[0] - best[1] < tolerance, f"row {row} differs at step {at}, where the margin is {best[0] - best[1]}"
        close += 1
    assert close <= most, f"{close} rows part at close calls"


def new_tokens(model, prompts, **options):
    """Greedy continuation of a batch: (inputs, ids [row, time])."""
    inputs = model.encode(prompts)
    options = {"max_new_tokens": 24, "do_sample": False} | options
    return inputs, model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
