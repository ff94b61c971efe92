"""Members that read a prompt of their own: a chat-tuned expert next to a plain base. Only generated tokens are shared.

The *shared text* is what the caller sees: the plain prompt, then the generated tokens. A member with a prompt form
reads its own rendering of the prompt in place of the plain one, and then the same generated tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.core.errors import BadSetting, EmptyPrompt, MemberMismatch
from trimtab.models.chat_templates import Template, named_template, template_of
from trimtab.models.conversations import (
    TOOL_USE,
    ChatArguments,
    Message,
    checked_messages,
    chosen_template,
    render_conversation,
    text_of_message,
)

Prompt = str | Sequence[Message]
PLACE = "{prompt}"
NOTHING_ASKED = ChatArguments()


@dataclass(frozen=True)
class PromptForm:
    """How a member's prompt is made of the caller's: a text with {prompt} in it, or a chat template (Jinja).

    template    text around the prompt, e.g. "Question: {prompt}\\nAnswer:"; None for chat
    chat        the chat template; None: the template above, or the plain prompt
    system      a system message to go first in a chat
    tool_chat   the chat template where there are tools; None: the same
    """

    template: str | None = None
    chat: str | None = None
    system: str | None = None
    tool_chat: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and self.chat is not None:
            raise BadSetting("a prompt form has both a template and a chat template.", fix="keep one of them.")
        if self.template is not None and self.template.count(PLACE) != 1:
            raise BadSetting(
                f"the prompt template {self.template!r} holds {{prompt}} {self.template.count(PLACE)} times.",
                "It must hold it once: that is where the prompt goes.",
                'write for example "Question: {prompt}\\nAnswer:", or "chat" for the member\'s chat template.',
            )
        if self.system is not None and self.chat is None:
            raise BadSetting("a system message needs a chat template.", fix='use {"chat": true, "system": "..."}.')

    @property
    def is_plain(self) -> bool:
        """Whether the member reads what the caller wrote."""
        return self.template is None and self.chat is None

    def to_dict(self) -> dict[str, str]:
        """For `config.json`."""
        parts = {"template": self.template, "chat": self.chat, "system": self.system, "tool_chat": self.tool_chat}
        return {name: value for name, value in parts.items() if value is not None}

    def template_for(self, tokenizer: Any, chat: ChatArguments) -> str | None:
        """The chat template that conversations of this member go through; None for a text with {prompt}."""
        if self.template is not None:
            return None
        if self.chat is not None:
            return self.tool_chat if chat.values.get("tools") and self.tool_chat is not None else self.chat
        return chosen_template(template_of(tokenizer), chat)

    def render(self, tokenizer: Any, prompt: Prompt, chat: ChatArguments = NOTHING_ASKED) -> list[int]:
        """Token ids of this member's prompt.

        A conversation (a list of {"role", "content"}) goes through the chat template; a plain or templated member
        reads the fused tokenizer's own chat rendering, or the contents line by line, respectively.

        raises    BadSetting for a conversation that the template refuses, and a text that cannot be tokenized
        """
        if self.template is not None:
            return ids_of(tokenizer, self._templated(self.template, prompt, chat))
        if self.chat is None and isinstance(prompt, str):
            return ids_of(tokenizer, prompt)
        template = self.template_for(tokenizer, chat)
        if template is None:
            raise BadSetting(
                "the prompt is a conversation, but the tokenizer has no chat template, nor has any member.",
                "Conversations are written by the chat template of the tokenizer, or of a member.",
                "pass a text, or give a template: --chat-template FILE (chat_template= in Python).",
            )
        messages = checked_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        text = render_conversation(tokenizer, messages, template, chat)
        # The template writes the special tokens itself: the tokenizer's own would begin the text twice.
        return _tokens(tokenizer, text, add_special_tokens=False)

    def _templated(self, template: str, prompt: Prompt, chat: ChatArguments) -> str:
        """A begun answer follows the text around the prompt, which ends where an answer begins."""
        if isinstance(prompt, str) or len(prompt) < 2 or not chat.continues(prompt):
            return template.replace(PLACE, text_of(prompt))
        return template.replace(PLACE, text_of(prompt[:-1])) + text_of(prompt[-1:])


def read_form(member: str, spec: Any, chat_template: Template | None) -> PromptForm:
    """A prompt form from what a user writes or `config.json` holds.

    spec            "plain", "chat", a text with {prompt}, or {"template": ...} / {"chat": ..., "system": ...}, where
                    chat is true, the name of one of several templates, or Jinja
    chat_template   the member's own, for "chat"
    """
    if isinstance(spec, PromptForm):
        return spec
    if spec == "plain":
        return PromptForm()
    if isinstance(spec, str) and spec != "chat":
        return PromptForm(template=spec)
    parts = {"chat": True} if spec == "chat" else dict(spec)
    unknown = sorted(set(parts) - {"template", "chat", "system", "tool_chat"})
    if unknown:
        raise BadSetting(
            f"the prompt of '{member}' has unknown parts: {', '.join(unknown)}.",
            "Known: template, chat, system.",
            "remove them.",
        )
    if parts.get("chat") is True:
        if chat_template is None:
            raise MemberMismatch(
                f"member '{member}' has no chat template.",
                'prompts={"' + member + '": "chat"} asks for the template of its tokenizer.',
                f'pass the template itself: prompts={{"{member}": {{"chat": JINJA}}}}, or a text with {{prompt}}.',
            )
        parts["chat"] = named_template(f"member '{member}'", chat_template)
        if isinstance(chat_template, dict) and TOOL_USE in chat_template:
            parts["tool_chat"] = chat_template[TOOL_USE]
    elif isinstance(chat_template, dict):
        parts["chat"] = chat_template.get(str(parts.get("chat")), parts.get("chat"))
    return PromptForm(**parts)


def text_of(prompt: Prompt) -> str:
    """The prompt as text: a conversation is its contents, line by line."""
    return prompt if isinstance(prompt, str) else "\n".join(map(text_of_message, checked_messages(prompt)))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by itself.

    A text that begins with the beginning-of-text token, as rendered chats do, has it once.
    """
    ids = _tokens(tokenizer, text)
    token, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if not isinstance(token, str) or not text.startswith(token) or text.startswith(token * 2):
        return ids
    return ids[1:] if ids[:2] == [bos, bos] else ids


def _tokens(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        text.encode()
        return list(tokenizer(text, **options)["input_ids"])
    except UnicodeEncodeError as error:
        raise BadSetting(
            f"the prompt holds {text[error.start]!r}, which is half a character.",
            "Expected: a text that UTF-8 can hold.",
            "send both halves of the surrogate pair, or leave it out.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the Rust side raises bare Exception, for a character without a token say
        raise BadSetting(
            f"the prompt cannot be tokenized: {type(error).__name__}: {error}",
            "Expected: a text that the tokenizer knows.",
            "correct the prompt.",
        ) from error


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, each a text or a conversation, as a list.

    raises    EmptyPrompt for none at all, or one that is empty
    """
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping)):
        prompts = [prompts]
    rows: list[Prompt] = list(prompts)
    for row, prompt in enumerate(rows):
        if len(prompt) == 0 or not (text_of(prompt) or _calls_tools(prompt)):
            raise empty_prompt(f"prompt {row} of {len(rows)} is empty.")
    if not rows:
        raise empty_prompt("there is no prompt.")
    return rows


def _calls_tools(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and any(message.get("tool_calls") for message in prompt)


def empty_prompt(found: str) -> EmptyPrompt:
    """The error for a prompt without tokens."""
    return EmptyPrompt(
        found,
        "A model continues a text of at least one token.",
        "pass some text, or the beginning-of-text token, if the model knows one.",
    )


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "row time"], Int[Tensor, "row time"]]:
    """Token ids and mask, filled up on the left."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def padding_left(tokenizer: Any) -> Any:
    """The tokenizer, padding on the left, where generation needs it; a copy, since it may be in other use."""
    if tokenizer is None or tokenizer.padding_side == "left":
        return tokenizer
    padded = copy.copy(tokenizer)
    padded.padding_side = "left"
    padded.init_kwargs = {**tokenizer.init_kwargs, "padding_side": "left"}  # what save_pretrained writes
    return padded


def positions_of(mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """The position of each token in its text: padding does not count."""
    mask = mask.long()
    return (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)


@dataclass(frozen=True)
class OwnPrompts:
    """The prompts that the members read in place of the first `shared_length` tokens of the shared text.

    ids, masks       per member run, [batch, time] each, left-padded; the times differ between members
    shared_length    tokens of the plain prompt, padding included
    """

    ids: list[Tensor]
    masks: list[Tensor]
    shared_length: int

    @classmethod
    def from_tensors(
        cls,
        ids: Int[Tensor, "batch member time"],
        mask: Int[Tensor, "batch member time"],
        shared_length: int,
        members: Sequence[int],
    ) -> "OwnPrompts":
        """From what `FusedCausalLM.encode` returns; `members` are the columns to keep, one per run."""
        starts = [int(mask[:, member].any(dim=0).int().argmax()) for member in members]
        picked = list(zip(members, starts, strict=True))
        return cls([ids[:, m, at:] for m, at in picked], [mask[:, m, at:] for m, at in picked], shared_length)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each run's prompt, padding included."""
        return [ids.shape[1] for ids in self.ids]

    @property
    def extra_tokens(self) -> int:
        """How much longer the longest own prompt is than the shared one."""
        return max(self.lengths) - self.shared_length

    def rows(self, indices: Tensor) -> "OwnPrompts":
        """These rows, in this order."""
        return OwnPrompts(
            [ids[indices.to(ids.device)] for ids in self.ids],
            [mask[indices.to(mask.device)] for mask in self.masks],
            self.shared_length,
        )

    def repeated(self, times: int) -> "OwnPrompts":
        """Each row `times` times."""
        return OwnPrompts(
            [ids.repeat_interleave(times, dim=0) for ids in self.ids],
            [mask.repeat_interleave(times, dim=0) for mask in self.masks],
            self.shared_length,
        )
