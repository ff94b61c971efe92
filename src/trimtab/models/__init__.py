"""Models on disk and in memory, as every space needs them: references, loading, adapters, vocabularies, prompts.

What users may import is exported here; the other modules and names of this package are internal.
"""

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazily

if TYPE_CHECKING:
    from trimtab.models.loading import Member, Placement
    from trimtab.models.prompts import PromptForm
    from trimtab.models.references import Reference, digest, locate, parse_reference
    from trimtab.models.vocabulary import load_tokenizer

_HOMES = {
    "Member": "trimtab.models.loading",
    "Placement": "trimtab.models.loading",
    "PromptForm": "trimtab.models.prompts",
    "Reference": "trimtab.models.references",
    "digest": "trimtab.models.references",
    "load_tokenizer": "trimtab.models.vocabulary",
    "locate": "trimtab.models.references",
    "parse_reference": "trimtab.models.references",
}

__all__ = [
    "Member",
    "Placement",
    "PromptForm",
    "Reference",
    "digest",
    "load_tokenizer",
    "locate",
    "parse_reference",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
