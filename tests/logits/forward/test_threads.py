"""Several threads use one fused model at once: each gets what it gets alone."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_groups import save_adapters, with_adapters
from transformers.generation.streamers import BaseStreamer

import tiny
from fusing import PROMPTS, fuse, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.logits.forward import linears
from trimtab.logits.speculation.length import Costs
from trimtab.models.locks import model_lock

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MANY = [*PROMPTS, "abcabcabc, abc", "Q", "1+1=2, 2+2="]
THREADS = 4


@pytest.fixture(autouse=True)
def eager_threads():
    """Threads change places a hundred times as often as they usually do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


def together(work, items):
    """What `work` gives for all items, from several threads that start at the same moment."""
    barrier = threading.Barrier(THREADS)

    def share(first):
        barrier.wait()
        return {place: work(items[place]) for place in range(first, len(items), THREADS)}

    with ThreadPoolExecutor(THREADS) as pool:
        found = {place: part for shares in pool.map(share, range(THREADS)) for place, part in shares.items()}
    return [found[place] for place in range(len(items))]


@pytest.mark.parametrize("one_pass", [False, True])
def test_adapters_are_those_of_each_forward(tmp_path, one_pass):
    model = with_adapters(tmp_path, ranks={"a": 4, "c": 7}, one_pass=one_pass)

    def read(prompt):
        return model(**model.encode(prompt), use_cache=False).logits

    def write(prompt):
        return new_tokens(model, prompt, max_new_tokens=3, speculate=0)[1]

    for work in (read, write):
        alone = [work(prompt) for prompt in MANY]
        for one, other in zip(together(work, MANY), alone, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("one_pass", [False, True])
def test_forwards_stand_in_for_one_thread_at_a_time(one_pass, monkeypatch):
    monkeypatch.setattr(linears, "ONEDNN_PAYS", 64)  # so that quick products stand in for those of tiny models
    model = fuse(one_pass=one_pass)
    alone = [new_tokens(model, prompt, max_new_tokens=6)[1] for prompt in MANY]
    found = together(lambda prompt: new_tokens(model, prompt, max_new_tokens=6)[1], MANY)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
    assert not any("forward" in vars(module) for module in model.modules())


def test_models_of_several_fused_models_are_read_and_sorted_at_once(tmp_path):
    """One reads the base by itself while another's forwards stand in for the base's modules, or are made anew."""
    base, strong = tiny.make(seed=1), tiny.make(seed=0, width=48)
    experts = {name: tiny.tuned(base, seed) for seed, name in enumerate(["math", "facts"], start=10)}
    options = {"tokenizer": tiny.make_tokenizer()}
    apart = FusedCausalLM.from_members(strong, base, experts, one_pass=False, **options)
    joint = FusedCausalLM.from_members(strong, base, experts, one_pass=True, **options)
    models = [apart, joint, joint, apart] * 2

    def read(model):
        if model is joint:
            FusedCausalLM.from_members(strong, base, experts, one_pass=True, **options)
        return [model(**model.encode(prompt)).logits for prompt in MANY]

    for one, other in zip(together(read, models), map(read, models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_different_models_are_read_at_the_same_time():
    one, other = tiny.make(seed=0), tiny.make(seed=1)
    with model_lock(one), ThreadPoolExecutor(1) as pool:
        assert pool.submit(
            lambda: [turn.acquire(timeout=0.01) for turn in (model_lock(one), model_lock(other))]
        ).result() == [
            False,
            True,
        ]


# ---- what a call of generate asks for, and what it reports


class Meeting(BaseStreamer):
    """Threads wait for one another when `generate` hands over the prompt: behind the settings, before the loop."""

    def __init__(self, barrier):
        self.wait = barrier.wait

    def put(self, value):
        if value.ndim == 2:
            self.wait(20)

    def end(self):
        pass


def test_each_thread_has_its_plan_and_its_report():
    model, barrier = fuse(), threading.Barrier(THREADS)
    plans = [0, 3, 2, 3]

    def write(drafts, streamer=None):
        options = {"speculate": drafts, "max_new_tokens": 12, "streamer": streamer or Meeting(barrier)}
        return new_tokens(model, PROMPTS[0], **options)[1], model.last_speculation

    alone = [write(drafts, Meeting(threading.Barrier(1))) for drafts in plans]
    for drafts, (ids, report), (expected, _) in zip(plans, together(write, plans), alone, strict=True):
        assert torch.equal(ids, expected)
        assert report.is_on == (drafts > 0)
        assert max(report.lengths, default=0) <= drafts
        assert report.emitted == (ids.shape[1] if drafts else 0)


def test_costs_are_learned_by_each_and_kept_of_the_last(monkeypatch):
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    model, added = fuse(), []
    monkeypatch.setattr(Costs, "add", lambda self, *args, add=Costs.add: added.append(self) or add(self, *args))
    seen = together(
        lambda speculate: new_tokens(model, MANY[0], speculate=speculate) and id(model._cost_model), ["auto", 0, 4, 2]
    )
    assert seen
    meter = model._cost_model
    assert all(group.seconds for group in meter.groups)
    users = {id(costs): None for costs in added}
    assert len(users) == 3 * (len(model.reader.groups) + 1)  # three of the four drafted, each by its own account
    new_tokens(model, MANY[0], speculate=2)
    assert model._cost_model is not meter
    assert all(
        was.seconds.keys() <= now.seconds.keys()
        for was, now in zip(meter.groups, model._cost_model.groups, strict=True)
    )


def test_a_thread_that_generated_nothing_is_told_of_the_last_generation():
    model = fuse()
    assert model.last_speculation.reason == "nothing was generated yet"
    thread = threading.Thread(target=new_tokens, args=(model, PROMPTS[0]), kwargs={"speculate": 2})
    thread.start()
    thread.join()
    assert model.last_speculation.is_on
    new_tokens(model, PROMPTS[0], speculate=0)
    thread = threading.Thread(target=new_tokens, args=(model, PROMPTS[0]), kwargs={"speculate": 2})
    thread.start()
    thread.join()
    assert not model.last_speculation.is_on


def test_a_call_within_a_call_has_its_own_plan():
    outer, inner = fuse(), fuse()

    def ask(row, ids):
        new_tokens(inner, "Q", speculate=0, max_new_tokens=2)
        new_tokens(outer, "Q", speculate=0, max_new_tokens=2)
        return list(range(4, 40))

    _, ids = new_tokens(outer, PROMPTS[0], speculate=3, prefix_allowed_tokens_fn=ask, max_new_tokens=6)
    _, again = new_tokens(
        outer, PROMPTS[0], speculate=3, prefix_allowed_tokens_fn=lambda row, ids: list(range(4, 40)), max_new_tokens=6
    )
    assert torch.equal(ids, again)


def test_the_loop_over_tokens_is_no_entrance(fused):
    with pytest.raises(BadSetting, match=r"(?s)_sample` was called directly.*call generate"):
        fused._sample(torch.tensor([[5, 6]]), None, None, None)


# ---- models that are copied, and shared


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_copy_switches_its_own_adapters(tmp_path, one_pass):
    model = with_adapters(tmp_path, ranks={"a": 4, "b": 4}, one_pass=one_pass)
    ids = torch.tensor([[7, 8, 9]])
    expected = model(ids).logits
    other = copy.deepcopy(model)
    for name in ("b", "a"):
        other.members.switch(other.members.base).select(other.members.experts[name].adapter)
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(other(ids).logits, expected)


@pytest.mark.parametrize("one_pass", [False, True])
def test_fused_models_put_adapters_of_their_own_onto_one_base(tmp_path, one_pass):
    base, strong = tiny.make(seed=1), tiny.make(seed=0)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    places = save_adapters(base, "llama", tmp_path, {"a": 4, "d": 2})
    options = {"tokenizer": tiny.make_tokenizer(), "one_pass": one_pass}
    ids = torch.tensor([[7, 8, 9]])
    bare = FusedCausalLM.from_members(strong, base, {"m": tiny.tuned(base, 5)}, **options | {"one_pass": False})
    found = [bare(ids).logits]
    one = FusedCausalLM.from_members(strong, base, {"d": places["d"]}, **options)
    found.append(one(ids).logits)
    other = FusedCausalLM.from_members(strong, base, {"d": places["a"]}, **options)  # on more layers, by the same name
    other(ids)
    for model, expected in zip((bare, one), found, strict=True):
        torch.testing.assert_close(model(ids).logits, expected)
    switch = one.members.switch(one.members.base)
    assert switch is other.members.switch(other.members.base)
    for layer in switch.layers:  # as peft's own users may, on the model that they passed
        layer.enable_adapters(True)
        layer.set_adapter(list(layer.lora_A)[-1:])
    for model, expected in zip((bare, one), found, strict=True):
        torch.testing.assert_close(model(ids).logits, expected)
