"""Drafts that end where their text may end, whatever happens: tokens behind that would be read for nothing.

vLLM 0.32 verifies drafts at their full length, also behind a drafted end of text and beyond `max_tokens`. Every member
reads those rows, and none of them is ever answered with: a token that is dropped here stands behind one with which
the text ends, or behind a rejected one. So greedy texts stay as they are, and sampled ones follow the same law. A seed
draws as many numbers as a draft has tokens, so what it draws last may depend on `max_tokens` and on what ends texts.
"""

from collections.abc import Collection, Sequence
from typing import Any

from trimtab.logits.speculation.draft import until_end


def mend_draft_lengths(runner: Any, is_ours: type) -> None:
    """Cuts what a class of model runners hands to the scheduler as drafts; called again, it changes nothing.

    runner    vLLM's GPUModelRunner, which the CPU's inherits. Under asynchronous scheduling (not on CPUs) drafts stay
              as they are: steps are laid out before a draft is known, and its text has been counted ahead
    is_ours   only drafts for models of this class are cut
    """
    if getattr(runner.take_draft_token_ids, "is_mended", False):
        return
    take = runner.take_draft_token_ids

    def take_useful(self: Any) -> Any:
        drafted = take(self)
        if drafted is not None and not self.use_async_scheduling and isinstance(self.get_model(), is_ours):
            rows = zip(drafted.req_ids, drafted.draft_token_ids, strict=False)  # as the scheduler reads them
            drafted.draft_token_ids = [_useful_to(self.requests.get(request), draft) for request, draft in rows]
        return drafted

    take_useful.is_mended = True  # type: ignore[attr-defined]
    runner.take_draft_token_ids = take_useful


def _useful_to(request: Any, draft: list[int]) -> list[int]:
    params = getattr(request, "sampling_params", None)
    if params is None:
        return draft
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}  # as vLLM's `check_stop` looks for them
    return useful(draft, params.max_tokens - len(request.output_token_ids), ends)


def useful(draft: Sequence[int], room: int, ends: Collection[int | None]) -> list[int]:
    """The beginning of a draft behind which every token would be dropped.

    draft   drafted token ids
    room    tokens that the text may still get, the one drawn behind the last accepted token among them
    ends    token ids with which the text ends
    """
    kept = list(draft[: max(0, room - 1)])
    return kept[: until_end(kept, ends)]
