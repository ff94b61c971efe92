"""Stop texts in what was generated, and only there: a prompt that ends in half a stop text stops nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

SLACK_TOKENS = 8  # that decode to nothing, or to a part of a character


@dataclass(frozen=True)
class Stop:
    """A stop text that was completed.

    tokens   how many tokens were there then
    behind   characters from where the stop text begins to the end of the text then
    """

    text: str
    tokens: int
    behind: int


def ended_by(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> Stop | None:
    """The stop text that the last token completed; None where there is none."""
    # A token holds a byte at least, so a stop text lies within as many tokens as it has bytes.
    tail = ids[-(max(len(stop.encode(errors="replace")) for stop in stops) + SLACK_TOKENS) :]
    before, now = (tokenizer.decode(part, skip_special_tokens=True) for part in (tail[:-1], tail))
    old = next((at for at, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), len(before))
    for stop in stops:
        at = now.find(stop, max(0, old - len(stop) + 1))
        if at >= 0:
            return Stop(stop, len(ids), len(now) - at)
    return None


def first_stop(tokenizer: Any, ids: Sequence[int], stops: Sequence[str], min_tokens: int) -> Stop | None:
    """The first stop text that was completed after more than `min_tokens` tokens."""
    counts = range(min_tokens + 1, len(ids) + 1)
    return next((stop for count in counts if (stop := ended_by(tokenizer, ids[:count], stops))), None)


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose new text holds a stop text.

    width        tokens of the prompt, padding included
    min_tokens   new tokens before which no stop text counts
    """

    is_row_wise = True
    looks_back = False  # it goes by the text alone

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int, min_tokens: int = 0) -> None:
        self._tokenizer, self._stops, self._width, self._min_tokens = tokenizer, stops, width, min_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[batch] bool."""
        new = input_ids[:, self._width :]
        if new.shape[1] <= self._min_tokens:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device)
        found = [ended_by(self._tokenizer, row, self._stops) is not None for row in new.tolist()]
        return torch.tensor(found, dtype=torch.bool, device=new.device)
