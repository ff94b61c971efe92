"""The zoo's models of one pair, ready for a study: each loaded once, alone or fused as a condition asks."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab import zoo
from trimtab.measure.evaluate import Subject
from trimtab.zoo import Item, Task

SMALL_OF = {"far": "small", "close": "medium"}  # pair -> the small model
SIZE_OF = {"far": "about 0.3 M parameters", "close": "about 1.5 M parameters"}  # of the small model
NUM_SHOTS = 3


@dataclass(frozen=True)
class Fused:
    """A strategy by name: what `make_strategy` is called with."""

    amount: str
    chooser: str = "joint_objective"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyModels:
    """The models of one pair, loaded.

    models     "base", "strong", "mixed" (the small one tuned on everything), "ceiling/mixed", and for each tuned task
               "expert/TASK" and "ceiling/TASK"
    """

    models: dict[str, Any]
    tokenizer: Any

    @property
    def context(self) -> int:
        """Tokens that the strong model may read."""
        return int(self.models["strong"].config.max_position_embeddings)

    def alone(self, role: str, prefix: str = "") -> Subject:
        """One model by itself."""
        return Subject(role, lambda: self.models[role], (role,), prefix=prefix)

    def fused(self, spec: Fused, experts: Sequence[str]) -> Subject:
        """strong + base + the experts of these names, by a strategy."""
        names = tuple(experts)
        strategy = self.strategy(spec, names)

        def set_strategy(model: Any) -> None:
            model.strategy = strategy

        def combine(strong: Any, base: Any, *tuned: Any) -> Any:
            import torch

            return strategy(strong, base, torch.stack(tuned)).log_probs

        roles = ("strong", "base", *(f"expert/{name}" for name in names))
        return Subject(("fused", names), lambda: self.fuse(names), roles, set_strategy, combine)

    def fuse(self, experts: Sequence[str]) -> Any:
        """The fused model itself."""
        from trimtab.logits.model import FusedCausalLM

        tuned = {name: self.models[f"expert/{name}"] for name in experts}
        return FusedCausalLM.from_members(self.models["strong"], self.models["base"], tuned, tokenizer=self.tokenizer)

    def strategy(self, spec: Fused, experts: Sequence[str]) -> Any:
        """A strategy for experts of these names."""
        from trimtab.logits.strategy.fusion import make_strategy

        return make_strategy(spec.amount, chooser=spec.chooser, expert_names=tuple(experts), **spec.settings)


def member_names(pair: str, tuned_tasks: Sequence[str]) -> dict[str, str]:
    """Role in the study -> name in the zoo."""
    small = SMALL_OF[pair]
    names = {"strong": "strong", "base": small, "mixed": f"{small}/mixed", "ceiling/mixed": "strong/mixed"}
    for task in tuned_tasks:
        names[f"expert/{task}"] = f"{small}/{task}"
        names[f"ceiling/{task}"] = f"strong/{task}"
    return names


def load_models(pair: str, tuned_tasks: Sequence[str] = zoo.TUNED_TASKS) -> StudyModels:
    """All models of a pair in float32."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # loading reports are not for users of a study; errors are
    logging.disable_progress_bar()
    return StudyModels(
        {role: load_alone(name) for role, name in member_names(pair, tuned_tasks).items()}, load_tokenizer()
    )


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


def draw_items(tasks: Sequence[str], limit: int, seeds: Sequence[int]) -> dict[int, dict[str, list[Item]]]:
    """Seed -> test items of each task; another seed draws others."""
    return {seed: {task: zoo.load_items(task, "test", limit=limit, seed=seed) for task in tasks} for seed in seeds}


def distinct(draws: Mapping[int, Mapping[str, Sequence[Item]]]) -> tuple[dict[str, list[Item]], dict[str, int]]:
    """All items of some draws, each once: task -> items, and item id -> the first seed that drew it."""
    seeds: dict[str, int] = {}
    items: dict[str, dict[str, Item]] = {}
    for seed, by_task in draws.items():
        for task, drawn in by_task.items():
            for item in drawn:
                seeds.setdefault(item.id, seed)
                items.setdefault(task, {}).setdefault(item.id, item)
    return {task: list(by_id.values()) for task, by_id in items.items()}, seeds


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
