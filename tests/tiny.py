"""Tiny random members of several architectures, children of them, and a tokenizer: real models, no downloads."""

import copy
import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHARACTERS = string.ascii_letters + string.digits + " .,:;?!'#\n-+=<>()|"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
VOCAB = len(SPECIAL) + len(CHARACTERS)
CONTEXT = 128
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
SHAPE = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
# Wide initial weights: laws that are far from uniform, so that a mistake shows.
WIDE = {"initializer_range": 0.3}


def config_of(kind: str, width: int = 32, layers: int = 2, vocab: int = VOCAB):
    """A configuration of an architecture."""
    shape = {**TOKENS, **SHAPE, **WIDE, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocab}
    grouped = {**shape, "num_key_value_heads": 2}
    head = {"head_dim": width // 4}
    return {
        "llama": lambda: LlamaConfig(**grouped),
        "qwen2": lambda: Qwen2Config(**grouped, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**grouped, **head),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=8),
        "gemma": lambda: GemmaConfig(**grouped, **head),
        "gemma2": lambda: Gemma2Config(**grouped, **head, sliding_window=8),
        "gpt2": lambda: GPT2Config(
            **TOKENS | {"vocab_size": vocab}, **WIDE, n_embd=width, n_layer=layers, n_head=4, n_positions=CONTEXT
        ),
    }[kind]()


KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2")


def make(kind: str = "llama", seed: int = 0, width: int = 32, layers: int = 2, vocab: int = VOCAB):
    """A random model of an architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_of(kind, width, layers, vocab)).eval()


def tuned(model, seed: int, strength: float = 0.3):
    """A child of a model: the same weights, moved a little."""
    child = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            scale = strength * parameter.std() if parameter.ndim > 1 else 0.0
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return child


def make_tokenizer(characters: str = CHARACTERS, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    made.chat_template = chat_template
    return made
