"""A fused directory: config.json with references, and the tokenizer; no weights. It is put in its place at once."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, TrimtabWarning, UnreadableModel
from trimtab.core.files import atomic_directory
from trimtab.logits import generation_settings
from trimtab.logits.config import FusedConfig
from trimtab.logits.members import Members
from trimtab.models import checkpoint, references
from trimtab.models.chat_templates import bound_template, template_of, with_chat_template
from trimtab.models.loading import saved_reference
from trimtab.models.prompts import PromptForm, padding_left, read_form
from trimtab.models.references import Reference
from trimtab.models.token_ids import FusedVocabulary
from trimtab.models.vocabulary import MemberTokens, TokenSettings, fuse_vocabularies

# What a fused directory consists of: the configuration, and the files of any tokenizer. They belong together, so none
# of an earlier tokenizer's stays beside a new one's.
WRITTEN = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
NOTHING_MISSING: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def settle(
    members: Members,
    tokenizer: Any,
    prompts: Mapping[str, Any],
    one_pass: bool | str,
    chat_template: str | None = None,
    token_settings: TokenSettings | None = None,
    is_known: bool = False,
) -> tuple[FusedConfig, Any, dict[str, PromptForm]]:
    """What follows from the members before any of them is read: configuration, tokenizer and prompt forms.

    tokenizer      what all members share; None: the one beside the strong model, or beside another member
    chat_template  which chat template serves, see `with_chat_template`
    token_settings what the user says about renamed special tokens
    is_known       whether the user has been told which tokens are cut, when the directory was written
    raises         VocabularyMismatch, BadSetting, MemberMismatch, UnknownName
    warns          TrimtabWarning, one line, where a token is cut or has delta 0
    """
    token_settings = token_settings or TokenSettings()
    known = {
        member.name: MemberTokens(member.rows, member.embedded, member.tokenizer, member.resized) for member in members
    }
    vocabulary = fuse_vocabularies(known, tokenizer, token_settings)
    if tokenizer is None:
        tokenizer = next((member.tokenizer for member in members if member.tokenizer is not None), None)
    tokenizer = padding_left(tokenizer)
    tokenizer = with_chat_template(tokenizer, template_owners(members), chat_template)
    config = make_config(members, tokenizer, vocabulary)
    if vocabulary.remark and not is_known:
        warnings.warn(vocabulary.remark, TrimtabWarning, stacklevel=4)
    config.token_map, config.special_tokens = token_settings.to_dict().get("token_map"), token_settings.special_tokens
    forms = read_forms(members, tokenizer, prompts)
    config.prompts = {name: form.to_dict() for name, form in forms.items()} or None
    config.one_pass = one_pass
    return config, tokenizer, forms


def make_config(members: Members, tokenizer: Any, vocabulary: FusedVocabulary) -> FusedConfig:
    """The configuration that these members give: special tokens, vocabulary, the shortest context."""
    contexts = [member.context for member in members if member.context is not None]
    ends = _end_ids(members, vocabulary)
    strong = members.strong.model.generation_config
    bos, pad = (
        next((i for i in (getattr(owner, name, None) for owner in (tokenizer, strong)) if _is_in(i, vocabulary)), None)
        for name in ("bos_token_id", "pad_token_id")
    )
    return FusedConfig(
        architectures=["FusedCausalLM"],
        vocab_size=vocabulary.size,
        vocabulary=vocabulary.to_dict(),
        max_position_embeddings=min(contexts, default=None),
        bos_token_id=bos,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else None),
        dtype=members.strong.model.dtype,
    )


def _is_in(index: Any, vocabulary: FusedVocabulary) -> bool:
    return isinstance(index, int) and 0 <= index < vocabulary.size


def _end_ids(members: Members, vocabulary: FusedVocabulary) -> list[int]:
    """Where any member ends its text, the fused text ends: a chat expert may end turns with a token of its own."""
    found: dict[int | None, None] = {}
    for member in members:
        ends = member.model.generation_config.eos_token_id
        listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        tokenizer_end = getattr(member.chat_tokenizer, "eos_token_id", None)
        own = listed + ([] if tokenizer_end is None else [tokenizer_end])
        found |= dict.fromkeys(vocabulary.fused_id(member.name, end) for end in own)
    return [end for end in found if end is not None]


def template_owners(members: Members) -> dict[str, Any]:
    """{member: the tokenizer with its chat template, or None}: strong, the experts, then the base."""
    ordered = (members.strong, *members.experts.values(), members.base)
    return {member.name: member.chat_tokenizer for member in ordered}


def read_forms(members: Members, tokenizer: Any, prompts: Mapping[str, Any]) -> dict[str, PromptForm]:
    """The prompt forms of members that have one; "chat" is the template beside the member, else the shared one."""
    by_name = {member.name: member for member in members}
    for name in prompts:
        if name not in by_name:
            raise BadSetting(
                f"there is a prompt for '{name}', but no such member.", f"Members: {', '.join(by_name)}.", "rename it."
            )
    forms = {}
    for name, spec in prompts.items():
        template = bound_template(by_name[name].chat_tokenizer, tokenizer) or template_of(tokenizer)
        forms[name] = read_form(name, spec, template)
    if any(not form.is_plain for form in forms.values()) and tokenizer is None:
        raise BadSetting("members have prompts of their own, but there is no tokenizer.", fix="pass tokenizer=....")
    return forms


def read_config(directory: Path) -> FusedConfig:
    """The configuration in a fused directory.

    raises    UnreadableModel when there is none, or it is another model's
    """
    if not (directory / "config.json").is_file():
        raise UnreadableModel(
            f"'{directory}' is no fused directory: it holds no config.json.",
            "A fused directory is what FusedCausalLM.save_pretrained or `trimtab fuse` writes.",
            "correct the path, or make it with `trimtab fuse`.",
        )
    content = checkpoint.read_json(directory / "config.json")
    if content.get("model_type") != FusedConfig.model_type:
        raise UnreadableModel(
            f"'{directory}' is a model of type '{content.get('model_type')}', not a fused one.",
            "A fused directory's config.json says model_type 'trimtab'.",
            "open it with AutoModelForCausalLM, or make a fused directory with `trimtab fuse`.",
        )
    missing = [name for name in ("strong", "base", "experts", "strategy") if content.get(name) is None]
    if missing:
        raise UnreadableModel(
            f"the config.json in '{directory}' lacks {', '.join(missing)}.", fix="make the fused directory again."
        )
    return FusedConfig(**content)


def references_of(config: FusedConfig) -> tuple[Reference, Reference, dict[str, Reference]]:
    """Strong, base and experts as the configuration names them."""
    try:
        strong, base = Reference(**config.strong or {}), Reference(**config.base or {})
        return strong, base, {part.pop("name"): Reference(**part) for part in map(dict, config.experts or [])}
    except (TypeError, KeyError, ValueError) as error:
        raise UnreadableModel(f"a reference in config.json cannot be read: {error}.", fix="fuse again.") from error


def write_directory(
    config: FusedConfig, members: Members, tokenizer: Any, target: Path, overwrite: bool, generation: Any = None
) -> None:
    """Writes config.json, generation_config.json and tokenizer; a reader sees the old directory or the new one, whole.

    config      strategy and prompts are in it; the references are filled in here
    generation  the GenerationConfig to write; None: the strong model's
    """
    if generation is None:
        generation = generation_settings.from_strong(members.strong.model.generation_config, config)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        _check_replaceable(target, overwrite)
    found = {member.name: saved_reference(member) for member in members}
    written = {name: references.as_written(*pair, target).to_dict() for name, pair in found.items()}
    config.strong, config.base = written.pop("strong"), written.pop("base")
    config.experts = [{"name": name, **reference} for name, reference in written.items()]
    # The directory may hold the members themselves and what users put there: all of that stays.
    with atomic_directory(target, replaced=WRITTEN) as beside:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(beside))
        generation_settings.write(generation, beside)
        config.save_pretrained(str(beside))


def _check_replaceable(target: Path, overwrite: bool) -> None:
    is_fused = (target / "config.json").is_file() and (
        checkpoint.read_json(target / "config.json").get("model_type") == FusedConfig.model_type
    )
    if not target.is_dir() or ((target / "config.json").is_file() and not is_fused):
        raise BadSetting(
            f"'{target}' is {'another model' if target.is_dir() else 'a file'}.",
            "A fused model is written to a directory of its own.",
            "choose another directory.",
        )
    if is_fused and not overwrite:
        raise BadSetting(
            f"'{target}' holds a fused model already.", "Nothing is overwritten unasked.", "pass overwrite=True."
        )
