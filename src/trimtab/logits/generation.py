"""How a fused model generates: transformers' own `generate`, with the members' caches, prompts and limits put in."""

import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from trimtab.core.errors import BadSetting, TrimtabWarning
from trimtab.logits.forward.encoding import OWN_INPUTS, PromptEncoder
from trimtab.logits.forward.groups import too_long
from trimtab.logits.forward.reader import InvalidLogits, Reader
from trimtab.logits.members import Members
from trimtab.logits.speculation import generating
from trimtab.logits.speculation.decode import CostModel
from trimtab.logits.speculation.plan import AUTO, Plan, refuse
from trimtab.logits.speculation.report import SpeculationReport, last_report, note_report
from trimtab.models.prompts import empty_prompt
from trimtab.models.token_ids import FusedVocabulary

# The call of `generate` that is under way: whose, and its plan. Other threads, and calls within a call, have their own.
_UNDER_WAY: ContextVar[tuple[Any, Plan] | None] = ContextVar("under_way", default=None)
DEFAULT_NEW_TOKENS = 20  # transformers' own, where the caller names no length
SPECULATED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
NOT_OFFERED = ("inputs_embeds", "output_attentions", "output_hidden_states")


def check_offered(asked: Mapping[str, Any]) -> None:
    """Raise BadSetting where something is asked for that only one model by itself can take or give."""
    for name in NOT_OFFERED:
        if asked.get(name) is not None and asked[name] is not False:
            raise BadSetting(
                f"a fused model has no {name}.", "Its members differ in width and depth.", "ask one member for it."
            )


# transformers looks for "GenerationMixin" in the names of a model's base classes.
class FusedGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """What FusedCausalLM adds to generation; its methods that begin with _ are those that `generate` calls."""

    reader: Reader
    encoder: PromptEncoder
    members: Members
    vocabulary: FusedVocabulary
    _plan: Plan
    _cost_model: CostModel | None = None
    _latest: SpeculationReport = SpeculationReport(reason="nothing was generated yet")

    @property
    def last_speculation(self) -> SpeculationReport:
        """What speculation did in the last generation of the thread that asks, also where that ended with an error.

        A thread that has generated nothing with this model is told of the last generation that any thread finished.
        """
        return last_report(self) or self._latest

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        trace: bool = False,
        speculate: str | int | None = None,
        speculate_draft: str | None = None,
        repeatable: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates as every transformers model does.

        trace            return what happened at each step instead: a Trace for one row, a list of them for several
        speculate        "auto", 0 or a number of drafted tokens, see `Plan`; None: what the model is set to. Greedy and
                         sampled generation can be speculated; the distribution of the output is the same
        speculate_draft  who drafts, see `trimtab.logits.speculation.draft`; None: what the model is set to
        repeatable       whether one seed of torch gives one sampled text: with "auto", sampled drafts then have a fixed
                         length, where they can be and the members' sizes say that they pay. Otherwise measured seconds
                         choose their lengths, and other lengths draw other, equally valid texts
        raises           EmptyPrompt, ContextTooLong, InvalidLogits (naming member and step); BadSetting where drafts
                         were asked for by number and there can be none, and for embeddings in place of tokens,
                         attentions and hidden states. `last_speculation` says what was done
        warns            TrimtabWarning when a text was cut because a member's context was full
        """
        plan = generating.asked_plan(self._plan, speculate, speculate_draft, self.expert_names)
        asked = _asked(self.generation_config, args[0] if args else kwargs.get("generation_config"), kwargs)
        check_offered(asked)
        if asked.get("custom_generate") is not None:
            _refuse_number(plan)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or inputs.numel() == 0:
            raise empty_prompt("there are no tokens to continue.")
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(dim=-1).all()):
            raise empty_prompt("a row of the batch is all padding.")
        inputs = self._readable(inputs, mask)
        is_fresh = kwargs.get("past_key_values") is None
        if is_fresh and self.has_own_prompts and kwargs.get("member_prompt_ids") is None:
            kwargs |= self._placed(self.encoder.own_inputs(inputs, mask))
        ends = _listed(asked.get("eos_token_id"))
        limit = self._limit_length(inputs, kwargs, asked) if is_fresh else None
        note_report(self, SpeculationReport(reason=generating.OTHER_MODE))
        call = _UNDER_WAY.set((self, replace(plan, is_repeatable=repeatable)))
        try:
            output = super().generate(inputs, *args, **kwargs)
        except InvalidLogits as error:
            raise error.in_generation(inputs.shape[1]) from error
        finally:
            _UNDER_WAY.reset(call)
            self._latest = self.last_speculation
        sequences = output if isinstance(output, Tensor) else output.sequences
        if limit is not None:
            self._warn_if_cut(sequences[:, inputs.shape[1] :], ends, *limit)
        return self._traces(inputs, sequences, kwargs, ends) if trace else output

    def _limit_length(self, inputs: Tensor, kwargs: dict[str, Any], asked: Mapping[str, Any]) -> tuple[int, str] | None:
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
        if _asked_tokens(asked, inputs.shape[1]) <= room:
            return None
        kwargs.pop("max_length", None)
        kwargs["max_new_tokens"] = room
        return room, name

    def _warn_if_cut(self, generated: Tensor, ends: Sequence[int], room: int, name: str) -> None:
        padding = _listed(self.config.pad_token_id)
        finished = torch.tensor([*ends, *padding], dtype=torch.long, device=generated.device)
        is_cut = ~torch.isin(generated[:, -1], finished)
        if generated.shape[1] >= room and bool(is_cut.any()):
            warnings.warn(
                f"{int(is_cut.sum())} of {len(is_cut)} texts were cut after {room} new tokens: the context of member "
                f"'{name}' is full. Fix: shorten the prompt, or leave '{name}' out.",
                TrimtabWarning,
                stacklevel=3,
            )

    # ---- what `generate` asks for

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy and sampled generation: by drafts where they are asked for and can be, else token by token."""
        task = generating.Task(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
        )
        plan = self._plan_under_way()
        reason = generating.why_not(self, plan, task)
        report = SpeculationReport(reason=reason)
        note_report(self, report)
        if reason is None:
            return generating.speculative_sample(self, plan, task, report)
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _plan_under_way(self) -> Plan:
        """The plan of the call of `generate` that is under way; raises BadSetting where there is none."""
        call = _UNDER_WAY.get()
        if call is None or call[0] is not self:
            raise BadSetting(
                "`_sample` was called directly.",
                "`generate` prepares the prompt and the settings of drafts.",
                "call generate(...) of the fused model.",
            )
        return call[1]

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
        """A member may assist although its output layer has padding rows: its tokens are the same.

        raises    BadSetting where a number of drafted tokens was asked for, but this mode drafts in another way or none
        """
        if mode not in SPECULATED_MODES:
            _refuse_number(self._plan_under_way())
        if any(mode_kwargs.get("assistant_model") is body for body in self.bodies):
            self._check_assistant(mode_kwargs["assistant_model"])
            mode_kwargs = {name: value for name, value in mode_kwargs.items() if name != "assistant_model"}
        super()._validate_generation_mode(mode, generation_config, mode_kwargs)

    def _check_assistant(self, assistant: Any) -> None:
        """Raises BadSetting for a member whose ids are not the fused ones: an assistant's are not translated."""
        for member in self.members:
            if member.model is assistant and not self.vocabulary.has_plain_ids(member.name):
                raise BadSetting(
                    f"member '{member.name}' cannot be the assistant_model: its token ids are not the fused ones.",
                    "transformers hands an assistant's tokens on as they are.",
                    f"let it draft by speculate='auto', speculate_draft='{member.name}', which translates.",
                )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Drafts for assisted generation, within the length that was asked for and the fused vocabulary.

        transformers lets a draft that was looked up in the prompt reach beyond the length and drops the rest later; a
        member may be unable to read it. A drafted padding row ends the draft before it; what remains has the
        assistant's distribution on the fused vocabulary, so sampling stays exact.
        """
        drafts = super()._get_candidate_generator(*args, **kwargs)
        draft, vocab = drafts.get_candidates, self.config.vocab_size
        most = kwargs["generation_config"].max_length - 1

        def readable_draft(input_ids: Tensor, **more: Any) -> Any:
            candidates, logits = draft(input_ids, **more)
            start = input_ids.shape[1]
            beyond = (candidates[0, start:] >= vocab).nonzero().flatten().tolist()
            end = max(start, min([most, candidates.shape[1], *(start + at for at in beyond[:1])]))
            is_bare = logits is None or end == start  # transformers wants no distribution where there is no draft
            return candidates[:, :end], None if is_bare else logits[:, : end - start, :vocab]

        drafts.get_candidates = readable_draft
        return drafts


def _refuse_number(plan: Plan) -> None:
    """Raise BadSetting where drafts were asked for by number, for a way to generate that has none of ours."""
    if plan.speculate not in (0, AUTO):
        raise refuse(generating.OTHER_MODE, plan.speculate)


def _asked(default: Any, config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call asks for, as `generate` puts it together: its arguments, then its configuration, then the model's."""
    asked: dict[str, Any] = {}
    for settings in (vars(default), {} if config is None else vars(config), kwargs):
        asked |= {name: value for name, value in settings.items() if value is not None}
    return asked


def _asked_tokens(asked: Mapping[str, Any], prompt_tokens: int) -> int:
    """How many new tokens the caller asked for."""
    if asked.get("max_new_tokens") is not None:
        return int(asked["max_new_tokens"])
    if asked.get("max_length") is not None:
        return int(asked["max_length"]) - prompt_tokens
    return DEFAULT_NEW_TOKENS


def _listed(ids: Any) -> list[int]:
    """Token ids as a list, from the several forms in which transformers takes them."""
    if ids is None:
        return []
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return [ids] if isinstance(ids, int) else list(ids)
