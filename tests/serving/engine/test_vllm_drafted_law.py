"""Sampled with drafts, texts follow the fused law: not the drafter's, nor the strong model's.

The laws of the second and the third new token are worked out exactly by the transformers engine, over all tokens that
may come before; what vLLM draws is compared with them. The first draft is three tokens long, so that these tokens are
drafted, judged and, where they do not stand, drawn anew.
"""

import pytest
import torch
from engines import counters, engine, served
from vllm import SamplingParams
from vllm.v1.sample import rejection_sampler

import tiny
from trimtab import FusedCausalLM
from trimtab.serving.vllm.speculative_config import speculative_config

DRAWS = 6000
PROMPT = "Where does Ada live?"
VOCAB = tiny.VOCAB


@pytest.fixture(scope="module")
def tiny_fused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafted")
    base = tiny.make("llama", seed=1)
    models = {"strong": tiny.make("llama", seed=0, width=48, layers=2), "base": base, "math": tiny.tuned(base, 10)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    fused = FusedCausalLM.from_members(
        str(folder / "strong"), str(folder / "base"), {"math": str(folder / "math")}, strategy="static"
    )
    fused.save_pretrained(folder / "fused")
    return folder / "fused", fused


def next_laws(read, prompt, time, ends=()):
    """The laws [vocab] of the first `time` new tokens, summed over all texts that may come before.

    read    token ids [row, time] -> log-probabilities of the next token [row, vocab]
    ends    tokens with which a text ends: nothing comes behind them
    """
    goes_on = ~torch.isin(torch.arange(VOCAB), torch.tensor(ends, dtype=torch.long))
    texts, weights, laws = torch.tensor([prompt]), torch.ones(1), []
    for step in range(time):
        following = read(texts).exp()
        law = (weights.unsqueeze(-1) * following).sum(0)
        laws.append(law / law.sum())
        if step + 1 < time:
            weights = (weights.unsqueeze(-1) * following * goes_on).flatten()
            kept = (weights > 1e-6).nonzero().squeeze(-1)  # what is left out can hardly be drawn
            every = torch.arange(VOCAB).repeat(len(texts)).unsqueeze(-1)
            texts = torch.cat([texts.repeat_interleave(VOCAB, 0), every], dim=-1)[kept]
            weights = weights[kept]
    return laws


def surprise(tokens, law):
    """The probability that tokens drawn from a law differ from it as much as these: Pearson's chi-squared test."""
    expected, seen = law * len(tokens), torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)]).double().clamp_min(1e-9)
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def drawn(llm, prompt, **options):
    """New tokens of many samples, [draw][time]."""
    params = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True, n=100, **options)
    outputs = llm.generate([{"prompt_token_ids": prompt}] * (DRAWS // 100), params, use_tqdm=False)
    return [list(text.token_ids) for output in outputs for text in output.outputs]


def alone(member):
    """Log-probabilities of one member by itself."""
    with torch.no_grad():
        return lambda texts: torch.cat(
            [member.model(piece).logits[:, -1].detach().log_softmax(-1) for piece in texts.split(512)]
        )


def together(fused):
    """Log-probabilities of the fused model."""

    def read(texts):
        pieces = [
            fused(piece, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(-1) for piece in texts.split(512)
        ]
        return torch.cat(pieces)

    return read


@pytest.fixture(scope="module")
def laws(tiny_fused):
    """Exact laws of the second and third token: fused, of the strong model alone, of the drafter alone."""
    fused = tiny_fused[1]
    prompt = fused.tokenizer(PROMPT)["input_ids"]
    readers = {
        "fused": together(fused),
        "strong": alone(fused.members.strong),
        "math": alone(fused.members.experts["math"]),
    }
    return prompt, {name: next_laws(reader, prompt, 3)[1:] for name, reader in readers.items()}


def drafted(tiny_fused, **changes):
    drafting = speculative_config(tiny_fused[0], "math", tokens=3) | changes
    return engine(tiny_fused[0], speculative_config=drafting, max_num_seqs=256, seed=5)


@pytest.fixture(scope="module")
def llm(tiny_fused):
    """An engine whose drafter says what it thinks likeliest."""
    with drafted(tiny_fused) as llm:
        yield llm


def check_fused_law(found, known):
    for place in (1, 2):
        tokens = [text[place] for text in found]
        assert surprise(tokens, known["fused"][place - 1]) > 1e-3
        # The draws are enough to tell the fused law from others.
        assert surprise(tokens, known["strong"][place - 1]) < 1e-9
        assert surprise(tokens, known["math"][place - 1]) < 1e-9


def test_samples_with_drawn_drafts_follow_the_fused_law_and_a_wrong_rule_is_seen(tiny_fused, laws, monkeypatch):
    """Comes first: while it lasts there is no other engine in this process."""
    prompt, known = laws
    judge, known_probs = rejection_sampler.rejection_sample, []

    def judge_wrongly(ids, counts, longest, ends, draft_probs, logits, *rest, **options):
        """As if the drafter's law were the fused one: every draft stands."""
        known_probs.append(draft_probs is not None)
        wrong = logits if draft_probs is None else draft_probs.log()
        return judge(ids, counts, longest, ends, draft_probs, wrong, *rest, **options)

    with drafted(tiny_fused, draft_sample_method="probabilistic") as llm:
        check_fused_law(drawn(llm, prompt), known)
        monkeypatch.setattr(rejection_sampler, "rejection_sample", judge_wrongly)
        assert surprise([text[1] for text in drawn(llm, prompt)], known["fused"][0]) < 1e-9
        assert any(known_probs)


def test_samples_with_drafts_follow_the_fused_law(llm, laws):
    prompt, known = laws
    check_fused_law(drawn(llm, prompt), known)
    found = counters(llm)
    assert 0 < found["vllm:spec_decode_num_accepted_tokens"] < found["vllm:spec_decode_num_draft_tokens"]


def test_samples_with_drafts_that_are_cut_at_ends_follow_the_fused_law(llm, tiny_fused, laws):
    prompt, known = laws
    ends = known["math"][0].topk(12).indices.tolist()  # likely ones, so that many a draft is cut there
    after = next_laws(together(tiny_fused[1]), prompt, 3, ends)
    found = drawn(llm, prompt, stop_token_ids=ends)
    for place in (1, 2):
        tokens = [text[place] for text in found if len(text) > place]
        assert len(tokens) > 1000
        assert surprise(tokens, after[place]) > 1e-3
        assert surprise(tokens, known["math"][place - 1]) < 1e-9
    assert all(not set(text[:-1]) & set(ends) for text in found)


def test_seeds_hold_with_drafts(llm, laws):
    prompt, _ = laws
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True) for seed in range(24)]
    runs = [llm.generate([{"prompt_token_ids": prompt}] * len(params), params, use_tqdm=False) for _ in range(2)]
    texts = [[tuple(output.outputs[0].token_ids) for output in outputs] for outputs in runs]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 20


def test_log_probabilities_with_drafts_are_the_fused_ones(llm, tiny_fused, laws):
    prompt, fused = laws[0], tiny_fused[1]
    output = served(llm, [prompt], max_tokens=9, logprobs=3, ignore_eos=True)[0].outputs[0]
    new = list(output.token_ids)
    wanted = fused(torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(output.logprobs) == len(new) == 9
    for entries, law in zip(output.logprobs, wanted, strict=True):
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(law[token]), abs=1e-3)
