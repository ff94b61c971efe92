"""The zoo's models of one pair, ready for a study: each loaded once, fused as the study asks."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab import zoo
from trimtab.measure.study import Panel, Spec
from trimtab.zoo import Item, Task

SMALL_OF = {"far": "small", "close": "medium"}  # pair -> the small model
NUM_SHOTS = 3


def member_names(pair: str, tuned_tasks: Sequence[str]) -> dict[str, str]:
    """Role in the study -> name in the zoo."""
    small = SMALL_OF[pair]
    names = {"strong": "strong", "base": small, "mixed": f"{small}/mixed", "ceiling/mixed": "strong/mixed"}
    for task in tuned_tasks:
        names[f"expert/{task}"] = f"{small}/{task}"
        names[f"ceiling/{task}"] = f"strong/{task}"
    return names


def load_panel(pair: str, tuned_tasks: Sequence[str]) -> Panel:
    """All models of a pair in float32, and how to fuse them."""
    from trimtab.cli.options import quiet_transformers
    from trimtab.logits.model import FusedCausalLM
    from trimtab.logits.strategy.fusion import make_strategy

    quiet_transformers()
    models = {role: load_alone(name) for role, name in member_names(pair, tuned_tasks).items()}
    tokenizer = load_tokenizer()

    def fuse(experts: tuple[str, ...]) -> Any:
        tuned = {name: models[f"expert/{name}"] for name in experts}
        return FusedCausalLM.from_members(models["strong"], models["base"], tuned, tokenizer=tokenizer)

    def strategy(spec: Spec, experts: tuple[str, ...]) -> Any:
        return make_strategy(spec.amount, chooser=spec.chooser, expert_names=experts, **spec.settings)

    return Panel(models, tokenizer, fuse, strategy)


def load_alone(name: str) -> Any:
    """One model of the zoo by itself; an adapter is merged into its own copy of what it sits on."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = zoo.resolve(f"zoo:{name}")
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from peft import PeftModel

    under = load_alone(name.partition("/")[0])
    with warnings.catch_warnings():
        # peft asks a transformers property of its old name; nothing here depends on the answer.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return PeftModel.from_pretrained(under, str(folder)).merge_and_unload().eval()


def load_tokenizer() -> Any:
    """The tokenizer that all models of the zoo share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo.resolve("zoo:tokenizer"))


def draw_items(tasks: Sequence[str], limit: int, seed: int) -> dict[str, list[Item]]:
    """Test items of each task; another seed draws others."""
    return {task: zoo.load_items(task, "test", limit=limit, seed=seed) for task in tasks}


def solved_examples(
    tokenizer: Any, tasks: Mapping[str, Task], items: Mapping[str, Sequence[Item]], context: int
) -> dict[str, str]:
    """Task -> solved training questions to put before a prompt: up to three, as many as the context holds.

    They show the style that is asked for, so that the strong model's answers tell what it knows.
    """
    found = {}
    for name, chosen in items.items():
        room = context - tasks[name].max_new_tokens - max(len(tokenizer(longest(item))["input_ids"]) for item in chosen)
        examples = zoo.load_items(name, "train", limit=NUM_SHOTS)
        while examples and len(tokenizer(prefix_of(examples))["input_ids"]) > room:
            examples = examples[:-1]
        if examples:
            found[name] = prefix_of(examples)
    return found


def longest(item: Item) -> str:
    """The longest text that is read for an item."""
    return item.prompt + max(item.choices or ("",), key=len)


def prefix_of(examples: list[Item]) -> str:
    """What `zoo.few_shot` puts before a prompt."""
    empty = Item(id="", task="", prompt="", target="")
    return dataclasses.replace(zoo.few_shot(empty, examples)).prompt
