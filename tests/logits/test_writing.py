"""A fused directory written without loading its members: the same bytes, and little memory for models of any size."""

import json
import subprocess
import sys
import time
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from sparse_checkpoints import write_sparse
from trimtab import FusedCausalLM
from trimtab.core.errors import MemberMismatch, TrimtabWarning, UnreadableModel
from trimtab.logits.writing import write_fused

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def save(directory, model):
    model.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


def save_lora(directory, base, seed, is_zero=False):
    """A LoRA on a base directory, with random B or, as before training, zero."""
    model = peft.get_peft_model(tiny.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not is_zero:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def both_ways(folder, *members, **options):
    """{file: bytes} of a directory written without loading, and of one written by loading."""
    write_fused(folder / "written", *members, **options)
    FusedCausalLM.from_members(*members, **options).save_pretrained(folder / "saved")
    return ({file.name: file.read_bytes() for file in (folder / name).iterdir()} for name in ("written", "saved"))


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("qwen2", "gpt2"), ("gemma2", "mistral")])
def test_what_is_written_is_what_loading_and_saving_writes(tmp_path, kinds):
    base = tiny.make(kinds[1], seed=1)
    strong = save(tmp_path / "strong", tiny.make(kinds[0], seed=0, vocab=tiny.VOCAB + 4).bfloat16())
    strong_generation = json.loads((strong / "generation_config.json").read_text())
    (strong / "generation_config.json").write_text(json.dumps(strong_generation | {"eos_token_id": [1, 5]}))
    members = strong, save(tmp_path / "base", base), {"math": save(tmp_path / "math", tiny.tuned(base, 10))}
    if kinds[1] == "llama":
        members[2]["lora"] = save_lora(tmp_path / "lora", tmp_path / "base", 3)
    written, saved = both_ways(tmp_path, *members, strategy="static")
    assert written == saved
    assert json.loads(written["config.json"])["dtype"] == "bfloat16"


def test_embedded_models_are_written_alike(tmp_path):
    experts = {"facts": "zoo:small/facts", "lora": "zoo:small/facts-lora"}
    written, saved = both_ways(tmp_path, "zoo:strong", "zoo:small", experts, one_pass=False)
    assert written == saved


BIG = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SMALL = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 8}
# The peak of this process's own memory: getrusage's also counts the process that started it.
FUSE = """
import re, sys
from pathlib import Path
from trimtab.cli.main import main
code = main(sys.argv[1:])
print("rss", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
raise SystemExit(code)
"""


def test_members_of_any_size_are_fused_in_little_memory(tmp_path):
    size = write_sparse(tmp_path / "strong", seed=1, shards=4, num_hidden_layers=12, **BIG)
    assert size > 20e9
    write_sparse(tmp_path / "base", seed=2, **SMALL)
    write_sparse(tmp_path / "expert", seed=2, noise=0.3, shards=2, **SMALL)
    layers = {f"base_model.model.model.layers.{index}.self_attn.q_proj" for index in range(8)}
    lora = {f"{layer}.lora_A.weight": torch.ones(4, 1024) for layer in layers}
    lora |= {f"{layer}.lora_B.weight": torch.ones(1024, 4) for layer in layers}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base"))
    config.save_pretrained(tmp_path / "lora")
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    words = [f"--{role}={tmp_path / role}" for role in ("strong", "base")]
    words += [f"--expert=full={tmp_path / 'expert'}", f"--expert=lora={tmp_path / 'lora'}", "-o", tmp_path / "fused"]
    start = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", FUSE, "fuse", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "does not descend" not in ran.stderr
    assert "adds nothing" not in ran.stderr
    assert int(ran.stdout.split("rss")[1]) < 1000, "MiB, of which torch and transformers take 400"
    assert time.monotonic() - start < 120, "reading 20 GB would take longer on this machine's share"
    content = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert (content["vocab_size"], content["dtype"]) == (tiny.VOCAB, "bfloat16")


def test_an_expert_equal_to_its_base_is_told_before_and_after_loading(tmp_path, members_dir):
    copied = save(tmp_path / "copied", tiny.make(seed=1))
    zero = save_lora(tmp_path / "zero", members_dir / "base", 0, is_zero=True)
    real = save_lora(tmp_path / "real", members_dir / "base", 1)
    loaded = tiny.AutoModelForCausalLM.from_pretrained(members_dir / "base")
    adapted = peft.PeftModel.from_pretrained(tiny.AutoModelForCausalLM.from_pretrained(members_dir / "base"), zero)
    cases = {"itself": members_dir / "base", "weight files": copied, "every B": zero, "its weights": loaded}
    for reason, expert in (*cases.items(), ("every B", adapted)):
        base = adapted.get_base_model() if expert is adapted else members_dir / "base"
        with pytest.warns(TrimtabWarning, match=rf"expert 'x' adds nothing: .*{reason}.*Fix: pass the tuned model"):
            FusedCausalLM.from_members(members_dir / "strong", base, {"x": expert})
    for reason, expert in list(cases.items())[:3]:
        with pytest.warns(TrimtabWarning, match=rf"expert 'x' adds nothing: .*{reason}"):
            write_fused(tmp_path / "fused", members_dir / "strong", members_dir / "base", {"x": expert})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_fused(tmp_path / "fused", members_dir / "strong", members_dir / "base", {"x": real})


def test_a_stranger_is_told_from_pieces_of_its_files(tmp_path, members_dir):
    strangers = {"the cosine of their weights is": tiny.make(seed=9), "other shapes": tiny.make("gpt2", seed=9)}
    for reason, model in strangers.items():
        stranger = save(tmp_path / model.config.model_type, model)
        with pytest.warns(TrimtabWarning, match=rf"'x' does not descend from the base: .*{reason}.*--probe"):
            write_fused(tmp_path / "fused", members_dir / "strong", members_dir / "base", {"x": stranger})


def test_what_files_show_is_refused_before_anything_is_written(tmp_path, members_dir):
    def refused(error, message, strong=members_dir / "strong", expert=members_dir / "math"):
        with pytest.raises(error, match=message):
            write_fused(tmp_path / "fused", strong, members_dir / "base", {"x": expert})
        assert not (tmp_path / "fused").exists()

    misfit = save_lora(tmp_path / "misfit", members_dir / "strong", 1)
    content = json.loads((misfit / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gone"}
    (misfit / "adapter_config.json").write_text(json.dumps(content))
    refused(MemberMismatch, r"(?s)adapter 'x' .* does not fit its base: .*pass that one as base", expert=misfit)
    lacking = save(tmp_path / "lacking", tiny.make(seed=0))
    weights = load_file(lacking / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    refused(UnreadableModel, "lacks 1 of its weights, such as model.norm.weight", strong=lacking)
