"""Prompts become model inputs: the shared, plain prompt, and beside it what members with own prompts read instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.core.errors import BadSetting
from trimtab.models.conversations import ChatArguments, warn_of_unread
from trimtab.models.prompts import NOTHING_ASKED, PromptForm, as_prompts, empty_prompt, ids_of, left_padded

OWN_INPUTS = ("member_prompt_ids", "member_prompt_mask", "prompt_length")


@dataclass(frozen=True)
class PromptEncoder:
    """Renders and pads the prompts of all members.

    member_names    in the order of the member axis
    forms           {member: form}; members without one read the plain prompt
    """

    tokenizer: Any
    member_names: tuple[str, ...]
    forms: Mapping[str, PromptForm]
    pad_id: int

    @property
    def readers(self) -> list[str]:
        """Members that read a prompt of their own."""
        return [name for name, form in self.forms.items() if not form.is_plain]

    def encode(self, prompts: Any, chat: ChatArguments | Sequence[ChatArguments] = NOTHING_ASKED) -> dict[str, Any]:
        """Inputs of one or several prompts, texts or conversations; see `FusedCausalLM.encode`.

        chat      how conversations are rendered: for all of them, or one per prompt
        """
        rows = as_prompts(prompts)
        if self.tokenizer is None:
            raise BadSetting(
                "this fused model has no tokenizer.",
                "None of its members has tokenizer files beside it.",
                "copy tokenizer.json and tokenizer_config.json beside the strong model, or pass tokenizer=... to "
                "from_members.",
            )
        if isinstance(chat, ChatArguments):
            self._check_effect(rows, chat)
            chat = [chat] * len(rows)
        plain = PromptForm()
        shared = [plain.render(self.tokenizer, prompt, asked) for prompt, asked in zip(rows, chat, strict=True)]
        return self._inputs(rows, shared, chat)

    def _check_effect(self, prompts: Sequence[Any], chat: ChatArguments) -> None:
        """Refuses arguments for chat templates that no prompt goes through, and warns about those that none reads."""
        if chat.is_empty:
            return
        forms = [self.forms.get(name, PromptForm()) for name in self.member_names]
        is_talk = any(not isinstance(prompt, str) for prompt in prompts)
        used = [form for form in forms if form.chat is not None or (is_talk and form.template is None)]
        if not used:
            raise BadSetting(
                "arguments for a chat template are given, but the prompt is a text.",
                "A text is read as it is.",
                'pass a conversation, [{"role": "user", "content": ...}], or leave them out.',
            )
        templates = [form.template_for(self.tokenizer, chat) for form in used]
        warn_of_unread(chat, [template for template in templates if template is not None])

    def own_inputs(self, input_ids: Int[Tensor, "batch time"], mask: Tensor | None) -> dict[str, Any]:
        """The members' own prompts for tokens that came without them: rendered from the text that they decode to.

        raises    BadSetting where the tokenizer would make other tokens of that text
        """
        kept = torch.ones_like(input_ids) if mask is None else mask
        shared = [row[keep.bool()].tolist() for row, keep in zip(input_ids, kept, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in shared]
        if any(ids_of(self.tokenizer, text) != row for text, row in zip(texts, shared, strict=True)):
            raise BadSetting(
                "these tokens are not what the tokenizer makes of their text, so members cannot be given their own "
                "rendering of it.",
                "Members of this fused model read prompts of their own.",
                "call generate(**fused.encode(prompts)) with the prompts as they were written.",
            )
        inputs = self._inputs(texts, shared, [NOTHING_ASKED] * len(texts)) | {"prompt_length": input_ids.shape[1]}
        return {name: inputs[name] for name in OWN_INPUTS}

    def _inputs(
        self, prompts: Sequence[Any], shared: Sequence[list[int]], chat: Sequence[ChatArguments]
    ) -> dict[str, Any]:
        """Inputs of prompts whose shared tokens are known."""
        if not all(shared):
            raise empty_prompt(f"prompt {[len(ids) for ids in shared].index(0)} has no tokens.")
        ids, mask = left_padded(shared, self.pad_id)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if not self.readers:
            return inputs
        forms = [self.forms.get(name, PromptForm()) for name in self.member_names]
        rendered = [
            plain if form.is_plain else form.render(self.tokenizer, prompt, asked)
            for prompt, plain, asked in zip(prompts, shared, chat, strict=True)
            for form in forms
        ]
        own_ids, own_mask = left_padded(rendered, self.pad_id)
        shape = (len(shared), len(forms), own_ids.shape[1])
        return inputs | dict(zip(OWN_INPUTS, (own_ids.view(shape), own_mask.view(shape), ids.shape[1]), strict=True))
