"""Is an expert a child of the base? Its delta says what tuning taught only if it is, and is nothing if they are equal.

Two models are compared in memory, or by their files, of which only pieces are read: seconds for any size.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.divergence import kl_nats
from trimtab.models import checkpoint, quantization, references

UNRELATED_COSINE = 0.5  # tuning keeps weights above it; models of other seeds lie near 0
SAMPLED = 65_536  # weights looked at per matrix in memory
# Of files: pieces per matrix, numbers per piece, and matrices, since a mixture of experts may have 100,000 of them.
FILE_PIECES, FILE_PIECE_NUMBERS, FILE_MATRICES = 8, 4096, 256
PROBES, PROBE_TOKENS = 4, 32
# A text model and the text part of a larger one have the same names after such prefixes.
PREFIX = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)+")
NOT_TEXT = re.compile(r"vision|visual|audio|multi_modal|mm_|image_newline|lora_")
VOCABULARY = re.compile(r"embed|wte|lm_head")  # matrices with a row per token: tuning may add rows
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weight_cosine(expert: nn.Module, base: nn.Module) -> float | None:
    """Cosine between the weight matrices of two models; None when their shapes differ.

    Vectors (biases, norms) are left out: they start at the same constants in every model. Of each matrix an even
    sample is read, so that large models take seconds. Of embeddings only the rows are compared that both have.
    """
    experts, bases = _matrices(expert), _matrices(base)
    names = comparable({n: tuple(m.shape) for n, m in experts.items()}, {n: tuple(m.shape) for n, m in bases.items()})
    if names is None:
        return None
    pairs = ((experts[name], bases[name]) for name in names)
    return _cosine((_sample(ours[: len(theirs)]), _sample(theirs[: len(ours)])) for ours, theirs in pairs)


def file_cosine(expert: Path, base: Path) -> float | None:
    """As `weight_cosine`, of two checkpoints by pieces of their files; None also where weights are stored packed."""
    experts, bases = _stored(expert), _stored(base)
    shapes = ({name: part.shape for name, (_, part) in found.items()} for found in (experts, bases))
    names = comparable(*shapes)
    if names is None or any(part.dtype not in FLOATS for _, part in (*experts.values(), *bases.values())):
        return None
    chosen = [names[index * len(names) // FILE_MATRICES] for index in range(FILE_MATRICES)]
    chosen = names if len(names) <= FILE_MATRICES else chosen
    # Rows are counted from the shorter of the two, so that both pieces are of the same rows.
    rows = {name: min(experts[name][1].shape[0], bases[name][1].shape[0]) for name in chosen}
    pieces = [
        checkpoint.slices({f[name][0]: (f[name][1], rows[name]) for name in chosen}, FILE_PIECES, FILE_PIECE_NUMBERS)
        for f in (experts, bases)
    ]
    return _cosine((pieces[0][experts[name][0]], pieces[1][bases[name][0]]) for name in chosen)


def comparable(experts: Mapping[str, tuple[int, ...]], bases: Mapping[str, tuple[int, ...]]) -> list[str] | None:
    """The names of the matrices that two models share; None when their names or shapes differ.

    An output layer may be stored in one of them only, where it is tied to the embeddings.
    """
    names = [name for name in bases if name in experts]
    alone = set(experts) ^ set(bases)
    if not names or any("lm_head" not in name for name in alone):
        return None
    for name in names:
        ours, theirs = experts[name], bases[name]
        if ours != theirs and not (VOCABULARY.search(name) and ours[1:] == theirs[1:]):
            return None
    return names


def is_plain(model: nn.Module) -> bool:
    """Whether a model's weights are ordinary numbers in memory: not packed by quantization, nor left on disk."""
    if quantization.has_packed_layers(model):
        return False
    return all(p.dtype in FLOATS and p.device.type != "meta" and type(p.data) is Tensor for p in model.parameters())


def are_equal(expert: nn.Module, base: nn.Module) -> bool:
    """Whether two models have the very same parameters; a sample is compared first."""
    ours, theirs = dict(expert.named_parameters()), dict(base.named_parameters())
    if {n: (p.shape, p.dtype) for n, p in ours.items()} != {n: (p.shape, p.dtype) for n, p in theirs.items()}:
        return False
    starts = all(torch.equal(_start(ours[name]), _start(theirs[name])) for name in ours)
    return starts and all(torch.equal(ours[name], theirs[name].to(ours[name].device)) for name in ours)


def has_same_files(expert: Path, base: Path) -> bool:
    """Whether the weight files of two checkpoints are the same, as far as digests look."""
    return references.weights_digest(expert) == references.weights_digest(base)


def is_zero_adapter(tensors: Mapping[str, Any]) -> bool:
    """Whether an adapter changes nothing: LoRA whose every B is zero, and no other weights.

    tensors    {name: tensor} of the adapter
    """
    names = [name for name in tensors if "lora_B" in name or "lora_embedding_B" in name]
    others = [name for name in tensors if "lora_" not in name]
    return bool(names) and not others and not any(bool(tensors[name].any()) for name in names)


def adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of an adapter directory: adapters are small."""
    from safetensors.torch import load_file

    return {name: tensor for file in checkpoint.weight_files(directory) for name, tensor in load_file(file).items()}


def mean_kl_nats(expert_logits: Tensor, base_logits: Tensor) -> float:
    """KL(expert || base), averaged over the positions of [batch, time, vocab]."""
    log_probs = [logits.flatten(0, 1).double().log_softmax(dim=-1) for logits in (expert_logits, base_logits)]
    return float(kl_nats(log_probs[0], log_probs[1]).mean())


def probe_ids(vocab_size: int) -> Tensor:
    """Fixed token sequences [batch, time] to compare models on; the same for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (PROBES, PROBE_TOKENS), generator=generator)


def _cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    dot = expert_square = base_square = 0.0
    for ours, theirs in pairs:
        dot += float(ours @ theirs)
        expert_square, base_square = expert_square + float(ours @ ours), base_square + float(theirs @ theirs)
    return float(dot / max((expert_square * base_square) ** 0.5, 1e-30))


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    named = ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters())
    return {text_name(name): p.detach() for name, p in named if p.ndim > 1 and not NOT_TEXT.search(name)}


def _stored(directory: Path) -> dict[str, tuple[str, checkpoint.StoredTensor]]:
    """{name as text models have it: (name in the file, tensor)} of the matrices of a checkpoint."""
    found = checkpoint.tensors(directory)
    matrices = [name for name, part in found.items() if len(part.shape) > 1 and not NOT_TEXT.search(name)]
    return {text_name(name): (name, found[name]) for name in matrices}


def text_name(name: str) -> str:
    """A weight's name within the text model."""
    return PREFIX.sub("", name)


def _sample(matrix: Tensor) -> Tensor:
    step = max(1, matrix.numel() // SAMPLED)
    return matrix.reshape(-1)[::step].double().cpu()


def _start(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:16].cpu()
