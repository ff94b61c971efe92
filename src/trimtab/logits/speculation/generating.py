"""Between `generate` and the rounds: whether this generation is speculated, the prompt, and the output's form."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from trimtab.logits.speculation import plan as planning
from trimtab.logits.speculation.decode import CostModel, SpeculativeDecoder
from trimtab.logits.speculation.length import Costs
from trimtab.logits.speculation.plan import AUTO, Plan
from trimtab.logits.speculation.processors import Scorer
from trimtab.logits.speculation.ragged import RaggedReading
from trimtab.logits.speculation.report import SpeculationReport
from trimtab.logits.speculation.sequences import Rows
from trimtab.models.prompts import positions_of

OTHER_MODE = "only greedy and sampled generation can be speculated: no beams, no assistant model, no loop of one's own"
NOT_ASKED = "speculate is 0"


@dataclass(frozen=True)
class Task:
    """What transformers' `generate` hands to its greedy and sampling loop."""

    input_ids: Int[Tensor, "row time"]
    processors: Any
    stopping: Any
    config: Any
    synced: bool
    streamer: Any
    model_kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        """The members' caches; None where there are none."""
        return self.model_kwargs.get("past_key_values")

    @property
    def past(self) -> int:
        """Tokens that the cache holds already."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())


def asked_plan(default: Plan, speculate: str | int | None, draft: str | None, expert_names: Sequence[str]) -> Plan:
    """The plan of one call: the model's own, with what the call changes; raises as `Plan.check`."""
    if speculate is None and draft is None:
        return default
    chosen = default.speculate if speculate is None else speculate
    return Plan(chosen, default.draft if draft is None else draft).check(expert_names)


def why_not(model: Any, plan: Plan, task: Task) -> str | None:
    """Why this generation goes token by token; None when it is speculated.

    raises    BadSetting where a number of drafted tokens was asked for and cannot be
    """
    if plan.speculate == 0:
        return NOT_ASKED
    reason = (
        planning.obstacle(
            model.strategy,
            task.cache,
            task.input_ids.shape[0],
            task.processors,
            task.stopping,
            task.model_kwargs.get("attention_mask"),
            task.streamer,
            task.config,
            task.synced,
            task.past > 0,
        )
        or _own_positions(task)
        or _mistaken_padding(model.reader, task.input_ids.shape[0])
    )
    if reason is not None and plan.speculate != AUTO:
        raise planning.refuse(reason, plan.speculate)
    if reason is None and plan.speculate == AUTO:
        reason = planning.small_strong(model.members, model.reader, model.strategy, plan.draft)
    return reason


def _mistaken_padding(reader: Any, rows: int) -> str | None:
    """Rows that accept different numbers of drafted tokens are padded on the left."""
    for group in reader.groups:
        if rows > 1 and (group.limits.rows_alone or group.limits.one_row):
            return f"member '{group.members[0].name}' takes padding for text, and rows keep lengths of their own"
    return None


def _own_positions(task: Task) -> str | None:
    """Positions that the caller has thought up cannot be continued behind a draft."""
    given, mask = task.model_kwargs.get("position_ids"), task.model_kwargs.get("attention_mask")
    if given is None or task.cache.own is not None:
        return None
    kept = torch.ones_like(task.input_ids) if mask is None else mask
    width = min(given.shape[-1], kept.shape[-1])
    counted = positions_of(kept)[:, -width:].to(given.device)
    is_counted = (given[..., -width:] == counted) | (kept[:, -width:] == 0).to(given.device)
    return None if bool(is_counted.all()) else "position_ids are given that do not count the tokens"


def speculative_sample(model: Any, plan: Plan, task: Task, report: SpeculationReport) -> Any:
    """Sequences [row, time], or transformers' output object, as its own sampling loop returns them.

    report    where the decoder counts
    """
    config, cache = task.config, task.cache
    keeps_scores = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
    shows_scores = bool(config.return_dict_in_generate and config.output_scores)
    rows = Rows(task.input_ids, task.stopping, task.streamer, keeps_scores, shows_scores)
    reader, strategy = model.reader, model.strategy
    meter = _meter_of(model, len(reader.groups))
    try:
        _decoder(model, plan, task, rows, meter, report).run()
    finally:
        # Both may have been set by now: other groups have other costs, another distribution takes other drafts.
        if model.reader is reader:
            model._cost_model = meter if model.strategy is strategy else replace(meter, histories={})
        _stop_recording(cache)
    pad_id = _pad_id(config)
    sequences = rows.finish(pad_id)
    if not config.return_dict_in_generate:
        return sequences
    scores, logits = rows.log_probs(pad_id) if keeps_scores else (None, None)
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=scores if config.output_scores else None,
        logits=logits if config.output_logits else None,
        # The rows of a batch are moved about; only a text alone leaves a cache that can be gone on from.
        past_key_values=cache if task.input_ids.shape[0] == 1 else None,
    )


def _stop_recording(cache: Any) -> None:
    """Layers forget again what their window has left behind, as transformers' own loop leaves them."""
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            if getattr(layer, "is_initialized", True):
                layer.crop(0)
            layer.record_past = False


def _meter_of(model: Any, groups: int) -> CostModel:
    """A meter for one generation: what earlier ones have learned, in a copy, since other threads may decode, too."""
    known = model._cost_model
    is_fitting = known is not None and len(known.groups) == groups
    return copy.deepcopy(known) if is_fitting else CostModel([Costs() for _ in range(groups)])


def _decoder(
    model: Any, plan: Plan, task: Task, rows: Rows, meter: CostModel, report: SpeculationReport
) -> SpeculativeDecoder:
    reader, cache = model.reader, task.cache
    mask = task.model_kwargs.get("attention_mask")
    prompts = reader.all_inputs(task.input_ids[:, task.past :], mask, None, cache, cache.own)
    return SpeculativeDecoder(
        RaggedReading(reader, cache, prompts),
        model.strategy,
        model.expert_names,
        rows,
        Scorer(task.processors, task.input_ids.shape[0], rows.ends),
        plan.length_of_drafts(bool(task.config.do_sample)),
        meter,
        report,
        plan.draft,
        bool(task.config.do_sample),
    )


def _pad_id(config: Any) -> int:
    """What fills rows that ended early: the padding token, or an end, or 0 where neither is known."""
    for ids in (config._pad_token_tensor, config._eos_token_tensor):
        if ids is not None:
            return int(ids.flatten()[0])
    return 0
