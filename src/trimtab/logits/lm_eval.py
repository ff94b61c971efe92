"""A fused directory as a model of lm-evaluation-harness.

Declared in the entry-point group `lm_eval.models`, for versions that read it: `lm_eval --model trimtab --model_args
pretrained=DIR`. Version 0.4.13 does not; there `trimtab eval` is the way.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from torch import Tensor
from transformers import StoppingCriteriaList

from trimtab.core.errors import BadSetting, TrimtabError
from trimtab.logits.speculation.report import SpeculationReport
from trimtab.models.chat_templates import template_of
from trimtab.models.conversations import (
    ChatArguments,
    checked_messages,
    chosen_template,
    render_conversation,
    warn_of_unread,
)


class RowWiseStop(MultiTokenEOSCriteria):  # type: ignore[misc]
    """The harness's stop text, by its own look at the last tokens, but a row ends when it comes and waits for no other.

    The answer is what the harness has with one row at a time. Only in batches, where its own keeps account of all rows
    by their places, would drafts be refused: each row of a draft keeps its own length.
    """

    is_row_wise = True
    looks_back = False  # it goes by the text alone

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[batch] bool."""
        ends = input_ids[:, self.initial_decoder_input_length :][:, -self.sequence_id_len :]
        found = [self.sequence in text for text in self.tokenizer.batch_decode(ends)]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


@register_model("trimtab")
class TrimtabLM(HFLM):  # type: ignore[misc]
    """A fused model, opened from its directory or given loaded.

    speculation   what it did in each batch of generated answers so far
    """

    def __init__(
        self,
        pretrained: Any,
        strategy: str | None = None,
        batch_size: int | str = 64,
        template_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        pretrained      a fused directory, or a loaded FusedCausalLM
        strategy        another amount than the one that the directory names, with its default settings
        batch_size      prompts at once, or "auto" ("auto:N" tries again N times) for as many as fit
        template_name   of several chat templates the one that conversations go through
        kwargs          dtype and device for opening; others go to HFLM (chat_template_args, enable_thinking ...)
        """
        from trimtab.logits.model import FusedCausalLM

        if isinstance(pretrained, str):
            opening = {name: kwargs.pop(name) for name in ("dtype", "device") if kwargs.get(name) is not None}
            pretrained = FusedCausalLM.from_pretrained(pretrained, **opening)
        if strategy is not None:
            pretrained.strategy = strategy
        self.speculation: list[SpeculationReport] = []
        self._template_name = template_name
        super().__init__(pretrained=pretrained, tokenizer=pretrained.tokenizer, batch_size=batch_size, **kwargs)
        templates = template_of(self.tokenizer)
        texts = list(templates.values()) if isinstance(templates, dict) else [templates or ""]
        warn_of_unread(ChatArguments(values=self.chat_template_args), texts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; False: its last message is continued.

        raises    BadSetting where the template refuses it: HFLM would drop the system message and go on

        HFLM looks a named template up and then uses the default one; here the name counts.
        """
        chat = ChatArguments(
            continue_final_message=not add_generation_prompt,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template_name,
            values=self.chat_template_args,
        )
        template = chosen_template(template_of(self.tokenizer), chat)
        if template is None:
            raise BadSetting(
                "the tokenizer has no chat template, nor has any member.",
                "--apply-chat-template puts items into it.",
                "leave it out, or give a template: --chat-template FILE.",
            )
        return render_conversation(self.tokenizer, checked_messages(chat_history), template, chat)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """[row, time]: prompts and answers, which the harness cuts. It has settled do_sample and temperature before."""
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)
        elif "temperature" in generation_kwargs:  # lm_eval reads "1" as an int, which transformers refuses
            generation_kwargs["temperature"] = float(generation_kwargs["temperature"])
        width = context.shape[1]
        stops = StoppingCriteriaList(RowWiseStop(text, self.tokenizer, width, len(context)) for text in stop)
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            try:
                output: Tensor = self.model.generate(
                    input_ids=context,
                    max_length=max_length,
                    stopping_criteria=stops,
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                    repeatable=True,  # the harness sets torch's seed
                    **generation_kwargs,
                )
            except (ValueError, TypeError) as error:
                if isinstance(error, TrimtabError):
                    raise
                raise BadSetting(
                    f"generate refuses the arguments: {error}",
                    f"They are {generation_kwargs}.",
                    "correct --gen-kwargs, or the task's generation_kwargs.",
                ) from error
        self.speculation.append(self.model.last_speculation)
        return output
