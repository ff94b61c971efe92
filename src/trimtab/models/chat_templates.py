"""Which chat template the conversations of a fused model go through.

A plain strong model beside a chat-tuned expert is the usual case, so the template of any member serves. It becomes the
template of the fused tokenizer: transformers, vLLM and `trimtab chat` then render alike.
"""

import copy
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, MemberMismatch, TrimtabWarning, UnreadableModel, unknown_name

Template = str | dict[str, str]  # Jinja, or several of it by name
DEFAULT = "default"  # of several named templates the one that transformers takes
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def template_of(tokenizer: Any) -> Template | None:
    """The chat template or templates of a tokenizer; None without any."""
    return getattr(tokenizer, "chat_template", None) or None


def bound_template(owner: Any, tokenizer: Any) -> Template | None:
    """The owner's template, to be rendered with another tokenizer: special tokens keep the owner's spelling.

    A template may say `eos_token`, and an expert may end its turns with another token than the strong model.
    """
    found = template_of(owner)
    if found is None or owner is tokenizer:
        return found
    if isinstance(found, dict):
        return {name: _bound(text, owner, tokenizer) for name, text in found.items()}
    return _bound(found, owner, tokenizer)


def _bound(template: str, owner: Any, tokenizer: Any) -> str:
    values = {
        name: str(getattr(owner, name, None))
        for name in SPECIAL_TOKENS
        if name in template and getattr(owner, name, None) and getattr(owner, name) != getattr(tokenizer, name, None)
    }
    # transformers' Jinja drops the line break after a tag, so that the template still starts at the start of a line.
    return "".join(f"{{% set {name} = {json.dumps(value)} %}}\n" for name, value in values.items()) + template


def named_template(owner: str, template: Template | None, name: str | None = None) -> str | None:
    """One template out of what a tokenizer has: the named one, or the default.

    raises    MemberMismatch when there are several and none of this name
    """
    if not isinstance(template, dict):
        return template
    if (name or DEFAULT) not in template:
        raise MemberMismatch(
            f"{owner} has no chat template '{name}'."
            if name
            else f"{owner} has several chat templates, and none of them is the default.",
            f"It has {', '.join(sorted(template))}.",
            f"choose one of them by name, for example '{min(template)}'.",
        )
    return template[name or DEFAULT]


def with_chat_template(tokenizer: Any, members: Mapping[str, Any], choice: str | None = None) -> Any:
    """The fused tokenizer with the template that serves; a copy of it where the template is not its own.

    tokenizer   the fused one; its own template comes first. None: there is nothing to render with
    members     {member: tokenizer or None}, in the order in which their templates are taken
    choice      a member's name, the name of a template, a file, or Jinja; None: the first template that there is
    raises      UnknownName, MemberMismatch, UnreadableModel; BadSetting for a template that is no Jinja
    warns       TrimtabWarning when several members have different templates, and the tokenizer has none
    """
    if tokenizer is None:
        if choice is not None:
            raise BadSetting("there is a chat template, but no tokenizer.", fix="pass tokenizer=....")
        return None
    template = _first(tokenizer, members) if choice is None else _chosen(tokenizer, members, choice)
    if template == template_of(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def _first(tokenizer: Any, members: Mapping[str, Any]) -> Template | None:
    own = template_of(tokenizer)
    if own is not None:
        return own
    found = {name: bound_template(owner, tokenizer) for name, owner in members.items() if template_of(owner)}
    if not found:
        return None
    taken = next(iter(found))
    others = [name for name, template in found.items() if template != found[taken]]
    if others:
        warnings.warn(
            f"conversations are written in the chat template of '{taken}'; {', '.join(map(repr, others))} "
            f"{'has' if len(others) == 1 else 'have'} another one. Fix: choose by --chat-template {taken} or "
            f"--chat-template {others[0]} (chat_template= in Python).",
            TrimtabWarning,
            stacklevel=4,
        )
    return found[taken]


def _chosen(tokenizer: Any, members: Mapping[str, Any], choice: str) -> Template:
    if choice in members:
        template = bound_template(members[choice], tokenizer)
        if template is None:
            having = [name for name, owner in members.items() if template_of(owner)]
            raise MemberMismatch(
                f"member '{choice}' has no chat template.",
                f"Members with one: {', '.join(having) or 'none'}.",
                "choose one of them, or pass a file that holds the template.",
            )
        return template
    named = _named(tokenizer, members)
    if choice in named:
        return named[choice]
    if "{{" in choice or "{%" in choice:
        return _checked(choice, "the chat template")
    path = Path(choice).expanduser()
    if not path.exists():
        raise unknown_name("chat template (no file, member or named template)", choice, (*members, *named))
    try:
        return _checked(path.read_text(encoding="utf-8"), f"'{path}'")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableModel(
            f"the chat template '{path}' cannot be read: {error}.",
            "Expected: a text file with a Jinja template.",
            "pass that file, a member's name, or the name of a template.",
        ) from error


def _named(tokenizer: Any, members: Mapping[str, Any]) -> dict[str, str]:
    """All templates that have a name; the tokenizer's own go before those of members."""
    found: dict[str, str] = {}
    for owner in (tokenizer, *members.values()):
        template = bound_template(owner, tokenizer)
        found = (template if isinstance(template, dict) else {}) | found
    return found


def _checked(template: str, what: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    # transformers adds a tag of its own, which marks the assistant's tokens for training.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(plain)
    except TemplateSyntaxError as error:
        raise BadSetting(
            f"{what} is no Jinja template: line {error.lineno}: {error.message}",
            "Expected: a chat template as transformers takes it.",
            "correct it.",
        ) from error
    if not template.strip():
        raise BadSetting(f"{what} is empty.", "Expected: a Jinja template.", "leave it out, or write one.")
    return template
