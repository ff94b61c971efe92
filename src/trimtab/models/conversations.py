"""Conversations become text as transformers' `apply_chat_template` makes it: tools, documents, template variables, and
an answer that is begun and to be continued."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import BadSetting, MemberMismatch, TrimtabWarning
from trimtab.models.chat_templates import Template, named_template

Message = Mapping[str, Any]  # {"role", "content"}; content is a text, text parts, or None beside tool calls
Conversation = Sequence[Message]
# Arguments of apply_chat_template that say what comes back. Here that is always padded tokens.
NOT_OFFERED = (
    *("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
TOOL_USE = "tool_use"  # of several named templates the one that transformers takes where there are tools
PROBE = "trimtab reads parts"


@dataclass(frozen=True)
class ChatArguments:
    """How conversations are rendered.

    continue_final_message   the last message is begun, and is to be continued; None: where it is the assistant's
    add_generation_prompt    the assistant's turn is opened after the last message; None: unless that is continued
    chat_template            Jinja, or the name of one of the tokenizer's templates; None: the tokenizer's own choice
    values                   tools, documents and all other variables of the template
    """

    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ChatArguments":
        """From keyword arguments, as apply_chat_template takes them.

        raises    BadSetting for an argument about tokens or tensors, and for both ways to go on at once
        """
        for name in NOT_OFFERED:
            if name in given:
                raise BadSetting(
                    f"{name} is not for encode.", "It gives padded tokens of the prompts, always.", "leave it out."
                )
        values = dict(given)
        own = {name: values.pop(name, None) for name in ("continue_final_message", "add_generation_prompt")}
        if own["continue_final_message"] and own["add_generation_prompt"]:
            raise BadSetting(
                "continue_final_message and add_generation_prompt are both set.",
                "Either the last message is continued, or a new turn is opened after it.",
                "keep one of them.",
            )
        return cls(**own, chat_template=values.pop("chat_template", None), values=values)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self == ChatArguments()

    def continues(self, messages: Conversation) -> bool:
        """Whether the last message is continued; an assistant's turn is, unless told otherwise, as in pipelines."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        return self.add_generation_prompt is None and messages[-1]["role"] == "assistant"


def text_of_message(message: Message) -> str:
    """A message's text; parts are joined by line breaks, as vLLM joins them."""
    content = message.get("content")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


def checked_messages(conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages, with text parts in one form; whatever else they hold (tool calls, names) is the template's.

    raises    BadSetting for a message without a role, and for content that is no text
    """
    return [_checked(message) for message in conversation]


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadSetting(
            f"a message is {_shown(message)}.", 'Expected: {"role": ..., "content": ...}.', "name who speaks."
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise BadSetting(
            f"the content of a message is {_shown(content)}.",
            'Expected: a text, or parts [{"type": "text", "text": ...}].',
            "correct it.",
        )
    return {**message, "content": [_text_part(message["role"], part) for part in content]}


def _text_part(role: str, part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadSetting(
        f"a message of the {role} holds a part of type '{kind}'.",
        'Members read texts: parts are {"type": "text", "text": ...}.',
        "leave it out, or describe it in words.",
    )


def chosen_template(templates: Template | None, arguments: ChatArguments, fallback: bool = True) -> str | None:
    """The one template out of a tokenizer's that transformers would take for these arguments.

    fallback    whether `arguments.chat_template` counts; a member with a template of its own keeps that
    """
    asked = arguments.chat_template if fallback else None
    if asked is not None and not (isinstance(templates, dict) and asked in templates):
        if "{" in asked:
            return asked
        if not isinstance(templates, dict):
            raise MemberMismatch(
                f"the tokenizer has no chat template '{asked}'.",
                "It has one without a name." if templates else "It has none.",
                "leave the name out, or pass Jinja.",
            )
        return named_template("the tokenizer", templates, asked)
    if asked is None and isinstance(templates, dict) and arguments.values.get("tools") and TOOL_USE in templates:
        asked = TOOL_USE
    return named_template("the tokenizer", templates, asked)


def render_conversation(tokenizer: Any, messages: Sequence[dict[str, Any]], template: str, chat: ChatArguments) -> str:
    """The conversation as text, ready to be continued.

    messages    as `checked_messages` gives them
    raises      BadSetting for a conversation that the template refuses
    """
    is_begun = chat.continues(messages)
    if is_begun and chat.continue_final_message is None and not text_of_message(messages[-1]):
        messages, is_begun = messages[:-1], False  # a turn without a word is the generation prompt
    opens = not is_begun if chat.add_generation_prompt is None else chat.add_generation_prompt
    if any(isinstance(message.get("content"), list) for message in messages) and not reads_parts(tokenizer, template):
        messages = [_with_text(message) for message in messages]
    options = {"add_generation_prompt": opens, "continue_final_message": is_begun, **chat.values}
    text = _applied(tokenizer, messages, template, options)
    if _is_lost(messages, text) and reads_parts(tokenizer, template):
        text = _applied(tokenizer, [_with_parts(message) for message in messages], template, options)
    return text


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": text_of_message(message)} if message.get("content") else message


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _is_lost(messages: Sequence[dict[str, Any]], text: str) -> bool:
    """Whether what the user said last is not in the rendered text, as with templates that loop over parts only."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return bool(said) and isinstance(said[-1], str) and said[-1].strip() not in text


def _applied(tokenizer: Any, messages: Sequence[dict[str, Any]], template: str, options: Mapping[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))
    except (ImportError, MemoryError):  # no fault of the conversation
        raise
    except Exception as error:  # a template is a program: it refuses by raising, and may fail in any way
        raise BadSetting(
            f"the chat template refuses the conversation: {type(error).__name__}: {error}",
            "Which roles may speak, and in which order, is the template's to say.",
            "send messages that it takes, or give the model another chat template.",
        ) from error


def reads_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template takes content as parts; most print them as Python prints a list.

    Told by what it does: its source may loop over parts in many ways.
    """
    probe = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        text = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except ImportError:
        raise
    except Exception:  # it wants a text, or another conversation than this one
        return False
    return PROBE in text and "'text'" not in text and '"text"' not in text


def warn_of_unread(arguments: ChatArguments, templates: Sequence[str]) -> None:
    """Warns about variables that none of the templates names: they change nothing."""
    asked = [name for name, value in arguments.values.items() if value is not None]
    unread = [name for name in asked if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in templates)]
    if unread:
        warnings.warn(
            f"no chat template reads {', '.join(unread)}, so nothing changes. Fix: leave it out, or pass a template "
            "that knows it.",
            TrimtabWarning,
            stacklevel=4,
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
