"""vLLM's own command on a fused directory, as the documentation prints it, with the plug-in of `tools/vllm_cpu`."""

import subprocess
import sys

from bench import served

PROMPT = "Q: Which pet does Jakob Brulman keep?\nA:"


def test_vllm_serves_a_fused_directory(directory, fused, tmp_path) -> None:
    words = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    with served.running([served.tool("vllm"), "serve", str(directory), *words], tmp_path) as server:
        asked = {"model": str(directory), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        choice = server.ask("/v1/completions", asked)["choices"][0]
    inputs = fused.tokenizer(PROMPT, return_tensors="pt")
    ids = fused.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert choice["text"] == fused.tokenizer.decode(ids, skip_special_tokens=True)


FOUND = """
from importlib import metadata
from trimtab_vllm_cpu import name_cpu_build

listed, points = sorted(found.name for found in metadata.distributions()), metadata.entry_points()
try:
    metadata.version("vllm")
    raise SystemExit("vllm-cpu answers for vllm by itself: tools/vllm_cpu can go")
except metadata.PackageNotFoundError:
    pass
for _ in range(2):
    name_cpu_build()
    assert metadata.version("vllm") == metadata.version("vllm-cpu") + "+cpu"
    assert sorted(found.name for found in metadata.distributions()) == listed
    assert metadata.entry_points() == points
"""


def test_the_cpu_build_is_found_by_name_and_listed_once() -> None:
    ran = subprocess.run([sys.executable, "-c", FOUND], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
