"""Members can be fused only where the same id means the same token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import UnreadableModel, VocabularyMismatch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SHOWN = 5


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer beside a model; None when there is none."""
    options = {}
    if directory.is_file():  # a GGUF file holds a tokenizer, too; files beside it are what its publisher made it from
        directory, options = directory.parent, {"gguf_file": directory.name}
    if any((directory / file).is_file() for file in TOKENIZER_FILES):
        options = {}
    elif not options:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, from KeyError to the Rust side's own
        raise UnreadableModel(
            f"the tokenizer in '{directory}' cannot be read: {error}.", fix="save it again with save_pretrained."
        ) from error


def token_count(tokenizer: Any) -> int:
    """How many ids a tokenizer can give: its largest id plus one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_tokenizers(tokenizers: Mapping[str, Any]) -> None:
    """Refuses members whose tokenizers give one id to different tokens; says which.

    tokenizers    {member: tokenizer}; members without one are left out; the first is what the others are held against
    """
    names = list(tokenizers)
    if not names:
        return
    first = {index: token for token, index in tokenizers[names[0]].get_vocab().items()}
    for name in names[1:]:
        other = {index: token for token, index in tokenizers[name].get_vocab().items()}
        differing = sorted(i for i in first.keys() | other.keys() if first.get(i) != other.get(i))
        if differing:
            shown = [f"id {i} is {_shown(first.get(i))} and {_shown(other.get(i))}" for i in differing[:SHOWN]]
            more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise VocabularyMismatch(
                f"the tokenizers of '{names[0]}' and '{name}' differ in {len(differing)} tokens: "
                f"{'; '.join(shown)}{more}.",
                "Logits can be added only where the same id means the same token.",
                "use members that share one tokenizer.",
            )


def fused_size(tokenizer: Any | None, rows: Mapping[str, int]) -> int:
    """How many tokens are fused: the tokenizer's; padding rows beyond it are cut.

    rows    {member: rows of its output layer}
    raises  VocabularyMismatch when a member has fewer rows than there are tokens, or, without a tokenizer, when the
            sizes differ
    """
    if tokenizer is None:
        if len(set(rows.values())) > 1:
            sizes = ", ".join(f"'{name}' {size}" for name, size in rows.items())
            raise VocabularyMismatch(
                f"the members score different numbers of tokens: {sizes}.",
                "Without a tokenizer nobody knows which of them are padding.",
                "pass tokenizer=..., so that padding rows can be cut.",
            )
        return next(iter(rows.values()))
    count = token_count(tokenizer)
    for name, size in rows.items():
        if size < count:
            raise VocabularyMismatch(
                f"member '{name}' scores {size} tokens, the tokenizer has {count}.",
                "Every member must know every token.",
                "use members that share one tokenizer, or pass the tokenizer that belongs to them.",
            )
    return count


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
