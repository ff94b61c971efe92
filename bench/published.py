"""Logit fusion as published: one forward of every member per token, a plain loop around it.

Written from the papers, each member with its own KV cache; this is what ours is compared with, so it is no slower than
it needs to be: only the last position's logits are computed.

Sources: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565 (constant weight; its code runs base,
expert and anti-expert in turn at every step); Fan et al. 2024, "On Giant's Shoulders", arXiv 2406.15480, Algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# From the logits of strong and base [batch, vocab] and of the experts [expert, batch, vocab] to fused scores.
Fuse = Callable[[Tensor, Tensor, Tensor], Tensor]

ALPHAS = tuple(step / 10 for step in range(21))  # 0, 0.1, ..., 2


def fuse_static(strong: Tensor, base: Tensor, experts: Tensor) -> Tensor:
    """strong + sum of (expert - base): proxy-tuning, alpha = 1. [batch, vocab]"""
    return strong + (experts - base).sum(dim=0)


def fuse_grid(strong: Tensor, base: Tensor, experts: Tensor) -> Tensor:
    """Algorithm 1: every expert alone with every alpha of the grid; the log-probs of the best pair. [batch, vocab]

    The objective of expert t, p~ = softmax(log P + alpha (log Q_t - log Q)) is
    sum over s of (KL(p~ || P) - KL(Q_s || Q))^2 + (KL(P || p~) - KL(Q || Q_s))^2.
    """
    strong, base, experts = (scores.log_softmax(dim=-1) for scores in (strong, base, experts))
    targets = [(_kl(expert, base), _kl(base, expert)) for expert in experts]
    best_log_probs, best = strong, torch.full_like(strong[:, 0], torch.inf)
    for expert in experts:
        delta = expert - base
        for alpha in ALPHAS:
            fused = (strong + alpha * delta).log_softmax(dim=-1)
            forward, reverse = _kl(fused, strong), _kl(strong, fused)
            objective = torch.zeros_like(best)
            for there, back in targets:
                objective += (forward - there) ** 2 + (reverse - back) ** 2
            is_better = objective < best
            best_log_probs, best = (
                torch.where(is_better[:, None], fused, best_log_probs),
                torch.where(is_better, objective, best),
            )
    return best_log_probs


def _kl(log_probs: Tensor, other: Tensor) -> Tensor:
    """KL(p || other) in nats, [batch]; both are log-probabilities [batch, vocab]."""
    return (log_probs.exp() * (log_probs - other)).sum(dim=-1)


@torch.inference_mode()
def generate(
    strong: Any,
    base: Any,
    experts: Sequence[Any],
    fuse: Fuse,
    inputs: Mapping[str, Tensor],
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
) -> Tensor:
    """Greedy tokens [batch, prompt + new]; rows that have ended are filled with `pad_id`, as transformers does."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    members = [strong, base, *experts]
    caches = [DynamicCache(config=member.config) for member in members]
    new, positions = ids, (mask.cumsum(dim=-1) - 1).clamp_min(0)
    is_running = torch.ones_like(ids[:, 0], dtype=torch.bool)
    for step in range(max_new_tokens):
        read = {"input_ids": new, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        logits = [
            member(**read, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
            for member, cache in zip(members, caches, strict=True)
        ]
        scores = fuse(logits[0], logits[1], torch.stack(logits[2:]))
        if step < min_new_tokens:
            scores[:, eos_id] = -torch.inf
        chosen = torch.where(is_running, scores.argmax(dim=-1), pad_id)
        ids = torch.cat([ids, chosen[:, None]], dim=-1)
        is_running &= chosen != eos_id
        if not is_running.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        new, positions = chosen[:, None], positions[:, -1:] + 1
    return ids
