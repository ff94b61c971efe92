"""A fused model is a model: strong, base and experts, run on the same tokens and fused position by position.

`FusedCausalLM` is a transformers model, so `generate` with all that it knows, pipelines, streamers and lm-eval work
unchanged. What is fused at a position depends on that position's logits alone.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from trimtab.core.errors import BadSetting, TrimtabWarning
from trimtab.logits import members as member_loading
from trimtab.logits import prompts as prompt_forms
from trimtab.logits import saving, vocabulary
from trimtab.logits.cache import FusedCache
from trimtab.logits.config import FusedConfig
from trimtab.logits.members import Members, Placement
from trimtab.logits.prompts import OwnPrompts, PromptForm
from trimtab.logits.reading import BrokenLaw, Reader, kept_after_prompt, too_long
from trimtab.logits.strategy import Strategy, make_strategy, strategy_from_dict
from trimtab.logits.trace import Trace, TraceStep, trace_steps

NOT_OFFERED = ("inputs_embeds", "output_attentions", "output_hidden_states")
OWN_INPUTS = ("member_prompt_ids", "member_prompt_mask", "prompt_length")


class FusedCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Strong + strategy(experts - base) as one causal language model; its logits are fused log-probabilities.

    Build it with `from_members`, or open a directory with `from_pretrained`.
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
        self.reader = Reader(members, self.forms, config.vocab_size)
        self.strategy = strategy
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
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
    ) -> "FusedCausalLM":
        """A fused model from loaded models or references (a path, a hub id, `id@revision`, `zoo:NAME`).

        strong, base    models or references; base is the untuned twin of the experts
        experts         {name: model or reference}; a PEFT adapter directory is an adapter on the base
        strategy        a Strategy, an amount's name, or {"amount", "chooser", "settings"}
        tokenizer       what all members share; None: the one beside the strong model, or beside another member
        prompts         {member: form} for members that read a prompt of their own, see `trimtab.logits.prompts`
        dtype, device   for all members or {member: ...}; None: as stored (embedded models: float32), on the CPU; loaded
                        models stay as they are
        raises          VocabularyMismatch, MemberMismatch, UnreadableModel, OfflineError, UnknownName, BadSetting
        warns           TrimtabWarning for an expert that does not descend from the base
        """
        members = member_loading.gather(strong, base, experts, Placement(dtype, device, attn_implementation))
        fused = cls._of(members, strategy, tokenizer, prompts or {})
        member_loading.check_descent(members, fused.reader.read_alone, fused.config.vocab_size)
        return fused

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Opens a fused directory; the members are loaded from where it says, and must be what they were.

        kwargs    dtype, device or device_map (for all members or {member: ...}), attn_implementation, strategy (another
                  one than the directory's); what transformers' Auto classes pass along beside these has no meaning here
        returns   FusedCausalLM; with output_loading_info=True also transformers' loading report
        raises    UnreadableModel, OfflineError, MemberMismatch when a member has changed
        """
        directory = Path(os.fspath(directory))
        if kwargs.get("trust_remote_code"):
            raise BadSetting("trust_remote_code is set.", "Code of others is never run.", "leave it out.")
        found = saving.read_config(directory)
        # The Auto classes hand over the configuration that they have read, the caller's changes in it.
        config = kwargs["config"] if isinstance(kwargs.get("config"), FusedConfig) else found
        dtype, device = kwargs.get("dtype", kwargs.get("torch_dtype")), kwargs.get("device", kwargs.get("device_map"))
        placement = Placement(dtype, device, kwargs.get("attn_implementation"))
        strong, base, experts = saving.references_of(config)
        members = member_loading.gather(strong, base, experts, placement, beside=directory)
        strategy = kwargs.get("strategy") or config.strategy
        fused = cls._of(members, strategy, vocabulary.load_tokenizer(directory), config.prompts or {})
        fused.name_or_path = fused.config.name_or_path = str(directory)
        return (fused, dict(saving.NOTHING_MISSING)) if kwargs.get("output_loading_info") else fused

    @classmethod
    def _of(cls, members: Members, strategy: Any, tokenizer: Any, prompts: Mapping[str, Any]) -> "FusedCausalLM":
        tokenizers = {member.name: member.tokenizer for member in members if member.tokenizer is not None}
        if tokenizer is not None:
            tokenizers = {"the tokenizer given": tokenizer} | tokenizers
        vocabulary.check_tokenizers(tokenizers)
        tokenizer = next(iter(tokenizers.values()), None)
        size = vocabulary.fused_size(tokenizer, {member.name: member.rows for member in members})
        config = saving.make_config(members, tokenizer, size)
        forms = saving.read_forms(members, tokenizer, prompts)
        config.prompts = {name: form.to_dict() for name, form in forms.items()} or None
        return cls(config, members, strategy, tokenizer, forms)

    def save_pretrained(self, save_directory: str | os.PathLike[str], overwrite: bool = True, **kwargs: Any) -> None:
        """Writes config.json (references, strategy, prompts) and the tokenizer; no weights.

        Paths of members that lie beside or below the directory are written relative to it. The rest of what
        transformers' save_pretrained knows (shard sizes, pushing to the hub) has no meaning here and is refused.

        overwrite   False: refuse a directory that holds a fused model already
        raises      MemberMismatch when a member lives in memory only; BadSetting for a directory of something else
        """
        if kwargs.get("push_to_hub"):
            raise BadSetting("push_to_hub is set.", "A fused directory names members of this machine.", "leave it out.")
        saving.write_directory(self.config, self.members, self.tokenizer, Path(os.fspath(save_directory)), overwrite)

    # ---- what it is made of

    @property
    def strategy(self) -> Strategy:
        """How much of whom is added; it can be set, also by name or from a dictionary."""
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: Strategy | str | Mapping[str, Any]) -> None:
        names = self.expert_names
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, expert_names=names)
        elif isinstance(strategy, Mapping):
            strategy = strategy_from_dict(strategy, names)
        self._strategy = strategy.for_experts(names) if names else strategy
        self.config.strategy = self._strategy.to_dict()

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
        return any(not form.is_plain for form in self.forms.values())

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
        """Fused log-probabilities of the next token.

        input_ids         [batch, time]   the tokens that the cache does not hold yet
        attention_mask    [batch, past + time]   0 on padding, left or right; None: no padding
        past_key_values   FusedCache, as an earlier call returned it
        labels            [batch, time]   adds the mean negative log-likelihood of the next token; -100 is not counted
        logits_to_keep    how many last positions to score, or which ones; 0: all
        member_prompt_*   and prompt_length: what `encode` returns for members with own prompts
        returns           CausalLMOutputWithPast: logits [batch, kept, vocab] float32, on padding the uniform law
        raises            ContextTooLong and BrokenLaw, naming the member; EmptyPrompt
        """
        self._check_inputs(input_ids, attention_mask, past_key_values, kwargs)
        assert input_ids is not None
        cache: FusedCache | None = past_key_values
        own = self._own_prompts(member_prompt_ids, member_prompt_mask, prompt_length, cache)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.reader.new_cache(own)
        past = cache.get_seq_length() if cache is not None else 0
        if own is not None:
            logits_to_keep = kept_after_prompt(own, input_ids.shape[1], past, logits_to_keep, labels is not None)
        logits = self.reader.logits(input_ids, attention_mask, position_ids, cache, own, logits_to_keep)
        fused = self._fuse(
            logits, _is_real(attention_mask, input_ids.shape[1], logits_to_keep), past + input_ids.shape[1]
        )
        loss = None if labels is None else _mean_loss(fused, labels)
        output = CausalLMOutputWithPast(loss=loss, logits=fused, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _check_inputs(self, input_ids: Tensor | None, mask: Tensor | None, cache: Any, others: dict[str, Any]) -> None:
        for name in NOT_OFFERED:
            if others.get(name) is not None and others[name] is not False:
                raise BadSetting(
                    f"a fused model has no {name}.", "Its members differ in width and depth.", "ask one member for it."
                )
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

    def _fuse(self, logits: Sequence[Tensor], is_real: Tensor | None, end: int) -> Float[Tensor, "batch kept vocab"]:
        """Fused log-probabilities of all kept positions, a chunk at a time; `end` is the position after the last."""
        batch, kept = logits[0].shape[:2]
        vocab, device = self.config.vocab_size, logits[0].device
        is_one_chunk = is_real is None and batch * kept <= self.reader.chunk_rows
        fused = torch.full((0 if is_one_chunk else batch * kept, vocab), -math.log(vocab), device=device)
        for rows, laws in self.reader.laws(logits, end, is_real):
            log_probs = self._strategy(laws.strong, laws.base, laws.experts).log_probs
            if is_one_chunk:
                return log_probs.view(batch, kept, vocab)
            fused[rows.to(device)] = log_probs
        return fused.view(batch, kept, vocab)

    # ---- prompts

    def encode(self, prompts: Any) -> dict[str, Any]:
        """Model inputs of one or several prompts (texts or conversations), left-padded, for `generate(**inputs)`.

        `input_ids` is the shared, plain prompt. Where members have prompts of their own, their renderings travel along
        as `member_prompt_ids` and `member_prompt_mask` [batch, member, time], with the shared `prompt_length`.

        raises    EmptyPrompt; BadSetting without a tokenizer
        """
        rows = prompt_forms.as_prompts(prompts)
        if self.tokenizer is None:
            raise BadSetting("this fused model has no tokenizer.", fix="pass tokenizer=... to from_members.")
        return self._encode(rows, [PromptForm().render(self.tokenizer, prompt) for prompt in rows])

    def _encode(self, prompts: Sequence[Any], shared: Sequence[list[int]]) -> dict[str, Any]:
        """Inputs of prompts whose shared tokens are known."""
        if not all(shared):
            raise prompt_forms.empty_prompt(f"prompt {[len(ids) for ids in shared].index(0)} has no tokens.")
        pad_id = self.config.pad_token_id or 0
        ids, mask = prompt_forms.left_padded(shared, pad_id)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if not self.has_own_prompts:
            return inputs
        forms = [self.forms.get(name, PromptForm()) for name in self.member_names]
        rendered = [
            plain if form.is_plain else form.render(self.tokenizer, prompt)
            for prompt, plain in zip(prompts, shared, strict=True)
            for form in forms
        ]
        own_ids, own_mask = prompt_forms.left_padded(rendered, pad_id)
        shape = (len(shared), len(forms), own_ids.shape[1])
        own = (own_ids.view(shape).to(self.device), own_mask.view(shape).to(self.device), ids.shape[1])
        return inputs | dict(zip(OWN_INPUTS, own, strict=True))

    def _encode_tokens(self, input_ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The members' own prompts for tokens that came without them: rendered from the text that they decode to."""
        kept = torch.ones_like(input_ids) if mask is None else mask
        shared = [row[keep.bool()].tolist() for row, keep in zip(input_ids, kept, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in shared]
        if any(prompt_forms.ids_of(self.tokenizer, text) != row for text, row in zip(texts, shared, strict=True)):
            raise BadSetting(
                "these tokens are not what the tokenizer makes of their text, so members cannot be given their own "
                "rendering of it.",
                "Members of this fused model read prompts of their own.",
                "call generate(**fused.encode(prompts)) with the prompts as they were written.",
            )
        encoded = self._encode(texts, shared) | {"prompt_length": input_ids.shape[1]}
        return {name: encoded[name] for name in OWN_INPUTS}

    def _own_prompts(
        self, ids: Tensor | None, mask: Tensor | None, prompt_length: int | None, cache: FusedCache | None
    ) -> OwnPrompts | None:
        if cache is not None and (cache.own is not None or cache.get_seq_length() > 0):
            return cache.own
        if ids is not None and mask is not None and prompt_length is not None:
            own = self.reader.own_prompts(ids, mask, prompt_length)
            if cache is not None:
                cache.own = own
            return own
        if not self.has_own_prompts:
            return None
        named = ", ".join(f"'{name}'" for name, form in self.forms.items() if not form.is_plain)
        raise BadSetting(
            f"{named} read prompts of their own, but only the shared tokens came in.",
            "Nobody can tell where the prompt ends.",
            "call generate(**fused.encode(prompts)), fused.generate_text(prompts) or fused.score(prompts, ...).",
        )

    # ---- generating and scoring

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, trace: bool = False, **kwargs: Any) -> Any:
        """Generates as every transformers model does.

        trace     return what happened at each step instead: a Trace for one row, a list of them for several
        raises    EmptyPrompt, ContextTooLong, BrokenLaw (naming member and step)
        warns     TrimtabWarning when a text was cut because a member's context was full
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or inputs.numel() == 0:
            raise prompt_forms.empty_prompt("there are no tokens to continue.")
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(dim=-1).all()):
            raise prompt_forms.empty_prompt("a row of the batch is all padding.")
        is_fresh = kwargs.get("past_key_values") is None
        if is_fresh and self.has_own_prompts and kwargs.get("member_prompt_ids") is None:
            kwargs |= self._encode_tokens(inputs, mask)
        limit = self._limit_length(inputs, kwargs, args) if is_fresh else None
        try:
            output = super().generate(inputs, *args, **kwargs)
        except BrokenLaw as error:
            raise error.in_generation(inputs.shape[1]) from error
        sequences = output if isinstance(output, Tensor) else output.sequences
        if limit is not None:
            self._warn_if_cut(sequences[:, inputs.shape[1] :], *limit)
        return self._traces(inputs, sequences, kwargs) if trace else output

    def _limit_length(self, inputs: Tensor, kwargs: dict[str, Any], args: Sequence[Any]) -> tuple[int, str] | None:
        """Shortens a generation that a member's context cannot hold; returns the room and that member, if it did.

        raises    ContextTooLong when the prompt alone is too long
        """
        own_mask, mask = kwargs.get("member_prompt_mask"), kwargs.get("attention_mask")
        shared = inputs.shape[1] if mask is None else int(mask.sum(dim=-1).max())
        names = self.member_names

        def prompt_tokens(run: int) -> int:
            if own_mask is None:
                return shared
            return int(own_mask[:, names.index(self.reader.runs[run].name)].sum(dim=-1).max())

        room, name = self.reader.room(prompt_tokens)
        if room is None:
            return None
        if room < 1:
            run = next(index for index, run in enumerate(self.reader.runs) if run.name == name)
            raise too_long(name, prompt_tokens(run), prompt_tokens(run) + room - 1)
        given = args[0] if args else kwargs.get("generation_config")
        asked = _asked_tokens([kwargs, vars(given) if given is not None else {}], inputs.shape[1])
        if asked is None or asked <= room:
            return None
        kwargs.pop("max_length", None)
        kwargs["max_new_tokens"] = room
        return room, name

    def _warn_if_cut(self, generated: Tensor, room: int, name: str) -> None:
        ends = torch.tensor([*self._end_ids(), -1], device=generated.device)
        is_cut = ~torch.isin(generated, ends).any(dim=-1)
        if generated.shape[1] >= room and bool(is_cut.any()):
            warnings.warn(
                f"{int(is_cut.sum())} of {len(is_cut)} texts were cut after {room} new tokens: the context of member "
                f"'{name}' is full. Fix: shorten the prompt, or leave '{name}' out.",
                TrimtabWarning,
                stacklevel=3,
            )

    def _end_ids(self) -> list[int]:
        ends = self.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def generate_text(self, prompts: Any, **kwargs: Any) -> list[str]:
        """The continuations of one or several prompts, as text; kwargs are those of `generate`."""
        inputs = self.encode(prompts)
        output = self.generate(**inputs, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))

    def score(self, prompts: Any, continuations: Sequence[str]) -> Float[Tensor, " batch"]:
        """Log-likelihood of each continuation after its prompt, in nats, summed over its tokens: [batch]."""
        inputs = self.encode(prompts)
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
        laws = self(**inputs, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]  # [batch, time, vocab]
        log_probs: Tensor = laws.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return (log_probs * mask).sum(dim=-1)

    # ---- tracing

    def trace(self, prompt: Any, **kwargs: Any) -> Trace:
        """Generates after one prompt (a text, a conversation, or token ids [time]) and records every step."""
        if isinstance(prompt, Tensor):
            inputs = {"input_ids": prompt.reshape(1, -1).to(self.device)}
        else:
            inputs = self.encode(prompt)
        if inputs["input_ids"].shape[0] > 1:
            raise BadSetting("trace takes one prompt.", fix="call generate(**fused.encode(prompts), trace=True).")
        traces = self.generate(**inputs, **kwargs, trace=True)
        return traces if isinstance(traces, Trace) else traces[0]

    def _traces(self, inputs: Tensor, sequences: Tensor, kwargs: Mapping[str, Any]) -> Trace | list[Trace]:
        """What happened at every generated position, read again in one pass: fusion depends on the tokens alone."""
        copies = sequences.shape[0] // inputs.shape[0]
        names = ("attention_mask", *OWN_INPUTS[:2])
        tensors = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        found = []
        for index, sequence in enumerate(sequences):
            row = slice(index // copies, index // copies + 1)
            parts = {name: tensor[row] for name, tensor in tensors.items()}
            found.append(self._trace(sequence, inputs.shape[1], kwargs.get("prompt_length"), **parts))
        return found[0] if len(found) == 1 else found

    def _trace(
        self,
        sequence: Tensor,
        start: int,
        prompt_length: int | None,
        attention_mask: Tensor | None = None,
        member_prompt_ids: Tensor | None = None,
        member_prompt_mask: Tensor | None = None,
    ) -> Trace:
        mask = torch.ones_like(sequence[:start]) if attention_mask is None else attention_mask[0]
        new_ids = _until_end(sequence[start:].tolist(), self._end_ids())
        own = self._own_prompts(member_prompt_ids, member_prompt_mask, prompt_length, None)
        # The last token needs no reading: the law that it was drawn from stands at the position before it.
        read = sequence[: start + len(new_ids) - 1].unsqueeze(0)
        full = torch.cat([mask, mask.new_ones(max(read.shape[1] - start, 0))]).unsqueeze(0)
        logits = self.reader.logits(read, full, own=own, logits_to_keep=len(new_ids))
        steps: list[TraceStep] = []
        for rows, laws in self.reader.laws(logits, read.shape[1]):
            fusion = self._strategy(laws.strong, laws.base, laws.experts)
            here = [new_ids[row] for row in rows.tolist()]
            steps += trace_steps(self.tokenizer, here, laws, fusion, self.expert_names)
        prompt_ids = sequence[:start][mask.bool()].tolist()
        texts = [str(ids) if self.tokenizer is None else self.tokenizer.decode(ids) for ids in (prompt_ids, new_ids)]
        return Trace(texts[0], texts[1], self._strategy.to_dict(), list(self.expert_names), steps)

    # ---- what `generate` asks for

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Puts a FusedCache where generate looks for it; the members' own prompts travel in it from then on."""
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise BadSetting(
                f"cache_implementation='{kind}' is not for fused models.",
                "Known: dynamic (the default) and static.",
                "leave it out.",
            )
        ids, mask, prompt_length = (model_kwargs.pop(name, None) for name in OWN_INPUTS)
        own = self._own_prompts(ids, mask, prompt_length, None)
        if own is not None and generation_config.prefill_chunk_size is not None:
            raise BadSetting(
                "prefill_chunk_size is set, but members read prompts of their own.",
                "Chunks of the shared prompt mean nothing to them.",
                "leave it out.",
            )
        cache = self.reader.new_cache(own, max_cache_length if kind == "static" else None)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _validate_generation_mode(self, mode: Any, generation_config: Any, mode_kwargs: dict[str, Any]) -> None:
        """A member may assist although its output layer has padding rows: its tokens are the same."""
        if any(mode_kwargs.get("assistant_model") is body for body in self.bodies):
            mode_kwargs = {name: value for name, value in mode_kwargs.items() if name != "assistant_model"}
        super()._validate_generation_mode(mode, generation_config, mode_kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Drafts for assisted generation, within the length that was asked for and the fused vocabulary.

        transformers lets a draft that was looked up in the prompt reach beyond the length and drops the rest later; a
        member may be unable to read it. A drafted padding row ends the draft before it; the law of what remains is the
        assistant's on the fused vocabulary, so sampling stays exact.
        """
        drafts = super()._get_candidate_generator(*args, **kwargs)
        draft, vocab = drafts.get_candidates, self.config.vocab_size
        most = kwargs["generation_config"].max_length - 1

        def readable_draft(input_ids: Tensor, **more: Any) -> Any:
            candidates, logits = draft(input_ids, **more)
            start = input_ids.shape[1]
            beyond = (candidates[0, start:] >= vocab).nonzero().flatten().tolist()
            end = max(start, min([most, candidates.shape[1], *(start + at for at in beyond[:1])]))
            is_bare = logits is None or end == start  # transformers wants no law where there is no draft
            return candidates[:, :end], None if is_bare else logits[:, : end - start, :vocab]

        drafts.get_candidates = readable_draft
        return drafts


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


def _asked_tokens(sources: Sequence[Mapping[str, Any]], prompt_tokens: int) -> int | None:
    """How many new tokens the caller asked for; None when generate's own default decides."""
    for source in sources:
        if source.get("max_new_tokens") is not None:
            return int(source["max_new_tokens"])
    for source in sources:
        if source.get("max_length") is not None:
            return int(source["max_length"]) - prompt_tokens
    return None


def _until_end(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end, which is kept; what follows is padding."""
    for count, token_id in enumerate(token_ids, start=1):
        if token_id in ends:
            return token_ids[:count]
    return token_ids


AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
AutoModelForCausalLM.register(FusedConfig, FusedCausalLM, exist_ok=True)
