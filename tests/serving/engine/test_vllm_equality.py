"""Token for token what the transformers engine says: greedy, float32, whatever vLLM does to the batch."""

from itertools import chain, zip_longest

import pytest
import torch
from engines import check_same, counters, engine, expected, runner_of, served

import tiny
from on_disk import save_adapter
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting
from trimtab.serving.vllm.speculative_config import speculative_config
from trimtab.zoo.tasks import TASKS, load_items

PROMPTS = 300
# Whole blocks of the key-value cache are found again; the CPU's usual ones are longer than these prompts.
CACHED = {"enable_prefix_caching": True, "block_size": 32}
PIECES = {"enable_chunked_prefill": True, "max_num_batched_tokens": 80}
PLAIN = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The zoo's strong model with a full expert and an adapter, as a directory and in the transformers engine."""
    experts = {"math": "zoo:small/arithmetic", "facts": "zoo:small/facts-lora"}
    fused = FusedCausalLM.from_members("zoo:strong", "zoo:small", experts)
    directory = tmp_path_factory.mktemp("zoo") / "fused"
    fused.save_pretrained(directory)
    return directory, fused


@pytest.fixture(scope="module")
def prompts(zoo):
    """Test prompts of all tasks in turn, so that long and short ones stand side by side; as token ids."""
    items = [load_items(task, limit=PROMPTS // len(TASKS)) for task in TASKS]
    mixed = [item.prompt for item in chain(*zip_longest(*items)) if item is not None]
    ids = [zoo[1].tokenizer(text)["input_ids"] for text in mixed]
    assert len(ids) == PROMPTS
    assert max(map(len, ids)) > 3 * min(map(len, ids))
    return ids


@pytest.fixture(scope="module")
def wanted(zoo, prompts):
    return expected(zoo[1], prompts)


def one_at_a_time(llm, prompts, **options):
    return [served(llm, [ids], **options)[0] for ids in prompts]


def test_zoo_prompts_64_at_a_time_and_one_at_a_time(zoo, prompts, wanted):
    with engine(zoo[0], **PLAIN) as llm:
        check_same(zoo[1], prompts, served(llm, prompts), wanted, most=3)
        check_same(zoo[1], prompts[:40], one_at_a_time(llm, prompts[:40]), wanted[:40], most=1)
        # A repetition penalty looks at the sign of a logit: both engines have the strong model's zero point.
        penalised = expected(zoo[1], prompts[:40], repetition_penalty=1.4)
        assert penalised != wanted[:40]
        check_same(zoo[1], prompts[:40], served(llm, prompts[:40], repetition_penalty=1.4), penalised, most=0)


def test_zoo_prompts_with_cached_prefixes_and_prompts_in_pieces(zoo, prompts, wanted):
    with engine(zoo[0], **CACHED, **PIECES) as llm:
        check_same(zoo[1], prompts, served(llm, prompts), wanted, most=3)
        longest = sorted(range(PROMPTS), key=lambda place: -len(prompts[place]))[:50]
        again = served(llm, [prompts[place] for place in longest])
        assert sum(output.num_cached_tokens for output in again) > 0
        check_same(zoo[1], [prompts[p] for p in longest], again, [wanted[p] for p in longest], most=1)


def check_drafts_counted(llm):
    """Drafts were made; some stood, and not all: both ways were walked."""
    found = counters(llm)
    drafted, stood = (found[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < stood < drafted


def handed_over(llm, monkeypatch):
    """Fills up with the drafts that the scheduler gets, each with the room that its text has left."""
    runner = runner_of(llm)
    take, seen = runner.take_draft_token_ids, []

    def take_and_note():
        drafted = take()
        for request, draft in zip(drafted.req_ids, drafted.draft_token_ids, strict=True):
            state = runner.requests[request]
            seen.append((draft, state.sampling_params.max_tokens - len(state.output_token_ids)))
        return drafted

    monkeypatch.setattr(runner, "take_draft_token_ids", take_and_note)
    return seen


def check_drafts_end_with_texts(seen, fused, length, may_be_short):
    """No token is drafted for which a text has no room, or behind an end that was drafted; every other one is."""
    end, cut_short = fused.config.eos_token_id, set()
    for draft, room in seen:
        assert end not in draft[:-1]
        most = max(0, min(length, room - 1))
        is_at_end = draft[-1:] == [end]
        assert len(draft) == most or (len(draft) < most and (is_at_end or may_be_short))
        cut_short |= {"end"} if is_at_end and len(draft) < most else {"room"} if most < length else set()
    assert cut_short == {"end", "room"} or may_be_short


def test_zoo_prompts_with_an_expert_drafting(zoo, prompts, wanted):
    drafting = speculative_config(zoo[0], "math", tokens=3)
    with engine(zoo[0], speculative_config=drafting, **CACHED, **PIECES) as llm:
        check_same(zoo[1], prompts, served(llm, prompts, logprobs=None), wanted, most=3)
        again = served(llm, prompts[:60], logprobs=None)
        assert sum(output.num_cached_tokens for output in again) > 0
        check_same(zoo[1], prompts[:60], again, wanted[:60], most=1)
        check_same(zoo[1], prompts[:30], one_at_a_time(llm, prompts[:30], logprobs=None), wanted[:30], most=1)
        check_drafts_counted(llm)


@pytest.mark.parametrize("drafter", ["base", "facts", "mixture", "fused", "prompt"])
def test_zoo_prompts_with_others_drafting(zoo, prompts, wanted, drafter, monkeypatch):
    drafting = speculative_config(zoo[0], drafter, tokens=3)
    with engine(zoo[0], speculative_config=drafting, **PLAIN) as llm:
        seen = handed_over(llm, monkeypatch)
        check_same(zoo[1], prompts[:40], served(llm, prompts[:40], logprobs=None), wanted[:40], most=1)
        check_drafts_counted(llm)
        check_drafts_end_with_texts(seen, zoo[1], length=3, may_be_short=drafter == "prompt")


# Widths 128 and 32 with four heads: the small members' heads of 8 are filled up to a size that the CPU kernels know.
PAIRS = [("llama", "gpt2"), ("qwen2", "llama"), ("gpt2", "mistral"), ("mistral", "qwen2")]


def random_fused(folder, strong, small, adapted=False):
    """Random members of two architectures, with two experts, saved in a folder; the transformers engine of them.

    adapted   whether the strong model is an adapter, which names the model that it sits on
    """
    base = tiny.make(small, seed=1)
    models = {"strong": tiny.make(strong, seed=0, width=128, layers=3), "base": base}
    models |= {"math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    if adapted:
        save_adapter(folder, "adapter", models["strong"], folder / "strong")
    where = {name: str(folder / name) for name in models} | ({"strong": str(folder / "adapter")} if adapted else {})
    experts = {name: where[name] for name in ("math", "facts")}
    fused = FusedCausalLM.from_members(where["strong"], where["base"], experts)
    fused.save_pretrained(folder / "fused")
    return fused


def random_prompts(count=64, longest=70):
    """Token ids of mixed lengths; half of them begin alike, over more than one block of the cache."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    drawn = [torch.randint(4, tiny.VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [drawn[0][:1] * 40 + ids[:20] if place % 2 else ids for place, ids in enumerate(drawn)]


@pytest.mark.parametrize(("strong", "small"), PAIRS)
def test_random_members_of_unlike_architecture_width_and_depth(tmp_path, strong, small):
    fused = random_fused(tmp_path, strong, small, adapted=strong == "qwen2")
    prompts = random_prompts()
    wanted = expected(fused, prompts, batch=64)
    with engine(tmp_path / "fused", **PLAIN) as llm:
        check_same(fused, prompts, served(llm, prompts), wanted, most=1)
        check_same(fused, prompts[:8], one_at_a_time(llm, prompts[:8]), wanted[:8], most=1)
    drafting = {"speculative_config": speculative_config(tmp_path / "fused", "math", tokens=3)}
    if "mistral" in (strong, small):  # its window is not the others'
        with (
            pytest.raises(BadSetting, match="disable_hybrid_kv_cache_manager=True"),
            engine(tmp_path / "fused", **drafting),
        ):
            pass
        drafting["disable_hybrid_kv_cache_manager"] = True
    with engine(tmp_path / "fused", **drafting, **CACHED, **PIECES) as llm:
        check_same(fused, prompts, served(llm, prompts, logprobs=None), wanted, most=1)
        again = one_at_a_time(llm, prompts[:8], logprobs=None)
        assert sum(output.num_cached_tokens for output in again) > 0
        check_same(fused, prompts[:8], again, wanted[:8], most=1)
        check_drafts_counted(llm)
