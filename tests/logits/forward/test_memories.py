"""Models that remember in other ways than by keys and values: with a cache they give what they give without."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import tiny
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting

SHAPE = tiny.SHAPE | tiny.TOKENS | tiny.WIDE | {"hidden_size": 32, "num_key_value_heads": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
KINDS = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "chunk_size": 8},
    "minimax": LINEAR | EXPERTS | {"block_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
    "olmo_hybrid": LINEAR | DELTA,
}
# MiniMax reads padding as text when it has a cache, so a padded batch is refused.
REFUSES_PADDING = ("minimax",)

GREEDY = {"max_new_tokens": 6, "do_sample": False}
ALPHA_0 = {"amount": "static", "settings": {"alpha": 0.0}}
IDS = torch.randint(4, tiny.VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def make(kind, **more):
    """A random model of a kind that stops at no token, so that all texts have one length."""
    settings = SHAPE | KINDS.get(kind, {}) | more
    if kind == "rwkv":
        del settings["initializer_range"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float().eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model


def fuse(strong):
    base = tiny.make(seed=1)
    experts = {"a": tiny.tuned(base, 3)}
    fused = FusedCausalLM.from_members(strong, base, experts, ALPHA_0, tiny.make_tokenizer())
    fused.generation_config.eos_token_id = fused.config.eos_token_id = None
    return fused


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A strong model of a kind, and the model that is fused of it; do not change them."""
    strong = make(request.param)
    return request.param, strong, fuse(strong)


def new_tokens(model, ids, **options):
    return model.generate(ids, **(GREEDY | options))[:, ids.shape[1] :]


def padded(ids, short):
    """Two rows, the second shorter and padded on the left; their mask."""
    pad = ids.shape[1] - short.shape[1]
    both = torch.cat([ids, torch.nn.functional.pad(short, (pad, 0))])
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    return {"inputs": both, "attention_mask": mask}


def test_at_alpha_0_it_generates_what_the_strong_model_does(case):
    _, strong, fused = case
    for row in IDS.split(1):
        own = new_tokens(strong, row)
        assert torch.equal(new_tokens(fused, row), own)
        assert torch.equal(new_tokens(fused, row, prefill_chunk_size=4), own)
    assert torch.equal(new_tokens(fused, row, use_cache=False), own)


def test_a_batch_gives_what_its_rows_give(case):
    kind, _, fused = case
    long, short = IDS[:1], IDS[1:, 4:]
    alone = torch.cat([new_tokens(fused, long), new_tokens(fused, IDS[1:])])
    assert torch.equal(new_tokens(fused, IDS), alone)
    inputs, rows = padded(long, short), torch.cat([new_tokens(fused, long), new_tokens(fused, short)])
    width = inputs["inputs"].shape[1]
    assert torch.equal(fused.generate(**inputs, **GREEDY, use_cache=False)[:, width:], rows)
    if kind in REFUSES_PADDING:
        with pytest.raises(BadSetting, match=r"(?s)'strong' cannot be read with a cache and padding.*use_cache=False"):
            fused.generate(**inputs, **GREEDY)
    else:
        assert torch.equal(fused.generate(**inputs, **GREEDY)[:, width:], rows)


def test_beams_with_a_cache_are_those_without(case):
    _, _, fused = case
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(new_tokens(fused, IDS, **beams), new_tokens(fused, IDS, use_cache=False, **beams))


def test_what_takes_tokens_back_is_refused_or_goes_token_by_token(case):
    _, _, fused = case
    expected = new_tokens(fused, IDS[:1])
    with pytest.raises(BadSetting, match="cannot take back"):
        new_tokens(fused, IDS[:1], speculate=2)
    assert torch.equal(new_tokens(fused, IDS[:1], speculate="auto"), expected)
    with pytest.raises(BadSetting, match=r"running state .* which cannot take tokens back"):
        new_tokens(fused, IDS[:1], prompt_lookup_num_tokens=3)


def test_rows_of_the_cache_are_selected_and_repeated(case):
    _, _, fused = case
    rows = torch.tensor([1, 1, 0])
    for change, argument, kept in (("batch_select_indices", rows, rows), ("batch_repeat_interleave", 2, [0, 0, 1, 1])):
        cache = fused(IDS[:, :8], use_cache=True).past_key_values
        getattr(cache, change)(argument)
        found = fused(IDS[kept, 8:9], past_key_values=cache).logits[:, -1]
        expected = fused(IDS[kept, :9], use_cache=False).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        assert cache.get_seq_length() == 9


def test_right_padding_is_not_continued():
    fused = fuse(make("mamba"))
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    cache = fused(IDS, attention_mask=mask, use_cache=True).past_key_values
    after = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=-1)
    with pytest.raises(BadSetting, match=r"(?s)padded on the right, and member 'strong' .*padding_side = 'left'"):
        fused(IDS[:, :1], attention_mask=after, past_key_values=cache)


def test_a_small_member_may_be_recurrent_too():
    base = make("mamba2")
    experts = {name: tiny.tuned(base, seed, 0.1) for seed, name in enumerate("ab")}
    fused = FusedCausalLM.from_members(tiny.make(seed=0, width=48), base, experts, "static", tiny.make_tokenizer())
    fused.generation_config.eos_token_id = fused.config.eos_token_id = None
    assert torch.equal(new_tokens(fused, IDS), new_tokens(fused, IDS, use_cache=False))


def test_all_members_may_be_recurrent():
    base = make("rwkv")
    experts = {"a": tiny.tuned(base, 3, 0.1)}
    fused = FusedCausalLM.from_members(make("mamba"), base, experts, "static", tiny.make_tokenizer())
    fused.generation_config.eos_token_id = fused.config.eos_token_id = None
    assert torch.equal(new_tokens(fused, IDS), new_tokens(fused, IDS, use_cache=False))
    cache = fused(IDS, use_cache=True).past_key_values
    assert cache.get_seq_length() == IDS.shape[1]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_model_whose_state_is_not_in_its_cache_needs_the_users_word():
    """RecurrentGemma keeps its state in its modules: beams and a second text would replace it."""
    blocks = {"block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 8, "lru_width": 32}
    strong = make("recurrent_gemma", head_dim=8, num_hidden_layers=3, **blocks)
    fused = fuse(strong)
    with pytest.raises(BadSetting, match="it keeps a state in its own modules, where the next text replaces it"):
        new_tokens(fused, IDS)
    expected = [new_tokens(strong, row) for row in IDS.split(1)]
    assert torch.equal(new_tokens(fused, IDS, use_cache=False), torch.cat(expected))


def test_a_model_without_a_cache_needs_the_users_word():
    strong = make("openai-gpt", n_embd=32, n_layer=2, n_head=4, n_positions=128)
    fused = fuse(strong)
    with pytest.raises(BadSetting, match=r"(?s)'strong' cannot be read with a cache: .*use_cache=False") as error:
        new_tokens(fused, IDS)
    assert "fused.config.use_cache = False" in str(error.value)
    expected = [new_tokens(strong, row, use_cache=False) for row in IDS.split(1)]
    assert torch.equal(new_tokens(fused, IDS, use_cache=False), torch.cat(expected))
    with pytest.raises(BadSetting, match="cannot be read with a cache"):
        fused(IDS)
    fused.config.use_cache = False
    torch.testing.assert_close(fused(IDS).logits, strong(IDS).logits, atol=1e-4, rtol=1e-4)
