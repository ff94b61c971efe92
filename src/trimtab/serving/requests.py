"""What one request may set about the fusion, by name and number: how far the strong model is moved, and by whom.

    {"alpha": 0.5}             half of the strategy's shift; 0 is the strong model
    {"expert": "facts"}        one expert speaks; {"experts": ["facts", "math"]}: only these may
    {"alpha_max": 1.0}         any number that the strategy has as a setting
    {"trace": 1}               what happened at each token is kept, to be asked for

Nothing here knows vLLM. A request comes as the `vllm_xargs` of its body, so values are texts, numbers or lists of them.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from trimtab.core.errors import BadSetting, unknown_name
from trimtab.core.settings import Setting, settings_of
from trimtab.logits.strategy.fusion import Strategy, every_setting, make_strategy

SETTINGS_OF_ALL = ("alpha", "expert", "experts", "trace")  # whatever the strategy
LARGEST_SCALE = 10.0  # as for the alphas of strategies
OF_THE_ENGINE = ("kv_transfer_params", "ec_transfer_params")  # objects that vLLM itself puts beside our settings
LARGEST_NUMBER = sys.float_info.max
STRATEGIES_KEPT = 1024  # distinct settings whose strategies are remembered


@dataclass(frozen=True)
class RequestSettings:
    """One request's own settings; the defaults leave the directory's strategy as it is.

    alpha       factor of the shift: log p + alpha (log p_fused - log p), normalised. Where the strategy has an alpha of
                its own, this multiplies it
    experts     those that may speak, in the order of the directory; empty: all
    numbers     settings of the strategy by name, sorted
    trace       a key under which each token's alphas are kept; None: they are not
    """

    alpha: float = 1.0
    experts: tuple[str, ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    trace: str | None = None

    def strategy(self, present: Strategy) -> Strategy:
        """The strategy of this request, over its own experts only; what is not set stays that of `present`."""
        if not self.experts and not self.numbers:
            return present
        return _strategy(_described(present), present.expert_names, self.experts, self.numbers)


NOTHING_SET = RequestSettings()


def numbers_of(present: Strategy) -> dict[str, Setting]:
    """The settings of a strategy that a request may change: those that are numbers.

    A fixed alpha is not among them: `alpha` scales it.
    """
    return _numbers_among((*settings_of(present.amount), *settings_of(present.chooser)))


def _numbers_among(items: Iterable[Setting]) -> dict[str, Setting]:
    return {item.name: item for item in items if item.is_number and item.name != "alpha"}


@cache
def names_of_settings() -> tuple[str, ...]:
    """What a request may set with one strategy or another."""
    return (*SETTINGS_OF_ALL, *_numbers_among(every_setting()))


def read_settings(given: Mapping[str, Any] | None, present: Strategy) -> RequestSettings:
    """A request's settings, checked.

    given     the `vllm_xargs` of its body
    present   the directory's strategy, with the names of its experts
    raises    UnknownName, naming what is known; BadSetting for values out of range, of the wrong type, or that this
              strategy cannot take
    """
    if not given:
        return NOTHING_SET
    numbers = numbers_of(present)
    known = {*SETTINGS_OF_ALL, *numbers}
    for name in given:
        is_engines = name in OF_THE_ENGINE and isinstance(given[name], Mapping)
        if name not in known and not is_engines:
            raise unknown_name("setting of a request", str(name)[:100], known)
    if "expert" in given and "experts" in given:
        raise BadSetting("both 'expert' and 'experts' were given.", "They mean the same.", "give one of them.")
    asked = given.get("experts", given.get("expert"))
    settings = RequestSettings(
        alpha=_number("alpha", given.get("alpha", 1.0), 0.0, LARGEST_SCALE),
        experts=() if asked is None else _experts(asked, present),
        numbers=tuple(sorted((name, _within(numbers[name], given[name])) for name in numbers if name in given)),
        trace=_trace(given.get("trace")),
    )
    settings.strategy(present)  # raises where the strategy cannot take them
    return settings


def _within(item: Setting, value: Any) -> float:
    low = -LARGEST_NUMBER if item.low is None else item.low
    _number(item.name, value, low, LARGEST_NUMBER if item.high is None else item.high)
    return item.read(value)  # type: ignore[no-any-return]


def _number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # comparing is safe for any whole number, and false for NaN
        raise BadSetting(
            f"'{name}' is {_shown(value)}.",
            f"Expected: a number from {low:g} to {high:g}.",
            f'for example "{name}": 1.',
        )
    return float(value)


def _experts(asked: Any, present: Strategy) -> tuple[str, ...]:
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadSetting(
            f"the experts are {_shown(asked)}.",
            f"Expected: a name, or a list of names; known: {', '.join(present.expert_names)}.",
            f'for example "expert": "{present.expert_names[0]}".' if present.expert_names else "",
        )
    for name in names:
        if name not in present.expert_names:
            raise unknown_name("expert", name[:100], present.expert_names)
    if not present.amount.uses_experts:
        raise BadSetting(
            "the strategy of this model uses no expert.", "With it no expert speaks.", "leave 'expert' out."
        )
    return tuple(name for name in present.expert_names if name in names)


def _trace(value: Any) -> str | None:
    if value is None or value in (0, "0", "false"):
        return None
    if value in (1, "1", "true"):
        return ""  # whoever hands the request on gives it a name
    if isinstance(value, str) and value.startswith(TRACE_KEY):
        return value
    raise BadSetting(f"'trace' is {_shown(value)}.", "Expected: 1 or 0.", 'for example "trace": 1.')


TRACE_KEY = "trimtab:"  # what a request's trace is kept under, in the engine, begins so
SEVERAL = "*"  # and ends so where the request asks for several choices


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _described(present: Strategy) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    content = present.to_dict()
    settings = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in content["settings"].items()}
    return content["amount"], content["chooser"], tuple(settings.items())


@lru_cache(maxsize=STRATEGIES_KEPT)
def _strategy(
    described: tuple[str, str, tuple[tuple[str, Any], ...]],
    names: tuple[str, ...],
    experts: tuple[str, ...],
    numbers: tuple[tuple[str, float], ...],
) -> Strategy:
    amount, chooser, present = described
    settings = {name: dict(value) if isinstance(value, tuple) else value for name, value in present}
    strategy = make_strategy(amount, chooser, names, **settings).narrowed(experts or names)
    return strategy.changed(**dict(numbers)) if numbers else strategy
