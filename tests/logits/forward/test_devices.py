"""Groups on different devices are read at the same time, those of one device one after the other."""

import threading

import pytest
import torch

from fusing import PROMPTS, fuse, new_tokens
from trimtab.logits.forward.devices import devices_of, queues, run_queues


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu", "cpu", "cpu"], [[0, 1, 2]]),
        (["0", "1", "0", "2"], [[0, 2], [1], [3]]),
        (["0 1", "1", "2"], [[0, 1], [2]]),
        (["0", "1", "0 1", "3"], [[0, 1, 2], [3]]),  # one that is spread joins both
    ],
)
def test_a_queue_holds_the_groups_that_share_a_device(devices, expected):
    assert queues([frozenset(used.split()) for used in devices]) == expected


def test_members_on_one_device_are_one_queue(fused):
    assert {used for group in fused.reader.groups for used in devices_of(group)} == {"cpu"}
    assert fused.reader.queues == [list(range(len(fused.reader.groups)))]


def test_a_spread_member_uses_all_its_devices():
    model = fuse(one_pass=False)
    model.members.strong.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "disk"}
    assert devices_of(model.reader.groups[0]) == {"cuda:0", "cuda:1", "cpu"}


def test_queues_are_read_at_the_same_time_in_threads_of_their_own():
    meeting = threading.Barrier(3, timeout=20)  # each queue waits for the others: read in turn, they would never meet

    def read(index):
        meeting.wait()
        return index, threading.get_ident()

    found = run_queues([[0], [1], [2]], read)
    assert {index: part[0] for index, part in found.items()} == {0: 0, 1: 1, 2: 2}
    assert found[0][1] == threading.get_ident()
    assert len({thread for _, thread in found.values()}) == 3


def test_the_threads_settings_reach_every_queue():
    def read(index):
        return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert set(run_queues([[0], [1]], read).values()) == {(True, True)}
    assert set(run_queues([[0], [1]], read).values()) == {(False, False)}


def test_an_error_in_one_queue_waits_for_the_others():
    ended = []

    def read(index):
        if index == 0:
            raise ValueError("queue 0")
        ended.append(index)

    with pytest.raises(ValueError, match="queue 0"):
        run_queues([[0], [1, 2]], read)
    assert ended == [1, 2]


def test_texts_are_the_same_whichever_thread_reads():
    model = fuse(one_pass=False)
    inputs, plain = new_tokens(model, PROMPTS, speculate=0)
    model.reader.queues = [[0], [1, 2], [3]]
    assert torch.equal(new_tokens(model, PROMPTS, speculate=0)[1], plain)
    model.reader.queues = [[0, 1, 2, 3]]
    logits = model(**inputs).logits
    model.reader.queues = [[0], [1], [2], [3]]
    assert torch.equal(model(**inputs).logits, logits)
