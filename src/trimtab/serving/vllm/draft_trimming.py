"""Drafts trimmed at an end of text and at max_tokens.

vLLM verifies drafts at their full length. A token dropped here comes after one that ends the text, or after a rejected
one, so greedy texts stay as they are and sampled ones keep their distribution. A seed draws one number per drafted
token: what it draws last may depend on `max_tokens` and on the tokens that end texts.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from trimtab.logits.speculation.draft import until_end


def trimming(take: Callable[[Any], Any], model_class: type) -> Callable[[Any], Any]:
    """`GPUModelRunner.take_draft_token_ids` with trimmed drafts.

    take          the original method
    model_class   only drafts for models of this class are trimmed

    Under asynchronous scheduling (not on CPUs) drafts stay as they are: vLLM lays out the next step before a draft is
    known, and has counted its tokens by then.
    """

    def take_trimmed(self: Any) -> Any:
        drafted = take(self)
        if drafted is not None and not self.use_async_scheduling and isinstance(self.get_model(), model_class):
            rows = zip(drafted.req_ids, drafted.draft_token_ids, strict=False)  # as the scheduler reads them
            drafted.draft_token_ids = [_trimmed_for(self.requests.get(request), draft) for request, draft in rows]
        return drafted

    return take_trimmed


def _trimmed_for(request: Any, draft: list[int]) -> list[int]:
    params = getattr(request, "sampling_params", None)
    if params is None:
        return draft
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}  # as vLLM's `check_stop` looks for them
    return trimmed(draft, params.max_tokens - len(request.output_token_ids), ends)


def trimmed(draft: Sequence[int], room: int, ends: Collection[int | None]) -> list[int]:
    """The longest beginning of a draft that vLLM may still need.

    draft   drafted token ids
    room    tokens that the text may still get, the one drawn after the last accepted token among them
    ends    token ids that end the text
    """
    kept = list(draft[: max(0, room - 1)])
    return kept[: until_end(kept, ends)]
