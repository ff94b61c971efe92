"""What the soak calls wrong, and how it ends."""

import json
import random

import pytest

import soaking as soak


def test_memory_may_grow_by_a_twentieth():
    assert soak.memory_check(1000 * 2**20, 1050 * 2**20).is_met
    check = soak.memory_check(1000 * 2**20, 1051 * 2**20)
    assert not check.is_met
    assert check.found == "1.051 of 1000 MiB"


def test_requests_differ_and_a_seed_repeats_them():
    prompts = soak.prompts_of_zoo()
    one, again, other = ([soak.body_of(random.Random(seed), prompts) for _ in range(1)] for seed in (1, 1, 2))
    assert one == again != other
    draw = random.Random(0)
    bodies = [soak.body_of(draw, prompts) for _ in range(300)]
    for name in ("n", "stop", "logprobs", "seed", "ignore_eos", "echo", "vllm_xargs"):
        assert sum(name in body for body in bodies) > 5
    assert len({body["max_tokens"] for body in bodies}) == 6


def test_nonsense_is_of_both_kinds():
    draw = random.Random(0)
    bodies = [soak.malformed(draw)[0] for _ in range(200)]
    assert len(set(bodies)) > 12
    assert b"{" in bodies
    assert any(b"passwd" in body for body in bodies)
    with pytest.raises(ValueError):
        json.loads(b"{")


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (['data: {"choices": []}', "", "data: [DONE]"], ""),
        (['data: {"choices": []}', 'data: {"error": {"code": 500}}', "data: [DONE]"], '{"error": {"code": 500}}'),
        (['data: {"choices": [{"text": "\\"error\\""}]}'], ""),
        (['data: {"choices": [', "data: [DONE]"], '{"choices": ['),
        (["event: message"], ""),
    ],
)
def test_an_error_inside_a_stream_is_found(lines, wrong):
    assert soak.error_of(lines) == wrong


def test_blame_is_counted_and_the_first_is_told():
    outcomes = soak.Outcomes()
    for number in range(30):
        outcomes.blame(f"wrong {number}" + "x" * 1000)
    assert (outcomes.wrong_count, len(outcomes.wrong), len(outcomes.wrong[0])) == (30, 20, 500)
