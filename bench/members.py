"""Members of real behaviour and real cost: zoo models inflated until the strong one costs so many times a small one.

Numbers are bfloat16 by default, as real models are stored. On the CPUs seen, a float32 matrix times two to sixteen
columns takes about twice as long as times one, whatever the matrix, while bfloat16 takes the same time: reading the
weights then decides, as on accelerators. `forward_ms` in every case shows how it is on the machine at hand.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.inflation import count_parameters, inflate_, least_parameters
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.logits.forward.groups import ForwardGroup
from trimtab.models.opening import quiet_bars
from trimtab.zoo import TASKS, Split, load_items, resolve

CONTEXT = 1024  # positions that inflated models may read; from 256 on they were never trained
STRONG_BLOCKS, SMALL_BLOCKS = 10, 4  # on top of six and two: few enough that starting operations does not decide
PROBE_TOKENS = (1, 2, 3, 5, 9, 17)  # one token, and what drafts of 1, 2, 4, 8 and 16 tokens make the strong model read
ANSWER_TOKENS = 16  # for tasks whose items are choices


@dataclass(frozen=True)
class Spec:
    """Which members, and how they cost.

    strong_parameters   of the inflated strong model
    ratio               how many times a small member's step the strong one's takes; sizes are measured to fit
    small_parameters    a size to take instead
    experts             tasks that experts were tuned on
    is_lora             experts are adapters on the base; False: models of their own
    """

    strong_parameters: int
    ratio: float
    experts: tuple[str, ...] = ("arithmetic",)
    is_lora: bool = False
    small_parameters: int | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"


@dataclass
class MemberSet:
    """The same members three times over: alone, as the published loops read them, and fused.

    base, experts   models of their own; adapters are merged into copies of the base
    fused           strong, base and experts as one model; shares the strong model, and full experts, with the others
    facts           sizes and step times as measured
    """

    strong: Any
    base: Any
    experts: dict[str, Any]
    fused: FusedCausalLM
    tokenizer: Any
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> list[Any]:
        """Every model that is not the strong one, each once."""
        models = [self.base, *self.experts.values(), *(member.model for member in self.fused.members)]
        return list({id(model): model for model in models if model is not self.strong}.values())


class MemberFactory:
    """Makes members; strong models, which take long, are kept."""

    def __init__(self) -> None:
        self._strong: dict[Any, Any] = {}
        self._sizes: dict[Any, int] = {}

    def make(self, spec: Spec) -> MemberSet:
        """Members of this cost; the ratio is set by measurement, and measured again."""
        strong = self.strong(spec)
        size = self._small_size(spec)
        base = small_model("small", size, spec)
        kind = "-lora" if spec.is_lora else ""
        plain = {task: small_model(f"small/{task}{kind}", size, spec) for task in spec.experts}
        tokenizer = load_tokenizer()
        fused = fuse_adapters(strong, size, spec, tokenizer) if spec.is_lora else fuse(strong, base, plain, tokenizer)
        member_set = MemberSet(strong, base, plain, fused, tokenizer)
        member_set.facts = self._facts(spec, member_set)
        return member_set

    def strong(self, spec: Spec) -> Any:
        """The strong model, made once per size."""
        key = (spec.strong_parameters, spec.dtype, spec.device)
        if key not in self._strong:
            self._strong[key] = strong_model(spec)
        return self._strong[key]

    def _small_size(self, spec: Spec) -> int:
        """Parameters at which a small member's step takes 1/ratio of the strong one's: on a line through two sizes."""
        if spec.small_parameters is not None:
            return spec.small_parameters
        key = (spec.strong_parameters, spec.ratio, spec.dtype, spec.device)
        if key not in self._sizes:
            # A little smaller than wanted, so that "at least so many times the cost" holds after rounding.
            wanted = step_seconds(self.strong(spec)) / spec.ratio / 1.1
            self._sizes[key] = size_for(wanted, lambda size: step_seconds(small_model("small", size, spec)), spec)
        return self._sizes[key]

    def _facts(self, spec: Spec, member_set: MemberSet) -> dict[str, Any]:
        strong, base = step_seconds(member_set.strong), step_seconds(member_set.base)
        return {
            "strong_parameters": count_parameters(member_set.strong),
            "small_parameters": count_parameters(member_set.base),
            "strong_step_ms": round(strong * 1e3, 3),
            "small_step_ms": round(base * 1e3, 3),
            "measured_ratio": round(strong / base, 2),
            "forward_ms": {str(n): round(step_seconds(member_set.strong, n) * 1e3, 2) for n in PROBE_TOKENS},
        }


def size_for(wanted: float, seconds_of: Callable[[int], float], spec: Spec) -> int:
    """Parameters of a small member whose step takes `wanted` seconds.

    raises    BadSetting where even the smallest one takes longer
    """
    least = least_parameters(load_member("small", spec.dtype, spec.device), SMALL_BLOCKS)
    sizes = (least, max(4 * least, spec.strong_parameters // 20))
    low, high = (seconds_of(size) for size in sizes)
    if wanted < low:
        raise BadSetting(
            f"a small member of {least:,} parameters takes {low * 1e3:.2f} ms a step, {wanted * 1e3:.2f} are wanted.",
            "A step costs its overhead, however small the model.",
            f"a strong model of more than {spec.strong_parameters:,} parameters, or a ratio below {spec.ratio:g}.",
        )
    slope = (high - low) / (sizes[1] - sizes[0])
    if slope <= 0:
        raise BadSetting(
            f"a small member of {sizes[1]:,} parameters was as fast as one of {sizes[0]:,}.",
            "Step times that grow with the size; something else disturbed them.",
            "measure on a quiet machine.",
        )
    return min(int(least + (wanted - low) / slope), spec.strong_parameters)


def adapted_model(task: str, parameters: int, spec: Spec) -> Any:
    """A base of this size that carries one adapter, on its new blocks, too."""
    import peft

    base = load_member("small", spec.dtype, spec.device)
    with quiet_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(base, str(resolve(f"small/{task}-lora")))
    return _inflated(base, parameters, SMALL_BLOCKS)


def random_model(like: str, vocabulary: int, parameters: int, seed: int) -> Any:
    """A random Llama of the zoo's shape with another vocabulary, inflated as far as its embeddings leave room.

    like    "strong" or "small"
    """
    config = AutoConfig.from_pretrained(resolve(like))
    config.vocab_size = vocabulary
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    blocks = STRONG_BLOCKS if like == "strong" else SMALL_BLOCKS
    return _inflated(model, max(parameters, least_parameters(model, blocks)), blocks)


def strong_model(spec: Spec) -> Any:
    """The strong model of the zoo, inflated."""
    return _inflated(load_member("strong", spec.dtype, spec.device), spec.strong_parameters, STRONG_BLOCKS)


def load_tokenizer() -> Any:
    """The zoo's, for batches padded on the left and texts as long as inflated models may read."""
    return AutoTokenizer.from_pretrained(resolve("tokenizer"), padding_side="left", model_max_length=CONTEXT)


def small_model(name: str, parameters: int, spec: Spec) -> Any:
    """A small member of the zoo, inflated; an adapter is merged into its base first."""
    if not name.endswith("-lora"):
        return _inflated(load_member(name, spec.dtype, spec.device), parameters, SMALL_BLOCKS)
    import peft

    with quiet_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks concern training
        base = load_member("small", spec.dtype, spec.device)
        merged = peft.PeftModel.from_pretrained(base, str(resolve(name))).merge_and_unload()
    return _inflated(merged, parameters, SMALL_BLOCKS)


def load_member(name: str, dtype: str, device: str = "cpu") -> Any:
    """A model of the zoo as it is."""
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)


def _inflated(model: Any, parameters: int, blocks: int) -> Any:
    inflate_(model, parameters, blocks)
    model.config.max_position_embeddings = CONTEXT  # rotary positions are computed, not stored
    return model


def fuse(strong: Any, base: Any, experts: Mapping[str, Any], tokenizer: Any) -> FusedCausalLM:
    """Ours, of loaded members."""
    return FusedCausalLM.from_members(strong, base, experts, "dynamic", tokenizer)


def fuse_adapters(strong: Any, size: int, spec: Spec, tokenizer: Any) -> FusedCausalLM:
    """Fused with a base that carries all adapters, also on its new blocks, as an adapted model of that size would."""
    base = load_member("small", spec.dtype, spec.device)
    with quiet_bars():
        fused = fuse(strong, base, {task: f"zoo:small/{task}-lora" for task in spec.experts}, tokenizer)
    _inflated(base, size, SMALL_BLOCKS)
    for switch in fused.members.switches.values():
        switch.refresh()
    fused.one_pass = fused.one_pass  # the joint forward is made anew, of the base as it is now
    return fused


# ---- what one forward costs


PAST = 64  # tokens that were read before


class Stepper:
    """Cached forwards of one row, one after the other, for a plain model and a fused one alike."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ids = torch.arange(2, 2 + PAST, device=model.device).unsqueeze(0)
        self._cache: Any = None
        self._read(PAST)

    def seconds(self, tokens: int = 1) -> float:
        """Wall time of one forward of so many tokens."""
        started = time.perf_counter()
        self._read(tokens)
        return time.perf_counter() - started

    @torch.inference_mode()
    def _read(self, tokens: int) -> None:
        ids = self._ids[:, :tokens]
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        synchronise(self._model.device)


def step_seconds(model: Any, tokens: int = 1, repeats: int = 12) -> float:
    """Median seconds of one cached forward of so many tokens."""
    stepper = Stepper(model)
    seconds = [stepper.seconds(tokens) for _ in range(repeats + 2)]
    return statistics.median(seconds[2:])


def synchronise(device: Any) -> None:
    """Waits for an accelerator; the CPU has no queue."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Wall time between its opening and its closing, an accelerator's queue included."""

    def __init__(self, device: Any) -> None:
        self._device, self._started, self.seconds = device, 0.0, 0.0

    def __enter__(self) -> "Stopwatch":
        synchronise(self._device)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronise(self._device)
        self.seconds = time.perf_counter() - self._started


class Meter:
    """Counts forwards, the tokens they read, and the seconds they take, while it is open.

        with Meter({"strong": [strong], "small": [base, expert]}) as meter: ...
        with Meter({"small": fused.reader.groups[1:]}) as meter: ...

    What is watched is a model, or a forward_group of a fused one: models that are read in one forward take no hooks.

    On an accelerator the seconds are those in which a forward was queued, not those in which it ran.
    """

    def __init__(self, groups: Mapping[str, Sequence[Any]]) -> None:
        self.calls = dict.fromkeys(groups, 0)
        self.tokens = dict.fromkeys(groups, 0)
        self.seconds = dict.fromkeys(groups, 0.0)
        self._groups, self._hooks, self._forward_groups, self._started = groups, list[Any](), list[ForwardGroup](), 0.0

    def __enter__(self) -> "Meter":
        for group, watched in self._groups.items():
            for one in watched:
                if isinstance(one, ForwardGroup):
                    vars(one)["read"] = self._watched_read(group, one)
                    self._forward_groups.append(one)
                    continue
                before, after = self._watchers(group)
                self._hooks.append(one.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(one.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for forward_group in self._forward_groups:
            del vars(forward_group)["read"]

    def _watched_read(self, group: str, forward_group: ForwardGroup) -> Callable[..., Any]:
        read = forward_group.read

        def watched(feeds: Any, *more: Any, **named: Any) -> Any:
            self.calls[group] += 1
            self.tokens[group] += sum(feed.input_ids.numel() for feed in feeds)
            started = time.perf_counter()
            logits = read(feeds, *more, **named)
            self.seconds[group] += time.perf_counter() - started
            return logits

        return watched

    def _watchers(self, group: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_: Any, words: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            ids = named["input_ids"] if named.get("input_ids") is not None else words[0]
            self.calls[group] += 1
            self.tokens[group] += ids.numel()
            self._started = time.perf_counter()

        def after(*_: Any) -> None:
            self.seconds[group] += time.perf_counter() - self._started

        return before, after


# ---- what is read


def prompts_of(tasks: Sequence[str], count: int, start: int = 0, split: Split = "test") -> list[str]:
    """Prompts of a split, the tasks in turn; `start` counts prompts from the file's beginning and wraps around."""
    items = {task: load_items(task, split) for task in tasks}
    places = [(task, n // len(tasks)) for n in range(start, start + count) for task in [tasks[n % len(tasks)]]]
    return [items[task][place % len(items[task])].prompt for task, place in places]


def long_prompts(
    tasks: Sequence[str], count: int, start: int = 0, solved: int = 64, split: Split = "test"
) -> list[str]:
    """Prompts with solved items of the same tasks before them, for prompts of a fixed number of tokens."""
    texts = []
    for number, prompt in enumerate(prompts_of(tasks, count, start, split), start=start):
        examples = load_items(tasks[number % len(tasks)], "validation")
        shown = [examples[(number * solved + k) % len(examples)] for k in range(solved)]
        texts.append("".join(f"{item.prompt}{item.target}\n" for item in shown) + prompt)
    return texts


def encode(tokenizer: Any, texts: Sequence[str], tokens: int | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Input ids and mask [batch, time], padded on the left; with `tokens`, the last so many of each text.

    raises    BadSetting where a text has fewer tokens
    """
    if tokens is None:
        found = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}
    rows = [tokenizer(text, verbose=False)["input_ids"][-tokens:] for text in texts]
    shortest = min(len(row) for row in rows)
    if shortest < tokens:
        raise BadSetting(f"a prompt has {shortest} tokens.", f"Expected: {tokens}.", "put more examples before it.")
    ids = torch.tensor(rows, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer_tokens(tasks: Sequence[str]) -> int:
    """New tokens that an answer may have: the longest among the tasks."""
    return max(TASKS[task].max_new_tokens or ANSWER_TOKENS for task in tasks)
