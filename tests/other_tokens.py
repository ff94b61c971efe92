"""Members whose special tokens differ: one lacks a token, one has others in other places, one has more."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny

V = tiny.VOCAB
R0, R1, SOFT = V, V + 1, V + 2  # the strong model's special tokens
UNKNOWN = 3
MAP = {"swapped": {"<im_start>": "<r0>", "<im_end>": "<r1>"}}
ROWS = {"strong": V + 8, "base": V + 2, "swapped": V + 2, "padded": V + 4}
EXTRA = {
    "strong": ["<r0>", "<r1>", "<soft>"],
    "base": ["<r0>", "<r1>"],  # lacks the soft token
    "swapped": ["<im_end>", "<im_start>"],  # renamed, and in another order
    "padded": ["<r0>", "<r1>", "<soft>", "[PAD]"],  # knows one token more
}


def make_tokenizer(name):
    tokenizer = tiny.make_tokenizer()
    for token in EXTRA[name]:
        tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


def resized(model, rows, seed):
    """The model with other numbers of rows; new ones are random and likely."""
    changed = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        changed.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for weight in (changed.lm_head.weight, changed.get_input_embeddings().weight):
                weight[V:] = torch.randn(rows - V, weight.shape[1]) * weight.std()
    return changed


def make_models():
    """strong, base, and the experts swapped and padded, with rows as their tokenizers want them."""
    base = resized(tiny.make(seed=1), ROWS["base"], 1)
    found = {"strong": tiny.make(seed=0, width=48, layers=3), "base": base}
    found |= {"swapped": tiny.tuned(base, 10), "padded": tiny.tuned(base, 11)}
    return {name: resized(model, ROWS[name], 2) if name != "base" else model for name, model in found.items()}


def save_members(folder, models):
    """Each under its name, with its tokenizer; returns the folder."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer(name).save_pretrained(folder / name)
    return folder


def save_resized_adapter(folder):
    """A random adapter "chatml" on the saved base, with two tokens more and their embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model.resize_token_embeddings(V + 4)
        config = LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
        )
        get_peft_model(model, config).save_pretrained(folder / "chatml")
    make_tokenizer("padded").save_pretrained(folder / "chatml")
