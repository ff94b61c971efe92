"""Speculation in vLLM: a small member drafts, the fused model verifies, and the output law stays the fused one.

LLM(directory, speculative_config=speculative_config(directory, "math"))
"""

import os
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, unknown_name
from trimtab.logits import references, saving

LONGEST = 16  # drafted tokens: beyond, nearly all would be thrown away


def speculative_config(directory: str | os.PathLike[str], member: str, tokens: int = 4) -> dict[str, Any]:
    """What vLLM takes as `speculative_config`, so that this member drafts for the fused model of a directory.

    member    "base" or an expert's name
    tokens    how many a draft has
    raises    UnknownName; BadSetting for a member that is an adapter, or a length out of range
    """
    place = Path(os.fspath(directory))
    _, base, experts = saving.references_of(saving.read_config(place))
    named = {"base": base, **experts}
    if member not in named:
        raise unknown_name("member that can draft", member, named)
    if not 1 <= tokens <= LONGEST:
        raise BadSetting(f"a draft has {tokens} tokens.", f"Expected: 1 to {LONGEST}.", "pass tokens=4.")
    _, where = references.locate(named[member], beside=place)
    if references.is_adapter(where):
        raise BadSetting(
            f"expert '{member}' is an adapter, and vLLM drafts with whole models.",
            "Adapters are merged into the served model only.",
            "let 'base' draft, or merge the adapter: peft's merge_and_unload(), save_pretrained, then fuse again.",
        )
    return {"method": "draft_model", "model": str(where), "num_speculative_tokens": tokens}
