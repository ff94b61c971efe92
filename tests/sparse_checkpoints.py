"""Checkpoints of many gigabytes that take no room: sparse files of the right size, with a few numbers at each start."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny

STARTS = 4096  # numbers that are written at the start of each matrix; the rest are holes, which read as zero


def write_sparse(directory: Path, seed: int, shards: int = 1, noise: float = 0.0, **shape: int) -> int:
    """A Llama in bfloat16 with our tokenizer; returns its size in bytes.

    seed     of the numbers that are written
    noise    how far these are moved from those of the seed: another model that descends from it
    """
    config = LlamaConfig(**tiny.TOKENS, **shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    total, named = 0, list(shapes)
    files = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(named)}
    for file in sorted(set(files.values())):
        header, offset = {}, 0
        for name in (name for name in named if files[name] == file):
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.items():
                count = min(STARTS, torch.Size(shapes[name]).numel())
                generator = torch.Generator().manual_seed(1000 * seed + named.index(name))
                numbers = torch.randn(count, generator=generator) + noise * torch.randn(count, generator=generator)
                stream.seek(8 + len(text) + entry["data_offsets"][0])
                stream.write(numbers.bfloat16().view(torch.uint8).numpy().tobytes())
            stream.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
