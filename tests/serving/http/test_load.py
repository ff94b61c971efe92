"""The load generator of the bench against a real server."""

import math

from bench.traffic import figures_of, jobs_of, send
from servers import KEY

MODEL = "zoo"


def test_requests_are_sent_when_due_and_answered_in_full(server):
    jobs = jobs_of("arithmetic", 6, 4.0, seed=0)
    answers = send(server.url, MODEL, jobs, key=KEY)
    assert [answer.tokens for answer in answers] == [job.tokens for job in jobs]
    for answer, job in zip(answers, jobs, strict=True):
        assert answer.due == job.at_seconds <= answer.sent < answer.moments[0][0]
        assert [count for _, count in answer.moments] == sorted({count for _, count in answer.moments})
    found = figures_of(answers)
    assert found["tokens"] == sum(job.tokens for job in jobs)
    assert 0 < found["itl_ms"] <= found["itl_p95_ms"]
    assert found["seconds"] > jobs[-1].at_seconds


def test_as_many_as_allowed_are_under_way(server):
    answers = send(server.url, MODEL, jobs_of("facts", 6, math.inf, seed=0), most_under_way=2, key=KEY)
    ends = sorted(answer.moments[-1][0] for answer in answers)
    starts = sorted(answer.sent for answer in answers)
    assert all(start >= end for start, end in zip(starts[2:], ends, strict=False))
