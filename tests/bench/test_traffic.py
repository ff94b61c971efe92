"""When requests are due, and what is made of what their senders saw."""

import itertools
import math
import random
import statistics

import pytest
from bench.traffic import Answer, arrivals, figures_of, jobs_of, percentile

from bench import traffic
from trimtab.zoo import load_items


def answer(due=0.0, sent=None, moments=((1.0, 1), (1.5, 2), (2.5, 4))):
    return Answer(due, due if sent is None else sent, tuple(moments))


def test_arrivals_are_a_poisson_process():
    times = arrivals(20_000, 5.0, random.Random(0))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.03)  # of an exponential law: its mean
    assert statistics.fmean(gap > 0.2 for gap in gaps) == pytest.approx(math.exp(-1), abs=0.02)
    assert arrivals(3, math.inf, random.Random(0)) == [0.0, 0.0, 0.0]


def test_a_seed_draws_the_same_jobs_and_another_seed_others():
    one, again, other = (jobs_of("arithmetic", 20, 2.0, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len({job.prompt for job in one}) == 20
    targets = {item.prompt: item.target for item in load_items("arithmetic")}
    encode = traffic.load_tokenizer()
    for job in one:
        assert job.tokens == len(encode(targets[job.prompt], add_special_tokens=False)["input_ids"]) + 1


def test_rates_stretch_the_same_arrivals():
    slow, fast = (jobs_of("arithmetic", 8, rate, 0) for rate in (1.0, 4.0))
    assert [job.prompt for job in slow] == [job.prompt for job in fast]
    assert [job.at_seconds for job in slow] == pytest.approx([4 * job.at_seconds for job in fast])


def test_tokens_that_came_together_share_their_wait():
    assert list(answer().token_seconds()) == [0.5, 0.5, 0.5]
    assert (answer().tokens, answer(due=0.25).first_token_seconds) == (4, 0.75)


def test_figures_count_from_when_requests_were_due():
    answers = [answer(), answer(due=1.0, sent=1.5, moments=((3.0, 1), (4.0, 3)))]
    found = figures_of(answers)
    assert found["seconds"] == 4.0
    assert found["tokens_per_second"] == 7 / 4
    assert found["requests_per_second"] == 0.5
    assert found["ttft_ms"] == 1500.0
    assert found["ttft_p95_ms"] == pytest.approx(1950.0)
    assert (found["itl_ms"], found["itl_mean_ms"]) == (500.0, 500.0)
    assert found["sent_late_ms"] == 500.0


def test_figures_of_senders_that_waited_their_turn_count_from_sending():
    found = figures_of([answer(), answer(sent=2.0, moments=((3.0, 1), (4.0, 3)))], is_open=False)
    assert (found["seconds"], found["ttft_ms"], found["sent_late_ms"]) == (4.0, 1000.0, 0.0)


def test_percentiles_lie_between_neighbours():
    assert percentile([7.0], 95) == 7.0
    assert percentile([float(n) for n in range(101)], 95) == 95.0
