"""One answer against one target: the three metrics that the tasks name, each in [0, 1].

Sources: exact match of the number after the last `####`, Cobbe et al. 2021 (GSM8K); ROUGE-2, Lin 2004, by Google's
`rouge_score` without stemming.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

FINAL_MARK = "####"


def first_line(text: str) -> str:
    """The answer proper: what stands before the first line break, without spaces around it."""
    return text.strip(" ").split("\n", 1)[0].strip()


def final_number(text: str) -> str | None:
    """The number after the last `####`, digits only (spaces and thousands commas dropped); None where there is none."""
    _, mark, tail = text.rpartition(FINAL_MARK)
    found = re.search(r"-?\d+(?:\.\d+)?", tail.split("\n", 1)[0].replace(" ", "").replace(",", "")) if mark else None
    return found.group() if found else None


def exact_match(answer: str, target: str) -> float:
    """1 where the answer is right: the same final number if the target has one, else the same first line."""
    if FINAL_MARK in target:
        return float(final_number(answer) == final_number(target))
    return float(first_line(answer) == first_line(target))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge2"], use_stemmer=False)


def rouge2(answer: str, target: str) -> float:
    """F1 of the word pairs that answer and target share."""
    return float(_rouge_scorer().score(first_line(target), first_line(answer))["rouge2"].fmeasure)


ANSWER_METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "rouge2": rouge2}
