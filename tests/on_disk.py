"""Tiny members as directories."""

import torch
from peft import LoraConfig, get_peft_model

import tiny


def save_models(folder, **models):
    """Each model, with the tokenizer, under its name."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)


def save_adapter(folder, name="adapter", bare=None, place=None):
    """A random LoRA adapter on a model that lies at a place; by default that of seed 1, which lies there as `base`."""
    bare = tiny.make(seed=1) if bare is None else bare
    bare.name_or_path = str(place or folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapter = get_peft_model(bare, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, bias="none"))
    adapter.save_pretrained(folder / name)
