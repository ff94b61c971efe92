"""A fused model is a model: strong, base and experts, run on the same tokens and fused position by position.

`FusedCausalLM` is a transformers model, so `generate` with all that it knows, pipelines, streamers and lm-eval work
unchanged. What is fused at a position depends on that position's logits alone.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from trimtab.core.errors import BadSetting
from trimtab.logits import arguments, generation_settings, saving
from trimtab.logits import members as member_loading
from trimtab.logits.config import FusedConfig
from trimtab.logits.forward.cache import FusedCache
from trimtab.logits.forward.encoding import OWN_INPUTS, PromptEncoder
from trimtab.logits.forward.grouping import OnePass
from trimtab.logits.forward.reader import Reader, kept_after_prompt
from trimtab.logits.forward.streams import Streams
from trimtab.logits.generation import FusedGenerationMixin, check_offered
from trimtab.logits.members import Members
from trimtab.logits.speculation.plan import Plan
from trimtab.logits.strategy.fusion import Strategy, as_strategy
from trimtab.logits.trace import Trace, TraceStep, trace_steps
from trimtab.models import prompts as prompt_forms
from trimtab.models.conversations import ChatArguments
from trimtab.models.loading import Placement
from trimtab.models.prompts import OwnPrompts, PromptForm
from trimtab.models.token_ids import FusedVocabulary
from trimtab.models.vocabulary import TokenSettings, load_tokenizer


class FusedCausalLM(PreTrainedModel, FusedGenerationMixin):  # type: ignore[misc]
    """Strong + strategy(experts - base) as one causal language model.

    The softmax of its logits is the fused distribution. Build it with `from_members`, or open a directory with
    `from_pretrained`.
    """

    config_class = FusedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: FusedConfig,
        members: Members,
        strategy: Strategy | str | Mapping[str, Any],
        tokenizer: Any = None,
        forms: Mapping[str, PromptForm] | None = None,
    ) -> None:
        super().__init__(config)
        self.members = members
        self.tokenizer = tokenizer
        self.forms = dict(forms or {})
        # Registered once each, the strong model first: transformers takes device and dtype from the first parameter.
        self.bodies = nn.ModuleList(list({id(member.model): member.model for member in members}.values()))
        self.vocabulary = FusedVocabulary.from_dict(config.vocab_size, config.vocabulary)
        self.reader = Reader(members, self.forms, self.vocabulary, config.one_pass)
        self.encoder = PromptEncoder(tokenizer, self.member_names, self.forms, config.pad_token_id or 0)
        self.strategy = strategy
        self._plan = Plan(config.speculate, config.speculate_draft).check(self.expert_names)
        self.generation_config = generation_settings.from_strong(members.strong.model.generation_config, config)
        self.eval()

    # ---- building, opening, saving

    @classmethod
    def from_members(
        cls,
        strong: Any,
        base: Any,
        experts: Mapping[str, Any],
        strategy: Strategy | str | Mapping[str, Any] = "dynamic",
        tokenizer: Any = None,
        prompts: Mapping[str, Any] | None = None,
        *,
        dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        one_pass: OnePass = "auto",
        chat_template: str | None = None,
        token_map: Mapping[str, Mapping[str, str]] | None = None,
        special_tokens: str | None = None,
    ) -> "FusedCausalLM":
        """A fused model from loaded models or references (a path, a hub id, `id@revision`, `zoo:NAME`).

        strong, base    models or references; base is the untuned twin of the experts
        experts         {name: model or reference}; a PEFT adapter directory is an adapter on the base
        strategy        a Strategy, an amount's name, or {"amount", "chooser", "settings"}
        tokenizer       what all members share; None: the one beside the strong model, or beside another member
        prompts         {member: form} for members that read a prompt of their own, see `trimtab.models.prompts`
        dtype, device   for all members or {member: ...}; None: as stored (embedded models: float32), on the CPU; loaded
                        models stay as they are; device="auto" spreads a member over what there is
        quantization_config   of transformers, for all members or {member: ...}: they are quantized while loading
        max_memory      {device: bytes or "20GiB"} that members spread by device="auto" may take together
        one_pass        whether small members are read in one forward: "auto", True or False, see the property
        chat_template   how conversations are written: a member's name, the name of one of its templates, a file, or
                        Jinja; None: the strong model's template, or that of another member
        token_map       {expert: {A: B}}: the expert's token A stands for the strong model's token B, of special tokens
                        that were renamed
        special_tokens  "strong": an id of a special token means in all members what it means in the strong model
        raises          VocabularyMismatch, MemberMismatch, UnreadableModel, OfflineError, UnknownName, BadSetting
        warns           TrimtabWarning for an expert that does not descend from the base, for chat templates that differ
                        between experts, and, in one line, for tokens that are cut or have delta 0
        """
        placement = Placement(dtype, device, attn_implementation, quantization_config, max_memory or None)
        members = member_loading.gather(strong, base, experts, placement)
        token_settings = TokenSettings(token_map or {}, special_tokens)
        fused = cls._of(members, strategy, tokenizer, prompts or {}, one_pass, chat_template, token_settings)
        member_loading.check_descent(members, fused.reader.read_alone, fused.config.vocab_size, prompts or ())
        return fused

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Opens a fused directory; the members are loaded from where it says, and must be what they were.

        kwargs    dtype, device or device_map, quantization_config (for all members or {member: ...}), max_memory and
                  attn_implementation, see `from_members`; strategy and one_pass (others than the directory's),
                  use_cache, config (of this directory; references, strategy, prompts, one_pass and use_cache may be
                  changed in it), generation_config (in place of the file in the directory); what else transformers
                  knows may only be passed at its default
        returns   FusedCausalLM; with output_loading_info=True also transformers' loading report
        raises    UnreadableModel, OfflineError, MemberMismatch when a member has changed; BadSetting for an argument
                  without effect
        """
        directory = Path(os.fspath(directory))
        use_cache = kwargs.pop("use_cache", None)
        arguments.check_opening(args, kwargs)
        found = saving.read_config(directory)
        # The Auto classes hand over the configuration that they have read, the caller's changes in it.
        config = found if kwargs.get("config") is None else kwargs["config"]
        arguments.check_config(config, found)
        dtype, device = (
            next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
            for names in (("dtype", "torch_dtype"), ("device", "device_map"))
        )
        placement = Placement(
            dtype,
            device,
            kwargs.get("attn_implementation"),
            kwargs.get("quantization_config"),
            kwargs.get("max_memory") or None,  # harnesses pass an empty one where there is no accelerator
        )
        strong, base, experts = saving.references_of(config)
        members = member_loading.gather(strong, base, experts, placement, beside=directory)
        strategy = kwargs.get("strategy") or config.strategy
        one_pass = config.one_pass if kwargs.get("one_pass") is None else kwargs["one_pass"]
        token_settings = TokenSettings(config.token_map or {}, config.special_tokens)
        tokenizer = load_tokenizer(directory)
        fused = cls._of(
            members, strategy, tokenizer, config.prompts or {}, one_pass, None, token_settings, is_known=True
        )
        fused.config.use_cache = config.use_cache if use_cache is None else bool(use_cache)
        fused._set_plan(Plan(config.speculate, config.speculate_draft))
        fused._set_generation(directory, kwargs.get("generation_config"))
        fused.name_or_path = fused.config.name_or_path = str(directory)
        return (fused, dict(saving.NOTHING_MISSING)) if kwargs.get("output_loading_info") else fused

    @classmethod
    def _of(
        cls,
        members: Members,
        strategy: Any,
        tokenizer: Any,
        prompts: Mapping[str, Any],
        one_pass: OnePass,
        chat_template: str | None = None,
        token_settings: TokenSettings | None = None,
        is_known: bool = False,
    ) -> "FusedCausalLM":
        settled = saving.settle(members, tokenizer, prompts, one_pass, chat_template, token_settings, is_known)
        config, tokenizer, forms = settled
        return cls(config, members, strategy, tokenizer, forms)

    def _set_generation(self, directory: Path, given: GenerationConfig | None) -> None:
        """What `generate` does unasked: the settings given, else the directory's, else the strong model's."""
        if given is not None:
            self.generation_config = generation_settings.completed(given, self.config)
        else:
            self.generation_config = generation_settings.read(directory, self.config) or self.generation_config

    def save_pretrained(self, save_directory: str | os.PathLike[str], overwrite: bool = True, **kwargs: Any) -> None:
        """Writes config.json (references, strategy, prompts), generation_config.json and the tokenizer; no weights.

        Paths of members that lie beside or below the directory are written relative to it. The rest of what
        transformers' save_pretrained knows (shard sizes, pushing to the hub) has no meaning here and is refused,
        unless it is passed at its default; with is_main_process=False nothing is written.

        overwrite   False: refuse a directory that holds a fused model already
        raises      MemberMismatch when a member lives in memory only; BadSetting for a directory of something else, or
                    for an argument without effect
        """
        arguments.check_saving(kwargs)
        if kwargs.get("is_main_process") is False:  # several processes, of which another one writes
            return
        target = Path(os.fspath(save_directory))
        saving.write_directory(self.config, self.members, self.tokenizer, target, overwrite, self.generation_config)

    # ---- what it is made of

    @property
    def strategy(self) -> Strategy:
        """How much of whom is added; it can be set, also by name or from a dictionary."""
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: Strategy | str | Mapping[str, Any]) -> None:
        self._strategy = as_strategy(strategy, self.expert_names)
        self.config.strategy = self._strategy.to_dict()
        if self._cost_model is not None:  # another distribution takes other drafts; forwards cost what they did
            self._cost_model = replace(self._cost_model, histories={})

    @property
    def speculate(self) -> str | int:
        """Whether small members draft: "auto", 0 (never) or a number of tokens per draft; it can be set."""
        return self._plan.speculate

    @speculate.setter
    def speculate(self, speculate: str | int) -> None:
        self._set_plan(Plan(speculate, self._plan.draft))

    @property
    def speculate_draft(self) -> str:
        """Who drafts, see `trimtab.logits.speculation.draft`; it can be set."""
        return self._plan.draft

    @speculate_draft.setter
    def speculate_draft(self, draft: str) -> None:
        self._set_plan(Plan(self._plan.speculate, draft))

    @property
    def one_pass(self) -> OnePass:
        """Whether small members that share weights or architecture are read in one forward; it can be set.

        "auto": where it pays, by a rule that was measured; True: all of them, or BadSetting says which cannot and why;
        False: each by itself. The logits are the same. `reader.groups` shows what is read together, and for what is
        read alone the reason. Caches made before do not fit afterwards.
        """
        return self.config.one_pass  # type: ignore[no-any-return]

    @one_pass.setter
    def one_pass(self, one_pass: OnePass) -> None:
        reader = Reader(self.members, self.forms, self.vocabulary, one_pass, is_opening=False)
        reader.streams = Streams(reader.groups, self.streams)
        self.reader, self.config.one_pass, self._cost_model = reader, one_pass, None

    @property
    def streams(self) -> bool:
        """Whether groups that share an accelerator are read on streams of their own; it can be set, and is not saved.

        Token by token only: drafts are timed group by group. False by default, since no device has been measured yet.
        Raises BadSetting where no accelerator reads several members.
        """
        return self.reader.streams.is_on

    @streams.setter
    def streams(self, is_on: bool) -> None:
        self.reader.streams = Streams(self.reader.groups, is_on)

    def _set_plan(self, plan: Plan) -> None:
        self._plan = plan.check(self.expert_names)
        self.config.speculate, self.config.speculate_draft = self._plan.speculate, self._plan.draft

    @property
    def expert_names(self) -> tuple[str, ...]:
        """In the order of the expert axis."""
        return tuple(self.members.experts)

    @property
    def member_names(self) -> tuple[str, ...]:
        """strong, base, then the experts: the order of the member axis."""
        return tuple(member.name for member in self.members)

    @property
    def has_own_prompts(self) -> bool:
        """Whether any member reads another prompt than the plain one."""
        return bool(self.encoder.readers)

    def get_input_embeddings(self) -> Any:
        """The strong model's."""
        return self.members.strong.model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: there is no single output layer."""

    # ---- reading and fusing

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        member_prompt_ids: Int[Tensor, "batch member own"] | None = None,
        member_prompt_mask: Int[Tensor, "batch member own"] | None = None,
        prompt_length: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Fused logits of the next token: fused log-probabilities plus the strong model's log-sum-exp.

        Their log-softmax is the fused distribution. They have the strong model's zero point, so that processors do the
        same to them as to the strong model's logits: with alpha 0 these come back, within 1e-5 of the largest of them.

        input_ids         [batch, time]   the tokens that the cache does not hold yet
        attention_mask    [batch, past + time]   0 on padding, left or right; None: no padding
        past_key_values   FusedCache, as an earlier call returned it
        labels            [batch, time]   adds the mean negative log-likelihood of the next token; -100 is not counted
        logits_to_keep    how many last positions to score, or which ones; 0: all
        member_prompt_*   and prompt_length: what `encode` returns for members with own prompts
        returns           CausalLMOutputWithPast: logits [batch, kept, vocab] float32; on padding uniform log_probs
        raises            ContextTooLong and InvalidLogits, naming the member; EmptyPrompt
        """
        self._check_inputs(input_ids, attention_mask, past_key_values, kwargs)
        assert input_ids is not None
        cache: FusedCache | None = past_key_values
        own = self._own_prompts(member_prompt_ids, member_prompt_mask, prompt_length, cache)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.reader.new_cache(own)
        past = cache.get_seq_length() if cache is not None else 0
        if past == 0:
            input_ids = self._readable(input_ids, attention_mask)
        if own is not None:
            logits_to_keep = kept_after_prompt(own, input_ids.shape[1], past, logits_to_keep, labels is not None)
        logits = self.reader.logits(input_ids, attention_mask, position_ids, cache, own, logits_to_keep)
        log_probs, zero_point = self._fuse(
            logits, _is_real(attention_mask, input_ids.shape[1], logits_to_keep), past + input_ids.shape[1]
        )
        loss = None if labels is None else _mean_loss(log_probs, labels)
        # In place: nothing else holds these log-probabilities, and they may be large.
        output = CausalLMOutputWithPast(loss=loss, logits=log_probs.add_(zero_point), past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _readable(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The ids of a prompt; raises BadSetting for one that is not in the fused vocabulary."""
        return self.vocabulary.readable(input_ids, mask, self.config.pad_token_id, self.tokenizer)

    def _check_inputs(self, input_ids: Tensor | None, mask: Tensor | None, cache: Any, others: dict[str, Any]) -> None:
        check_offered(others)
        if input_ids is None or input_ids.numel() == 0:
            raise prompt_forms.empty_prompt("there are no tokens to read.")
        if mask is not None and mask.ndim != 2:
            raise BadSetting(f"the attention mask has {mask.ndim} axes.", "It is [batch, time].", "pass the 2-D mask.")
        if cache is not None and not isinstance(cache, FusedCache):
            raise BadSetting(
                f"past_key_values is a {type(cache).__name__}.",
                "The members' caches live in one FusedCache.",
                "leave it out, or pass what an earlier call returned.",
            )

    def _fuse(
        self, logits: Sequence[Tensor], is_real: Tensor | None, end: int
    ) -> tuple[Float[Tensor, "batch kept vocab"], Float[Tensor, "batch kept 1"]]:
        """Fused log-probabilities and the strong model's zero points at all kept positions, a chunk at a time.

        end    the position after the last one kept
        """
        batch, kept = logits[0].shape[:2]
        vocab, device = self.config.vocab_size, logits[0].device
        is_one_chunk = is_real is None and batch * kept <= self.reader.chunk_rows
        fused = torch.full((0 if is_one_chunk else batch * kept, vocab), -math.log(vocab), device=device)
        zero_points = torch.zeros((batch * kept, 1), device=device)
        for rows, members in self.reader.log_probs(logits, end, is_real):
            log_probs = self._strategy(members.strong, members.base, members.experts).log_probs
            if is_one_chunk:
                return log_probs.view(batch, kept, vocab), members.zero_point.view(batch, kept, 1)
            fused[rows.to(device)] = log_probs
            zero_points[rows.to(device)] = members.zero_point
        return fused.view(batch, kept, vocab), zero_points.view(batch, kept, 1)

    # ---- prompts

    def encode(self, prompts: Any, **chat: Any) -> dict[str, Any]:
        """Model inputs of one or several prompts (texts or conversations), left-padded, for `generate(**inputs)`.

        `input_ids` is the shared, plain prompt. Where members have prompts of their own, their renderings travel along
        as `member_prompt_ids` and `member_prompt_mask` [batch, member, time], with the shared `prompt_length`.

        A conversation that ends with the assistant's turn is to be continued, as in transformers' pipelines.

        chat      for conversations, as apply_chat_template takes them: tools, documents, continue_final_message,
                  add_generation_prompt, chat_template (Jinja or a name) and variables such as enable_thinking
        raises    EmptyPrompt; BadSetting without a tokenizer, for content that is no text, and for `chat` beside a text
        warns     TrimtabWarning for a variable that no chat template reads
        """
        return self._placed(self.encoder.encode(prompts, ChatArguments.of(chat)))

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part.to(self.device) if isinstance(part, Tensor) else part for name, part in inputs.items()}

    def _own_prompts(
        self, ids: Tensor | None, mask: Tensor | None, prompt_length: int | None, cache: FusedCache | None
    ) -> OwnPrompts | None:
        if cache is not None and (cache.own is not None or cache.get_seq_length() > 0):
            return cache.own
        if ids is not None and mask is not None and prompt_length is not None:
            own = self.reader.own_prompts(self._readable(ids, mask), mask, prompt_length)
            if cache is not None:
                cache.own = own
            return own
        if not self.has_own_prompts:
            return None
        named = ", ".join(f"'{name}'" for name in self.encoder.readers)
        raise BadSetting(
            f"{named} read prompts of their own, but only the shared tokens came in.",
            "Nobody can tell where the prompt ends.",
            "call generate(**fused.encode(prompts)), fused.generate_text(prompts) or fused.score(prompts, ...).",
        )

    # ---- generating and scoring

    def generate_text(
        self, prompts: Any, chat_template_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[str]:
        """The continuations of one or several prompts, as text.

        chat_template_kwargs    what `encode` takes for conversations; kwargs are those of `generate`
        """
        inputs: dict[str, Any] = self.encode(prompts, **chat_template_kwargs or {})
        output = self.generate(**inputs, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))

    def score(
        self, prompts: Any, continuations: Sequence[str], chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> Float[Tensor, " batch"]:
        """Log-likelihood of each continuation after its prompt, in nats, summed over its tokens: [batch].

        chat_template_kwargs    what `encode` takes for conversations
        """
        inputs = self.encode(prompts, **chat_template_kwargs or {})
        if len(continuations) != inputs["input_ids"].shape[0]:
            raise BadSetting(
                f"there are {inputs['input_ids'].shape[0]} prompts and {len(continuations)} continuations.",
                "Each continuation is scored after the prompt of its row.",
                "pass one continuation per prompt.",
            )
        answers = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in continuations]
        if not all(answers):
            raise prompt_forms.empty_prompt(f"continuation {[len(a) for a in answers].index(0)} has no tokens.")
        # Padded on the right: flipped, padded on the left, flipped back.
        ids, mask = (t.flip(-1).to(self.device) for t in prompt_forms.left_padded([a[::-1] for a in answers], 0))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=-1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=-1)
        logits = self(**inputs, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]  # [batch, time, vocab]
        log_probs: Tensor = logits.log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return (log_probs * mask).sum(dim=-1)

    # ---- tracing

    def trace(self, prompt: Any, chat_template_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> Trace:
        """Generates after one prompt (a text, a conversation, or token ids [time]) and records every step.

        chat_template_kwargs    what `encode` takes for conversations; kwargs are those of `generate`
        """
        if isinstance(prompt, Tensor):
            inputs: dict[str, Any] = {"input_ids": prompt.reshape(1, -1).to(self.device)}
        else:
            inputs = self.encode(prompt, **chat_template_kwargs or {})
        if inputs["input_ids"].shape[0] > 1:
            raise BadSetting("trace takes one prompt.", fix="call generate(**fused.encode(prompts), trace=True).")
        traces = self.generate(**inputs, **kwargs, trace=True)
        return traces if isinstance(traces, Trace) else traces[0]

    def _traces(
        self, inputs: Tensor, sequences: Tensor, kwargs: Mapping[str, Any], ends: Sequence[int]
    ) -> Trace | list[Trace]:
        """What happened at every generated position, read again in one pass: fusion depends on the tokens alone."""
        copies = sequences.shape[0] // inputs.shape[0]
        names = ("attention_mask", *OWN_INPUTS[:2])
        tensors = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        found = []
        for index, sequence in enumerate(sequences):
            row = slice(index // copies, index // copies + 1)
            parts = {name: tensor[row] for name, tensor in tensors.items()}
            new_ids = _until_end(sequence[inputs.shape[1] :].tolist(), ends, self.config.pad_token_id)
            found.append(self._trace(sequence[: inputs.shape[1]], new_ids, kwargs.get("prompt_length"), **parts))
        return found[0] if len(found) == 1 else found

    def _trace(
        self,
        prompt_ids: Int[Tensor, " time"],
        new_ids: list[int],
        prompt_length: int | None,
        attention_mask: Tensor | None = None,
        member_prompt_ids: Tensor | None = None,
        member_prompt_mask: Tensor | None = None,
    ) -> Trace:
        mask = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask[0]
        own = self._own_prompts(member_prompt_ids, member_prompt_mask, prompt_length, None)
        # The last token needs no reading: the distribution that it was drawn from stands at the position before it.
        read = torch.cat([prompt_ids, prompt_ids.new_tensor(new_ids[:-1])]).unsqueeze(0)
        full = torch.cat([mask, mask.new_ones(read.shape[1] - len(prompt_ids))]).unsqueeze(0)
        logits = self.reader.logits(read, full, own=own, logits_to_keep=len(new_ids))
        steps: list[TraceStep] = []
        for rows, members in self.reader.log_probs(logits, read.shape[1]):
            fusion = self._strategy(members.strong, members.base, members.experts)
            here = [new_ids[row] for row in rows.tolist()]
            steps += trace_steps(self.tokenizer, here, members, fusion, self.expert_names)
        plain_ids = prompt_ids[mask.bool()].tolist()
        texts = [str(ids) if self.tokenizer is None else self.tokenizer.decode(ids) for ids in (plain_ids, new_ids)]
        drafts = self.last_speculation.to_dict()
        return Trace(texts[0], texts[1], self._strategy.to_dict(), list(self.expert_names), steps, drafts)


def _is_real(mask: Tensor | None, new_tokens: int, logits_to_keep: int | Tensor) -> Tensor | None:
    """[batch, kept]: which of the positions to be scored are no padding; None: take them all."""
    if mask is None:
        return None
    mask = mask[:, -new_tokens:]
    if isinstance(logits_to_keep, Tensor):
        mask = mask[:, logits_to_keep.to(mask.device)]
    elif logits_to_keep > 0:
        mask = mask[:, -logits_to_keep:]
    return mask if mask.shape[1] > 1 else None


def _mean_loss(fused: Float[Tensor, "batch kept vocab"], labels: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the labels after the first kept position; -100 is not counted."""
    targets = labels[:, labels.shape[1] - fused.shape[1] :]
    return nn.functional.nll_loss(fused[:, :-1].flatten(0, 1), targets[:, 1:].flatten().to(fused.device))


def _until_end(token_ids: list[int], ends: Sequence[int], pad_id: int | None) -> list[int]:
    """The tokens up to the first end, which is kept, or to the padding behind a text that stopped otherwise."""
    for count, token_id in enumerate(token_ids, start=1):
        if token_id in ends:
            return token_ids[:count]
    while len(token_ids) > 1 and token_ids[-1] == pad_id:
        token_ids = token_ids[:-1]
    return token_ids


AutoModelForCausalLM.register(FusedConfig, FusedCausalLM, exist_ok=True)
