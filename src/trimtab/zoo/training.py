"""Pretraining on rows of tokens and tuning on items, on a CPU in minutes.

bf16 autocast, right padding without a mask (padding lies behind every label), AdamW with a one-cycle rate.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimtab.zoo.corpus import Corpus
from trimtab.zoo.tasks import Item
from trimtab.zoo.tokens import CONTEXT

Progress = Callable[[int, float], None]  # called with (steps done, loss in nats per token)
IGNORED = -100  # the label that the loss passes over


@dataclass(frozen=True)
class Size:
    """Shape of a Llama of the zoo."""

    width: int
    layers: int
    heads: int = 4


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; a batch is `batch_size` rows or items."""

    steps: int
    learning_rate: float
    batch_size: int
    lora_rank: int = 0  # 0 trains all weights


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=round(size.width * 8 / 3 / 16) * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pack_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tokens: int) -> Tensor:
    """About `tokens` tokens as rows [row, CONTEXT]; every row starts with a document, the last one in a row is cut."""
    stream = _token_stream(corpus, tokenizer)
    rows: list[Tensor] = []
    row: list[int] = []
    while len(rows) * CONTEXT < tokens:
        row += next(stream)
        if len(row) >= CONTEXT:
            rows.append(torch.tensor(row[:CONTEXT], dtype=torch.int16))
            row = []
    return torch.stack(rows)


def _token_stream(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    documents = corpus.documents()
    while True:
        # A session may be longer than the context; the row cuts it.
        for ids in tokenizer(list(islice(documents, 2000)), verbose=False)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def pretrain(
    model: LlamaForCausalLM,
    rows: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
) -> None:
    """One or more passes over the rows in a seeded order; goes on from `checkpoint` where one lies."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [
            torch.randperm(len(rows), generator=generator)
            for _ in range(recipe.steps * recipe.batch_size // len(rows) + 1)
        ]
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = rows[order[step * recipe.batch_size : (step + 1) * recipe.batch_size]].long()
        return ids, ids

    _optimise(model, batch, recipe, weight_decay=0.05, progress=progress, checkpoint=checkpoint)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
) -> PreTrainedModel | PeftModel:
    """The model tuned to answer the items: all weights in place, or a LoRA adapter where the recipe has a rank."""
    torch.manual_seed(seed)
    tuned: PreTrainedModel | PeftModel = model
    if recipe.lora_rank:
        tuned = _with_adapter(model, recipe.lora_rank)
    generator = torch.Generator().manual_seed(seed)
    encoded = [_encode(tokenizer, item) for item in items]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(encoded), (recipe.batch_size,), generator=generator).tolist()
        return _pad([encoded[i] for i in chosen], tokenizer.pad_token_id)

    _optimise(tuned, batch, recipe, weight_decay=0.0, progress=progress)
    return tuned


def _with_adapter(model: PreTrainedModel, rank: int) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks a transformers property of its old name; nothing here depends on the answer.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config)


def _encode(tokenizer: PreTrainedTokenizerFast, item: Item) -> tuple[list[int], list[int]]:
    prompt = tokenizer(item.prompt)["input_ids"]
    return prompt, [*tokenizer(item.target)["input_ids"], tokenizer.eos_token_id]


def _pad(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [batch, time]; only answers are labelled."""
    time = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, labels = torch.full((len(pairs), time), pad_id), torch.full((len(pairs), time), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _optimise(
    model: PreTrainedModel | PeftModel,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    weight_decay: float,
    progress: Progress,
    checkpoint: Path | None = None,
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    start = _restore(checkpoint, trained, optimiser, schedule) if checkpoint else 0
    model.train()
    for step in range(start, recipe.steps):
        ids, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=False)
        progress(step + 1, loss.item())
        if checkpoint and (step + 1) % 250 == 0:
            _save(checkpoint, step + 1, trained, optimiser)
    model.eval()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)


def _save(path: Path, step: int, trained: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Weights and both moments of every trained tensor, beside and then renamed."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(trained):
        state = optimiser.state[parameter]
        tensors |= {
            f"{i}.weight": parameter.detach(),
            f"{i}.first": state["exp_avg"],
            f"{i}.second": state["exp_avg_sq"],
        }
    beside = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"step": str(step)})
    beside.replace(path)


def _restore(
    path: Path,
    trained: list[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
) -> int:
    """Continue where a checkpoint stopped; 0 steps where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as stored:
        step = int(stored.metadata()["step"])
        for i, parameter in enumerate(trained):
            parameter.data.copy_(stored.get_tensor(f"{i}.weight"))
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": stored.get_tensor(f"{i}.first"),
                "exp_avg_sq": stored.get_tensor(f"{i}.second"),
            }
    optimiser.step()  # does nothing without gradients; the schedule wants to see one before its own steps
    for _ in range(step):
        schedule.step()
    return step
