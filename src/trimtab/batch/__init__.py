"""Many rows, each answered once, through kills and crashes: a journal beside the output, workers on Ray or in-process.

`run` in `runner.py` knows nothing of models; `job.py` runs OpenAI request files on a fused directory with it.
"""
