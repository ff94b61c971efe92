"""An engine as it is started on its own: `python separately.py JOB`, a file of JSON; token ids as JSON at the end.

{"directory": ..., "options": {...}, "prompts": [[1, 2], ...], "max_tokens": 24}
"""

import json
import sys
from pathlib import Path

MARK = "TOKENS "


def main():
    from gathering import without_gather
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(job["directory"], dtype="float32", max_model_len=128, max_num_seqs=16, **job["options"])
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
    found = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if job["options"].get("tensor_parallel_size", 1) > 1:
        found["gathered"] = llm.apply_model(without_gather)
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")  # on a line of its own: a progress bar may end without one
    sys.stdout.flush()  # heard even if the engine hangs at its end


if __name__ == "__main__":
    main()
