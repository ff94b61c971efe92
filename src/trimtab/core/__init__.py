"""Maths on tensors, the exception tree, the registry and typed settings; imports nothing of trimtab's other rooms.

What users may import is exported here; the other modules and names of this package are internal.
"""

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazily

if TYPE_CHECKING:
    from trimtab.core.divergence import entropy_nats, kl_nats
    from trimtab.core.errors import (
        BadSetting,
        ContextTooLong,
        EmptyPrompt,
        InputError,
        MemberMismatch,
        MissingPackage,
        NumericalError,
        OfflineError,
        TrimtabError,
        TrimtabWarning,
        UnknownName,
        UnreadableModel,
        VocabularyMismatch,
    )
    from trimtab.core.registry import Entry, Family, families, find
    from trimtab.core.settings import REQUIRED, Configurable, Setting, make, parse, setting, settings_of

_HOMES = {
    "BadSetting": "trimtab.core.errors",
    "Configurable": "trimtab.core.settings",
    "ContextTooLong": "trimtab.core.errors",
    "EmptyPrompt": "trimtab.core.errors",
    "Entry": "trimtab.core.registry",
    "Family": "trimtab.core.registry",
    "InputError": "trimtab.core.errors",
    "MemberMismatch": "trimtab.core.errors",
    "MissingPackage": "trimtab.core.errors",
    "NumericalError": "trimtab.core.errors",
    "OfflineError": "trimtab.core.errors",
    "REQUIRED": "trimtab.core.settings",
    "Setting": "trimtab.core.settings",
    "TrimtabError": "trimtab.core.errors",
    "TrimtabWarning": "trimtab.core.errors",
    "UnknownName": "trimtab.core.errors",
    "UnreadableModel": "trimtab.core.errors",
    "VocabularyMismatch": "trimtab.core.errors",
    "entropy_nats": "trimtab.core.divergence",
    "families": "trimtab.core.registry",
    "find": "trimtab.core.registry",
    "kl_nats": "trimtab.core.divergence",
    "make": "trimtab.core.settings",
    "parse": "trimtab.core.settings",
    "setting": "trimtab.core.settings",
    "settings_of": "trimtab.core.settings",
}

__all__ = [
    "REQUIRED",
    "BadSetting",
    "Configurable",
    "ContextTooLong",
    "EmptyPrompt",
    "Entry",
    "Family",
    "InputError",
    "MemberMismatch",
    "MissingPackage",
    "NumericalError",
    "OfflineError",
    "Setting",
    "TrimtabError",
    "TrimtabWarning",
    "UnknownName",
    "UnreadableModel",
    "VocabularyMismatch",
    "entropy_nats",
    "families",
    "find",
    "kl_nats",
    "make",
    "parse",
    "setting",
    "settings_of",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
