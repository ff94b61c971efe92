"""lm-evaluation-harness over HTTP (`local-completions`): the scores of the local run, item by item."""

import logging

import pytest
from servers import KEY

from trimtab.logits.lm_eval import TrimtabLM
from trimtab.measure.lm_eval_export import write_tasks
from trimtab.zoo.tasks import TASKS, load_items

ITEMS = 8


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task that scores choices by log-likelihood, as lm-eval's YAML over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    name = next(name for name, task in TASKS.items() if task.kind == "choose")
    written = write_tasks(folder, {name: TASKS[name]}, {name: load_items(name, limit=ITEMS)})
    return folder, written[name]


def scores_of(model, tasks):
    """(every log-likelihood of every item, what the task makes of them)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, name = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples], found["results"][name]


def test_log_likelihoods_are_those_of_the_local_run(server, directory, fused, tasks, monkeypatch) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    served = LocalCompletionsAPI(
        base_url=f"{server.url}/completions",
        model="zoo",
        tokenizer=str(directory),
        tokenizer_backend="huggingface",
        max_length=256,
        num_concurrent=4,
    )
    over_http, told = scores_of(served, tasks)
    here, wanted = scores_of(TrimtabLM(fused, batch_size=8), tasks)
    assert len(here) == ITEMS
    assert len({len(item) for item in here}) == 1
    for ours, theirs in zip(over_http, here, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert {k: v for k, v in told.items() if "acc" in k} == {k: v for k, v in wanted.items() if "acc" in k}
