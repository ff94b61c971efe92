"""In vLLM's worker processes: which request each row of logits belongs to. Given to vLLM as `--worker-extension-cls`.

vLLM's model runner knows the batch, and asks the model for logits in two ways: once per step for the rows that tokens
are sampled from (one per request; with drafts one per drafted token and one more), and once for every request whose
prompt is to be scored. Nothing in those calls says whose rows they are. So the first kind is remembered when the runner
lays out the batch; the second hands over a view into the step's hidden states, whose offset tells the request.

Written for the V1 runner of vLLM 0.32 and 0.33 (`GPUModelRunner` in `v1/worker/gpu_model_runner.py`), which the CPU's
inherits.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.core.errors import InputError, TrimtabError
from trimtab.serving.requests import NOTHING_SET, SEVERAL, RequestSettings, read_settings
from trimtab.serving.steering import RowOwners, Steering
from trimtab.serving.traces import TraceKey

NEEDED = ("_prepare_inputs", "input_batch", "requests", "query_start_loc", "positions", "discard_request_mask")
logger = logging.getLogger(__name__)


class SteeringWorker:
    """Methods that vLLM adds to its workers; the API process calls them by name."""

    model_runner: Any

    def trimtab_start(self) -> list[str]:
        """Lets requests have settings of their own; called again, it changes nothing. Returns the experts' names.

        raises    TrimtabError where this engine's model runner is another one than this was written for
        """
        model = self.model_runner.get_model()
        if model.steering is None:
            steering = Steering(model.plan, BatchRows(self.model_runner, model.plan.strategy))
            steering.warm_up(next(model.parameters()).device)
            model.steering = steering
        return list(model.plan.strategy.expert_names)

    def trimtab_histograms(self) -> dict[str, Any]:
        """What `Histograms.to_dict` says."""
        steering = self.model_runner.get_model().steering
        return steering.histograms.to_dict() if steering is not None else {}

    def trimtab_traces(self, indices: Sequence[tuple[str, int, int]]) -> list[list[dict[str, Any]]]:
        """The steps kept of some choices, each from a position on.

        places   (key that a request was given, number of its choice, position) of each
        """
        steering = self.model_runner.get_model().steering
        if steering is None:
            return [[] for _ in indices]
        return [steering.traces.steps(TraceKey(request, choice), start) for request, choice, start in indices]


class BatchRows:
    """Whose rows are whose, from the model runner's batch."""

    def __init__(self, runner: Any, strategy: Any) -> None:
        missing = [name for name in NEEDED if not hasattr(runner, name)]
        if missing:
            raise TrimtabError(
                f"this engine's model runner, {type(runner).__qualname__}, has no {', '.join(missing)}.",
                "Settings of requests are read from the V1 model runner of vLLM 0.32 and 0.33.",
                "set VLLM_USE_V2_MODEL_RUNNER=0, and use one of these.",
            )
        self.runner = runner
        self.strategy = strategy
        self._sampled: np.ndarray | None = None  # [row] place of the row's request; None once the rows were asked for
        self._indices: Any = None  # [row] of the row's token in this step
        self._known: dict[str, tuple[Any, RequestSettings]] = {}  # request -> (its parameters, what they set)
        prepare = runner._prepare_inputs

        def prepare_and_note(*args: Any, **kwargs: Any) -> Any:
            found = prepare(*args, **kwargs)
            self._note(found[0], found[1])
            return found

        runner._prepare_inputs = prepare_and_note

    def _note(self, logits_indices: Tensor, drafts: Any) -> None:
        counts = 1 if drafts is None else np.asarray(drafts.num_draft_tokens) + 1
        self._sampled = np.repeat(np.arange(self.runner.input_batch.num_reqs), counts)
        self._indices = logits_indices
        self._forget_gone()

    def _forget_gone(self) -> None:
        for request in [request for request in self._known if request not in self.runner.requests]:
            del self._known[request]

    def of(self, hidden_states: Tensor) -> RowOwners | None:
        """Owners of the rows that are about to be fused."""
        rows = hidden_states.shape[0]
        if self._sampled is not None and len(self._sampled) == rows:
            indices, self._sampled = self._sampled, None
            return self._of_sampled(indices)
        return self._of_prompt(hidden_states) if self._indices is not None else None

    def _of_sampled(self, indices: np.ndarray) -> RowOwners:
        batch = self.runner.input_batch
        ids = batch.req_ids
        settings = [self._settings(id_) for id_ in ids[: batch.num_reqs]]
        is_partial = self.runner.discard_request_mask.np  # the prompt is not read to its end: nothing is sampled
        keys = [
            None if asked.trace is None or is_partial[index] else key_of(asked.trace, ids[index])
            for index, asked in enumerate(settings)
        ]
        has_keys = any(key is not None for key in keys)
        positions: Sequence[int] = self.runner.positions[self._indices].tolist() if has_keys else [0] * len(indices)
        return RowOwners(
            [settings[index] for index in indices],
            [keys[index] for index in indices],
            positions,
            [not is_partial[index] for index in indices],
        )

    def _of_prompt(self, hidden_states: Tensor) -> RowOwners:
        rows, first = hidden_states.shape[0], hidden_states.storage_offset() // hidden_states.stride(0)
        batch = self.runner.input_batch
        ends = self.runner.query_start_loc.np[1 : batch.num_reqs + 1]
        index = int(np.searchsorted(ends, first, side="right"))
        asked = self._settings(batch.req_ids[index])
        return RowOwners([asked] * rows, [None] * rows, [0] * rows, [False] * rows)

    def _settings(self, request: str) -> RequestSettings:
        """What a request sets; read when it is first seen, since it is asked for at every token."""
        params = self.runner.requests[request].sampling_params
        if params is None or not params.extra_args:
            return NOTHING_SET
        known = self._known.get(request)
        if known is None or known[0] is not params:  # a request that goes on may bring new ones under its name
            known = self._known[request] = params, self._read(request, params.extra_args)
        return known[1]

    def _read(self, request: str, extra_args: dict[str, Any]) -> RequestSettings:
        try:
            return read_settings(extra_args, self.strategy)
        except InputError as error:
            # The API process refuses such requests; raised here, it would end the engine and everybody's requests.
            logger.error("request %s runs without its settings: %s", request, error)
            return NOTHING_SET


def key_of(trace: str, request: str) -> TraceKey:
    """Under which the steps of a text are kept: the trace's key and, of several choices, its number.

    trace     as a request carries it: ends with `SEVERAL` where it has several choices
    request   vLLM's own id: choice 2 of several is named `2_...`
    """
    if not trace.endswith(SEVERAL):
        return TraceKey(trace)
    number = request.partition("_")[0]
    return TraceKey(trace.removesuffix(SEVERAL), int(number) if number.isdecimal() else 0)
