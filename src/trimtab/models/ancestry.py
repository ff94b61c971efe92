"""Is an expert a child of the base? Its delta says what tuning taught only if it is."""

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.divergence import kl_nats

UNRELATED_COSINE = 0.5  # tuning keeps weights above it; models of other seeds lie near 0
SAMPLED = 65_536  # weights looked at per matrix
PROBES, PROBE_TOKENS = 4, 32


def weight_cosine(expert: Any, base: Any) -> float | None:
    """Cosine between the weight matrices of two models; None when their shapes differ.

    Vectors (biases, norms) are left out: they start at the same constants in every model. Of each matrix an even
    sample is read, so that large models take seconds.
    """
    experts, bases = _matrices(expert), _matrices(base)
    for name in (experts.keys() & bases.keys()) & (_embeddings(expert) & _embeddings(base)):
        rows = min(len(experts[name]), len(bases[name]))  # tokens may have been added in tuning
        experts[name], bases[name] = experts[name][:rows], bases[name][:rows]
    if {name: m.shape for name, m in experts.items()} != {name: m.shape for name, m in bases.items()}:
        return None
    dot = expert_square = base_square = 0.0
    for name, matrix in bases.items():
        ours, theirs = _sample(matrix), _sample(experts[name])
        dot += float(ours @ theirs)
        expert_square, base_square = expert_square + float(theirs @ theirs), base_square + float(ours @ ours)
    return float(dot / max((expert_square * base_square) ** 0.5, 1e-30))


def mean_kl_nats(expert_logits: Tensor, base_logits: Tensor) -> float:
    """KL(expert || base), averaged over the positions of [batch, time, vocab]."""
    laws = [logits.flatten(0, 1).double().log_softmax(dim=-1) for logits in (expert_logits, base_logits)]
    return float(kl_nats(laws[0], laws[1]).mean())


def probe_ids(vocab_size: int) -> Tensor:
    """Fixed token sequences [batch, time] to compare models on; the same for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (PROBES, PROBE_TOKENS), generator=generator)


def _embeddings(model: Any) -> set[str]:
    """Names of the matrices that have a row for each token."""
    own = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {f"{own[id(end)]}.weight" for end in ends if id(end) in own}


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    named = ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters())
    return {name: p.detach() for name, p in named if p.ndim > 1 and "lora_" not in name}


def _sample(matrix: Tensor) -> Tensor:
    step = max(1, matrix.numel() // SAMPLED)
    return matrix.reshape(-1)[::step].double().cpu()
