"""One cache that shows the members' layers one after the other."""

import copy

import pytest
import torch

import tiny
from fusing import PROMPTS, fuse


def filled(model, count=6):
    cache = model.reader.new_cache()
    ids = torch.arange(10, 10 + 2 * count).view(2, count)
    model(ids, past_key_values=cache)
    return cache, ids


def next_logits(model, cache, ids):
    return model(ids[:, -1:], past_key_values=cache).logits


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("mistral", "gemma2")], ids="-".join)
def test_layers_are_the_members_layers_in_their_order(kinds):
    model = fuse(kinds)
    cache, _ = filled(model)
    depths = [group.members[0].model.config.num_hidden_layers for group in model.reader.groups]
    assert len(cache.layers) == sum(depths)
    assert cache.layers == [layer for view in cache.views for layer in view.layers]
    assert cache.get_seq_length() == 6
    kinds_of = {type(layer).__name__ for layer in cache.layers}
    assert ("DynamicSlidingWindowLayer" in kinds_of) == (kinds[0] == "mistral")


def test_cropping_gives_the_shorter_cache():
    model = fuse(("llama", "mistral"))
    for count, removed in ((6, 2), (20, 3)):  # before and behind the sliding window of 8
        long = model.reader.new_cache()
        ids = torch.arange(5, 5 + count).view(1, count)
        # As assisted generation does it: the past is kept from after the prompt on, and cropped after each pass.
        model(ids[:, :-removed], past_key_values=long)
        long.activate_past_recording()
        model(ids[:, -removed:], past_key_values=long)
        long.crop(-removed)
        assert long.get_seq_length() == count - removed
        short = model.reader.new_cache()
        model(ids[:, :-removed], past_key_values=short)
        torch.testing.assert_close(next_logits(model, long, ids), next_logits(model, short, ids), atol=1e-4, rtol=1e-4)


def test_rows_are_reordered_selected_and_repeated():
    model = fuse(("llama", "gpt2"))
    cache, ids = filled(model)
    expected = next_logits(model, copy.deepcopy(cache), ids)
    changes = {
        "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
    }
    for change, (argument, rows) in changes.items():
        changed = copy.deepcopy(cache)
        getattr(changed, change)(argument)
        found = model(ids[rows][:, -1:], past_key_values=changed).logits
        torch.testing.assert_close(found, expected[rows], atol=1e-4, rtol=1e-4)


def test_reset_empties_it():
    model = fuse()
    cache, _ = filled(model)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_static_cache_has_room_from_the_start():
    model = fuse(("llama", "gpt2"))
    cache = model.reader.new_cache(max_tokens=32)
    inputs = model.encode(PROMPTS[1])
    found = model(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert not cache.is_compileable
    assert tiny.CONTEXT > 32
