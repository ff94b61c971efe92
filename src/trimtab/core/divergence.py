"""Entropy and divergence of next-token distributions given as log-probabilities.

A token whose probability is zero, or too small for the type, counts nothing where its own distribution weighs it. Sums
run in the input's type, float32 or wider.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_nats(
    p_log_probs: Float[Tensor, "*rows vocab"], q_log_probs: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """Divergence of two next-token distributions, KL(p || q) = sum_v p_v (log p_v - log q_v).

    p_log_probs  [..., vocab]   normalised log-probabilities
    q_log_probs  [..., vocab]   same axes, same token ids
    returns      [...]          nats, >= 0; inf where q gives zero to a token that p uses; tokens at zero in p count 0
    source       Kullback and Leibler 1951
    """
    # softmax of normalised log-probabilities is their exp, several times faster on a CPU than torch.exp.
    probs = p_log_probs.softmax(dim=-1)
    gap = torch.where(probs == 0.0, 0.0, p_log_probs - q_log_probs)
    return (probs * gap).sum(dim=-1).clamp_min(0.0)


def entropy_nats(log_probs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """Entropy of a next-token distribution, -sum_v p_v log p_v.

    log_probs  [..., vocab]   normalised log-probabilities
    returns    [...]          nats, between 0 and log(vocab)
    """
    return -(log_probs.softmax(dim=-1) * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)
