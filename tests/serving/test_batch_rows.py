"""Which request each row belongs to: worked out from a model runner's batch, laid out here as vLLM 0.32 does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trimtab import make_strategy
from trimtab.core.errors import TrimtabError
from trimtab.serving.requests import read_settings
from trimtab.serving.vllm.worker import BatchRows, key_of

STRATEGY = make_strategy("dynamic", expert_names=("math", "facts"))
WIDTH = 3


def runner_of(asked, starts, partial=()):
    """A runner of requests `r0`, `r1`, ...; starts   first token of each in the step, and the end of the last."""
    ids = [f"{place}_r" if given.get("n") else f"r{place}" for place, given in enumerate(asked)]
    requests = {
        id_: SimpleNamespace(sampling_params=SimpleNamespace(extra_args={k: v for k, v in given.items() if k != "n"}))
        for id_, given in zip(ids, asked, strict=True)
    }
    return SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=ids, num_reqs=len(ids)),
        requests=requests,
        query_start_loc=SimpleNamespace(np=np.array(starts)),
        positions=torch.arange(100, 100 + starts[-1]),
        discard_request_mask=SimpleNamespace(np=np.array([place in partial for place in range(len(ids))])),
        _prepare_inputs=lambda layout: layout,
    )


def test_rows_that_are_sampled_from_belong_to_one_request_each() -> None:
    runner = runner_of([{}, {"alpha": 0.5, "trace": "trimtab:t"}, {"expert": "math"}], [0, 4, 5, 9], partial=[2])
    rows = BatchRows(runner, STRATEGY)
    runner._prepare_inputs((torch.tensor([3, 4, 8]), None, 1))
    owners = rows.of(torch.zeros(3, WIDTH))
    assert [asked.alpha for asked in owners.settings] == [1.0, 0.5, 1.0]
    assert owners.settings[2].experts == ("math",)
    assert list(owners.keys) == [None, ("trimtab:t", 0), None]
    assert list(owners.positions) == [103, 104, 108]
    assert list(owners.is_counted) == [True, True, False]  # the last one's prompt is not read to its end


def test_with_drafts_a_request_has_a_row_per_drafted_token_and_one_more() -> None:
    runner = runner_of([{"alpha": 0.1}, {"alpha": 0.2, "trace": "trimtab:t*", "n": 2}], [0, 3, 4])
    rows = BatchRows(runner, STRATEGY)
    runner._prepare_inputs((torch.arange(4), SimpleNamespace(num_draft_tokens=[2, 0]), 3))
    owners = rows.of(torch.zeros(4, WIDTH))
    assert [asked.alpha for asked in owners.settings] == [0.1, 0.1, 0.1, 0.2]
    assert list(owners.keys) == [None, None, None, ("trimtab:t", 1)]


def test_rows_of_prompts_are_told_by_where_they_lie_in_the_step() -> None:
    runner = runner_of([{"alpha": 0.1}, {"alpha": 0.2, "trace": "trimtab:t"}, {"alpha": 0.3}], [0, 4, 5, 9])
    rows = BatchRows(runner, STRATEGY)
    assert rows.of(torch.zeros(3, WIDTH)) is None  # before any batch: an engine that warms up
    runner._prepare_inputs((torch.tensor([3, 4, 8]), None, 1))
    rows.of(torch.zeros(3, WIDTH))
    step = torch.zeros(9, WIDTH)
    for first, end, alpha in ((0, 3, 0.1), (1, 4, 0.1), (4, 5, 0.2), (5, 8, 0.3), (6, 9, 0.3)):
        owners = rows.of(step[first:end])
        assert [asked.alpha for asked in owners.settings] == [alpha] * (end - first)
        assert not any(owners.is_counted)
        assert set(owners.keys) == {None}


def test_another_runner_is_refused_by_name() -> None:
    runner = runner_of([{}], [0, 1])
    del runner.query_start_loc
    with pytest.raises(TrimtabError, match="has no query_start_loc"):
        BatchRows(runner, STRATEGY)


def test_settings_that_came_by_another_way_do_not_end_the_engine(caplog) -> None:
    runner = runner_of([{"expert": "nobody"}], [0, 1])
    rows = BatchRows(runner, STRATEGY)
    runner._prepare_inputs((torch.tensor([0]), None, 1))
    assert rows.of(torch.zeros(1, WIDTH)).settings[0].experts == ()
    assert "no expert 'nobody'" in caplog.text


def test_settings_are_read_once_per_request_and_forgotten_with_it(monkeypatch) -> None:
    read = []

    def noted(given, present):
        read.append(given["alpha"])
        return read_settings(given, present)

    monkeypatch.setattr("trimtab.serving.vllm.worker.read_settings", noted)
    runner = runner_of([{"alpha": 0.1}, {"alpha": 0.2}], [0, 4, 5])
    rows = BatchRows(runner, STRATEGY)

    def step() -> list[float]:
        runner._prepare_inputs((torch.tensor([3, 4]), None, 1))
        return [asked.alpha for asked in rows.of(torch.zeros(2, WIDTH)).settings]

    assert step() == step() == [0.1, 0.2]
    assert read == [0.1, 0.2]
    # A request that goes on with other parameters keeps its name.
    runner.requests["r0"].sampling_params = SimpleNamespace(extra_args={"alpha": 0.3})
    assert step() == [0.3, 0.2]
    # One that has ended is forgotten, and another may come under its name.
    gone = runner.requests.pop("r1")
    runner.input_batch = SimpleNamespace(req_ids=["r0"], num_reqs=1)
    runner._prepare_inputs((torch.tensor([3]), None, 1))
    assert set(rows._known) == {"r0"}
    runner.requests["r1"] = gone
    runner.input_batch = SimpleNamespace(req_ids=["r0", "r1"], num_reqs=2)
    assert step() == [0.3, 0.2]
    assert read == [0.1, 0.2, 0.3, 0.2]


def test_choices_have_keys_of_their_own() -> None:
    assert key_of("t", "cmpl-1_2-abc") == ("t", 0)
    assert key_of("t*", "3_cmpl-1_2-abc") == ("t", 3)
    assert key_of("t", "3_a-name-that-a-client-chose") == ("t", 0)
