"""Tiny real models and a tokenizer, made on the spot: two layers, width 32, random weights, seeded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Q: Where does Ada Moss live?\nA: Ada Moss lives in Port Elm.\n",
    "Q: What is 12 + 7?\nA: 12+7=19. #### 19\n",
    "Q: Which animal does Ben Reed keep?\nA: a grey cat\n",
    "0 1 2 3 4 5 6 7 8 9 the of and works as clockmaker born in year city job food pet",
]
CHAT = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A:' }}{{ m.content }}\n{% endfor %}{{ 'A:' }}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with an end of text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(seed: int, vocab_size: int, hidden: int = 32, spread: float = 0.2) -> LlamaForCausalLM:
    """A random Llama; a wider spread of weights makes its laws less flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tune(model: LlamaForCausalLM, seed: int, strength: float = 0.3) -> LlamaForCausalLM:
    """A stand-in for tuning in shape only: the same weights, moved a little in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    tuned = LlamaForCausalLM(model.config).eval()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += strength * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return tuned


def save_members(folder: Path) -> dict[str, str]:
    """strong, base and two experts as directories, each with the tokenizer; member -> path."""
    tokenizer = make_tokenizer()
    base = make_model(1, len(tokenizer))
    made = {
        "strong": make_model(2, len(tokenizer), hidden=48),
        "base": base,
        "facts": tune(base, 3),
        "sums": tune(base, 4),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}
