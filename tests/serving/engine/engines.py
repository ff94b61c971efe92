"""Starting engines on fused directories, and comparing what they say with the transformers engine."""

import gc
from contextlib import contextmanager

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from fusing import check_same_tokens


@contextmanager
def engine(directory, **options):
    """vLLM on a directory, float32, eager; gone afterwards."""
    gc.freeze()  # vLLM collects garbage five times as an engine starts: it need not look through all imports again
    # max_num_seqs is small on purpose: requests queue, join and leave while others run.
    usual = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64, "disable_log_stats": False}
    llm = LLM(str(directory), **usual | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # collects garbage, too


def served(llm, prompts, **options):
    """Greedy continuations of token ids: vLLM's outputs, in the order of the prompts."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "logprobs": 2} | options)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def runner_of(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def counters(llm):
    """What vLLM has counted so far, by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def expected(fused, prompts, batch=25, **options):
    """The same by the transformers engine, one list of ids per prompt, in batches with left padding."""
    found = []
    for start in range(0, len(prompts), batch):
        inputs = padded(fused, prompts[start : start + batch])
        ids = fused.generate(**inputs, **{"max_new_tokens": 24, "do_sample": False, "speculate": 0} | options)
        found += ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [until_end(fused, ids) for ids in found]


def padded(fused, prompts):
    """Token ids as left-padded inputs."""
    longest = max(map(len, prompts))
    pad = fused.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def until_end(fused, ids):
    """What is generated up to the first end, which is kept."""
    ends = fused.config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    for count, token in enumerate(ids, start=1):
        if token in ends:
            return ids[:count]
    return ids


def check_same(fused, prompts, outputs, wanted, most=0):
    """vLLM's tokens are the transformers engine's; rows may part only at close calls, which are counted: `most`."""
    assert len(outputs) == len(wanted) == len(prompts)
    close = 0
    for prompt, output, theirs in zip(prompts, outputs, wanted, strict=True):
        ours = list(output.outputs[0].token_ids)
        if ours != theirs:
            close += 1
            pair = torch.tensor([ours]), torch.tensor([theirs])
            check_same_tokens(fused, *pair, padded(fused, [prompt]), most=1)
    assert close <= most, f"{close} of {len(prompts)} rows part at close calls"
    assert sum(map(len, wanted)) > len(prompts), "hardly anything was generated"
