"""Streams: groups on one accelerator begin together and are waited for; elsewhere nothing changes."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.logits.forward import streams


def fuse(device="cpu"):
    base = tiny.make(seed=1)
    experts = {name: tiny.tuned(base, seed) for name, seed in (("math", 10), ("facts", 11))}
    members = tiny.make("gpt2", seed=0), base, experts
    return FusedCausalLM.from_members(*members, "dynamic", one_pass=False, device=device)


class Queue:
    """A stream that writes down what happens to it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Accelerator:
    """What torch's module of a device offers, on a machine that has none."""

    def __init__(self):
        self.log, self.usual, self.count = [], Queue("usual", []), 0
        self.usual.log = self.log

    def current_stream(self, device):
        return self.usual

    def Stream(self, device):
        self.count += 1
        return Queue(f"own {self.count}", self.log)

    @contextmanager
    def stream(self, queue):
        self.log.append(f"on {queue.name}")
        yield
        self.log.append(f"off {queue.name}")


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU, taken for a device with streams."""
    found = Accelerator()
    monkeypatch.setattr(streams, "QUEUEING", ("cpu",))
    monkeypatch.setattr(streams, "_module", lambda device: found)
    monkeypatch.setattr(streams, "_record", lambda part, queue: found.log.append(f"kept for {queue.name}"))
    return found


def test_lanes_begin_together_and_all_are_waited_for(accelerator):
    model = fuse()
    ids = torch.tensor([[3, 4, 5]])
    plain = model(ids).logits
    assert accelerator.log == []
    model.streams = True
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    names = [f"own {number}" for number in (1, 2, 3, 4)]
    begun = [f"{name} waits for usual" for name in names]
    ended = [f"usual waits for {name}" for name in names]
    assert accelerator.log[:4] == begun
    read = [line for name in names for line in (f"on {name}", f"off {name}")]
    assert accelerator.log[4:-4] == read + ["kept for usual"] * 4
    assert accelerator.log[-4:] == ended


def test_the_usual_stream_waits_also_where_a_member_fails(accelerator):
    model = fuse()
    model.streams = True
    model.members.experts["facts"].model.lm_head = torch.nn.Linear(1, 1)  # of another width than what it reads
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.tensor([[3]]))
    assert accelerator.log[-1] == "usual waits for own 4"


def test_lanes_that_are_sorted_anew_keep_the_setting(accelerator):
    model = fuse()
    model.streams = True
    model.one_pass = True
    assert [group.kind for group in model.reader.groups] == ["alone", "stacked"]
    assert model.streams
    model(torch.tensor([[3]]))
    assert accelerator.log.count("on own 1") == accelerator.log.count("on own 2") == 1
    assert accelerator.log.count("kept for usual") == 4  # the logits of each run
    model.streams = False
    accelerator.log.clear()
    model(torch.tensor([[3]]))
    assert accelerator.log == []


def test_each_thread_has_streams_of_its_own(accelerator):
    model, ids = fuse(), torch.tensor([[3, 4, 5]])
    model.streams = True
    plain, both = model(ids).logits, threading.Barrier(2)

    def read(_):
        both.wait()
        return model(ids).logits

    with ThreadPoolExecutor(2) as threads:
        for logits in threads.map(read, range(2)):
            torch.testing.assert_close(logits, plain, rtol=0, atol=0)
    assert accelerator.count == 3 * 4
    model(ids)
    assert accelerator.count == 3 * 4  # a thread keeps its own
    assert all(accelerator.log.count(f"on own {number}") == (2 if number <= 4 else 1) for number in range(1, 13))


def test_a_model_that_reads_in_streams_can_be_copied_and_leaves_none_behind(accelerator):
    model, ids = fuse(), torch.tensor([[3, 4, 5]])
    model.streams = True
    plain = model(ids).logits
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(ids).logits, plain, rtol=0, atol=0)
    assert accelerator.count == 8
    held = len(streams._OF_THREAD.streams)
    del again
    gc.collect()
    assert len(streams._OF_THREAD.streams) == held - 1


def test_a_setting_that_cannot_be_leaves_the_model_as_it_was(accelerator, monkeypatch):
    model, ids = fuse(), torch.tensor([[3, 4, 5]])
    model.streams = True
    plain, reader = model(ids).logits, model.reader
    model._cost_model = meter = object()
    monkeypatch.setattr(streams, "QUEUEING", ())
    with pytest.raises(BadSetting, match="no accelerator reads several members"):
        model.one_pass = True
    assert model.reader is reader
    assert model.one_pass is False
    assert model._cost_model is meter
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)


def test_a_cpu_has_no_streams():
    model = fuse()
    with pytest.raises(BadSetting, match=r"no accelerator reads several members: they are on cpu\.") as caught:
        model.streams = True
    assert caught.value.fix == "set fused.streams = False."
    assert not model.streams


@pytest.mark.gpu
def test_streams_change_no_number_on_a_gpu():
    model = fuse("cuda")
    ids = torch.randint(2, 80, (4, 12), device="cuda")
    options = {"max_new_tokens": 40, "do_sample": False, "speculate": 0}
    plain, texts = model(ids).logits, model.generate(ids, **options)
    model.streams = True
    for _ in range(20):
        torch.testing.assert_close(model(ids).logits, plain)
        assert model.generate(ids, **options).tolist() == texts.tolist()


@pytest.mark.gpu
def test_threads_read_in_streams_side_by_side_on_a_gpu():
    model = fuse("cuda")
    model.streams = True
    prompts = [torch.randint(2, 80, (3, 8 + place), device="cuda") for place in range(8)]
    plain = [model(ids).logits for ids in prompts]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            for logits, expected in zip(threads.map(lambda ids: model(ids).logits, prompts), plain, strict=True):
                torch.testing.assert_close(logits, expected)
