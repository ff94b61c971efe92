"""Steps of one model in vLLM's engine, with so many rows at every step, by the engine's own clock.

A small model is faster than HTTP and its clients: a server of it never has as many rows together as the strong model's.
So its step is measured behind no server, in the same engine: a process of its own that schedules, runs and samples.

    python -m bench.served_steps DIR --tokenizer DIR --rows 4 16 --repeats 3

JSON on stdout: {"4": [{"engine_itl_ms": ..., "tokens_per_second": ...}, ...], "16": [...]}
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import served, traffic
from bench.harness import Record
from bench.served import BETWEEN_TOKENS, Cores
from bench.served_members import EXPERT
from trimtab.core.errors import TrimtabError

TOKENS, WARM_UP_TOKENS = 96, 8  # of every row's answer
MARK = "STEPS "
MINUTES = 5


def measured(model: Path, tokenizer: Path, rows: Sequence[int], repeats: int, cores: Cores) -> dict[int, list[Record]]:
    """Number of rows -> a record of every repeat, from an engine whose model runs on the engine's cores.

    raises    TrimtabError with the end of what it said, where it says no figures
    """
    words = [served.tool("python"), "-m", "bench.served_steps", str(model), "--tokenizer", str(tokenizer)]
    words += ["--repeats", str(repeats), "--rows", *map(str, rows)]
    with served.on(cores.others):  # inherited; the engine binds its model's threads itself
        try:
            done = subprocess.run(
                words, env=served.environment(cores), capture_output=True, text=True, timeout=60 * MINUTES, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TrimtabError(
                f"steps of {model} were not measured within {MINUTES} minutes.", fix="measure on a quiet machine."
            ) from error
    said = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not said:
        end = "\n".join(done.stderr.splitlines()[-served.SHOWN_LINES :])
        raise TrimtabError(
            f"steps of {model} could not be measured.", f"The end of what was said:\n{end}", "mend what it says there."
        )
    return {int(number): records for number, records in json.loads(said[0]).items()}


def main(words: Sequence[str] | None = None) -> None:
    """Measures in this environment, on the cores that it names."""
    parser = argparse.ArgumentParser(prog="python -m bench.served_steps", description="Steps of a model in vLLM.")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of its tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="rows together at every step")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    asked = parser.parse_args(words)
    engine = _engine(asked.model, asked.tokenizer, max(asked.rows))
    found = {rows: [_run(engine, rows, seed) for seed in range(asked.repeats)] for rows in asked.rows}
    sys.stdout.write(f"{MARK}{json.dumps(found)}\n")


def _engine(model: Path, tokenizer: Path, rows: int) -> Any:
    from vllm import LLM

    told: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": rows}
    return LLM(str(model), tokenizer=str(tokenizer), disable_log_stats=False, **told)


def _run(engine: Any, rows: int, seed: int) -> Record:
    """All rows begin together and none ends before the others, so that every step has them all."""
    prompts = [job.prompt for job in traffic.jobs_of(EXPERT, rows, float("inf"), seed)]
    _answer(engine, prompts, WARM_UP_TOKENS)  # kernels for this number of rows are made then
    seconds, waits = _clock(engine)
    _answer(engine, prompts, TOKENS)
    now, count = _clock(engine)
    step = (now - seconds) / (count - waits)
    return {"engine_itl_ms": 1e3 * step, "tokens_per_second": rows / step}


def _answer(engine: Any, prompts: Sequence[str], tokens: int) -> None:
    from vllm import SamplingParams

    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)


def _clock(engine: Any) -> tuple[float, int]:
    """Seconds between tokens until now, and how many such waits there were."""
    (histogram,) = (metric for metric in engine.get_metrics() if metric.name == BETWEEN_TOKENS)
    return histogram.sum, histogram.count


if __name__ == "__main__":
    main()
