"""Token for token what the transformers engine says: greedy, float32, whatever vLLM does to the batch."""

from itertools import chain, zip_longest

import pytest
from engines import check_same, engine, expected, served

import tiny
from trimtab import FusedCausalLM
from trimtab.serving.drafting import speculative_config
from trimtab.zoo.tasks import TASKS, load_items

PROMPTS = 300


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


def test_zoo_prompts_64_at_a_time(zoo, prompts, wanted):
    with engine(zoo[0], enable_prefix_caching=False, enable_chunked_prefill=False) as llm:
        check_same(zoo[1], prompts, served(llm, prompts), wanted, most=3)


def test_zoo_prompts_with_cached_prefixes_and_prompts_in_pieces(zoo, prompts, wanted):
    # Whole blocks are cached; the CPU's usual ones are longer than these prompts.
    pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": 80}
    with engine(zoo[0], enable_prefix_caching=True, block_size=32, **pieces) as llm:
        check_same(zoo[1], prompts, served(llm, prompts), wanted, most=3)
        longest = sorted(range(PROMPTS), key=lambda place: -len(prompts[place]))[:50]
        again = served(llm, [prompts[place] for place in longest])
        assert sum(output.num_cached_tokens for output in again) > 0
        check_same(zoo[1], [prompts[p] for p in longest], again, [wanted[p] for p in longest], most=1)


def test_zoo_prompts_one_at_a_time(zoo, prompts, wanted):
    with engine(zoo[0], max_num_seqs=1) as llm:
        check_same(zoo[1], prompts[:50], served(llm, prompts[:50]), wanted[:50], most=1)


@pytest.mark.parametrize("member", ["math", "base"])
def test_zoo_prompts_with_a_small_member_drafting(zoo, prompts, wanted, member):
    drafting = speculative_config(zoo[0], member, tokens=3)
    with engine(zoo[0], speculative_config=drafting, disable_log_stats=False) as llm:
        check_same(zoo[1], prompts[:100], served(llm, prompts[:100], logprobs=None), wanted[:100], most=2)
        counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counters["vllm:spec_decode_num_draft_tokens"] > 0
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0


# Widths 128 and 32 with four heads: the small members' heads of 8 are filled up to a size that the CPU kernels know.
PAIRS = [("llama", "gpt2"), ("qwen2", "llama"), ("gpt2", "mistral"), ("mistral", "qwen2")]
TEXTS = ["Where does Ada live?", "Q: 12+7", "a", "The quick brown fox (a small one) sleeps.", "x" * 40, "Zz?" * 7]


@pytest.mark.parametrize(("strong", "small"), PAIRS)
def test_random_members_of_unlike_architecture_width_and_depth(tmp_path, strong, small):
    base = tiny.make(small, seed=1)
    models = {"strong": tiny.make(strong, seed=0, width=128, layers=3), "base": base}
    models |= {"math": tiny.tuned(base, 10), "facts": tiny.tuned(base, 11)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny.make_tokenizer().save_pretrained(tmp_path / name)
    where = {name: str(tmp_path / name) for name in models}
    experts = {name: where[name] for name in ("math", "facts")}
    fused = FusedCausalLM.from_members(where["strong"], where["base"], experts)
    fused.save_pretrained(tmp_path / "fused")
    prompts = [fused.tokenizer(text)["input_ids"] for text in TEXTS]
    with engine(tmp_path / "fused", max_num_batched_tokens=128) as llm:
        check_same(fused, prompts, served(llm, prompts), expected(fused, prompts), most=1)
