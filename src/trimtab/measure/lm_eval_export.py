"""Items as tasks of lm-evaluation-harness: YAML files beside the data they name, so that `lm_eval` itself can run them.

The files hold absolute paths, so they are written where they are used: `trimtab eval` writes them for each run, and
`trimtab eval --write-tasks DIR` keeps them, for `lm_eval --include_path DIR --tasks zoo_facts ...`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.measure.evaluate import Item, Task

PREFIX = "zoo_"
EXAMPLES = "examples"  # the split that few-shot examples come from
SCORES = '''"""The scores of trimtab, as lm-evaluation-harness calls them."""

from trimtab.measure.scores import ANSWER_METRICS


def exact_match(doc, results):
    return {"exact_match": ANSWER_METRICS["exact_match"](results[0], doc["target"])}


def rouge2(doc, results):
    return {"rouge2": ANSWER_METRICS["rouge2"](results[0], doc["target"])}
'''


def write_tasks(
    folder: Path,
    tasks: Mapping[str, Task],
    items: Mapping[str, Sequence[Item]],
    examples: Mapping[str, Sequence[Item]] | None = None,
) -> dict[str, str]:
    """Write a YAML file and a JSONL file per task into `folder`; returns task -> its name in the harness.

    examples    {task: items that few-shot examples are drawn from}; None: the harness draws them from the test items
    """
    folder, examples = folder.resolve(), examples or {}
    (folder / "zoo_scores.py").write_text(SCORES, encoding="utf-8")
    for name, chosen in items.items():
        _write_items(folder / f"{PREFIX}{name}.jsonl", chosen)
        if name in examples:
            _write_items(folder / f"{PREFIX}{name}-{EXAMPLES}.jsonl", examples[name])
        text = _yaml(folder, tasks[name], has_examples=name in examples)
        (folder / f"{PREFIX}{name}.yaml").write_text(text, encoding="utf-8")
    return {name: f"{PREFIX}{name}" for name in items}


def _write_items(file: Path, items: Sequence[Item]) -> None:
    lines = [json.dumps(_record(item), ensure_ascii=False) for item in items]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _record(item: Item) -> dict[str, Any]:
    parts: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "target": item.target}
    if item.choices is not None:
        parts |= {"choices": list(item.choices), "label": item.label}
    return parts


def _yaml(folder: Path, task: Task, has_examples: bool) -> str:
    """JSON is YAML, so values are written as JSON; only the function needs YAML's own tag."""
    metric = "acc" if task.kind == "choose" else task.metric
    splits = {"test": str(folder / f"{PREFIX}{task.name}.jsonl")}
    if has_examples:
        splits[EXAMPLES] = str(folder / f"{PREFIX}{task.name}-{EXAMPLES}.jsonl")
    lines = {
        "task": f"{PREFIX}{task.name}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": splits,
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    if has_examples:
        lines["fewshot_split"] = EXAMPLES
    if task.kind == "choose":
        lines |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    else:
        until = {"until": ["\n"], "do_sample": False, "max_gen_toks": task.max_new_tokens}
        lines |= {"output_type": "generate_until", "doc_to_target": "target", "generation_kwargs": until}
    written = [f"{key}: {json.dumps(value)}" for key, value in lines.items()]
    if task.kind != "choose":
        written.append(f"process_results: !function zoo_scores.{task.metric}")
    return "\n".join(written) + "\n"
