"""Members with different tokens: the fused distribution is what the formula says, in every way of reading."""

import pytest
import torch

from fusing import check_same_tokens
from other_tokens import MAP, R0, R1, SOFT, UNKNOWN, V, make_models, save_members
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, TrimtabWarning
from trimtab.serving.batch_fusion import fuse_rows

STATIC = {"amount": "static", "chooser": "sum", "settings": {"alpha": 0.7}}
DYNAMIC = {"amount": "dynamic", "chooser": "only", "settings": {"expert": "swapped"}}
TEXT = [9, R0, 20, SOFT, R1, 31, 12, R0, 40]


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    return save_members(tmp_path_factory.mktemp("tokens"), models)


@pytest.fixture(scope="module")
def fused(folder):
    experts = {name: folder / name for name in ("swapped", "padded")}
    with pytest.warns(
        TrimtabWarning, match=r"'\[PAD\]' \(87\) cut.*'<soft>' \(86\) with delta 0, missing in 'base', 'swapped'"
    ):
        made = FusedCausalLM.from_members(folder / "strong", folder / "base", experts, STATIC, token_map=MAP)
    made.save_pretrained(folder / "fused")
    return FusedCausalLM.from_pretrained(folder / "fused")


def obvious_distributions(models, text):
    """Log-probabilities [time, vocab] of strong, base and both experts for the fused tokens, token by token."""
    own_id = {
        "strong": lambda i: i,
        "base": lambda i: None if i == SOFT else i,
        "swapped": lambda i: {R0: V + 1, R1: V, SOFT: None}.get(i, i),
        "padded": lambda i: i,
    }
    found = {}
    for name, model in models.items():
        read = [UNKNOWN if own_id[name](i) is None else own_id[name](i) for i in text]
        logits = model(torch.tensor([read])).logits[0].detach().double()
        scores = torch.full((len(text), V + 3), -torch.inf, dtype=torch.double)
        for i in range(V + 3):
            if name == "strong" or i != SOFT:  # what one small member lacks is left out of all
                scores[:, i] = logits[:, own_id[name](i)]
        found[name] = scores.log_softmax(dim=-1)
    return found


def obvious_fusion(models, text, strategy):
    """[time, vocab]: log p + alpha * delta with delta 0 for what small members lack, alpha from a fine grid."""
    laws = obvious_distributions(models, text)
    is_shared = torch.arange(V + 3) != SOFT
    delta = {n: torch.where(is_shared, laws[n] - laws["base"], 0.0) for n in ("swapped", "padded")}
    if strategy is STATIC:
        return (laws["strong"] + 0.7 * (delta["swapped"] + delta["padded"])).log_softmax(dim=-1)
    rows = []
    for p, d, q, e in zip(laws["strong"], delta["swapped"], laws["base"], laws["swapped"], strict=True):
        q, e = q[is_shared], e[is_shared]
        forward, reverse = (e.exp() * (e - q)).sum(), (q.exp() * (q - e)).sum()
        family = (p + torch.linspace(0, 2, 20001).unsqueeze(-1) * d).log_softmax(dim=-1)  # [alpha, vocab]
        moved, back = (family.exp() * (family - p)).sum(-1), (p.exp() * (p - family)).sum(-1)
        rows.append(family[((moved - forward) ** 2 + (back - reverse) ** 2).argmin()])
    return torch.stack(rows)


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_the_fused_distribution_is_the_formulas(models, fused, strategy):
    fused.strategy = strategy
    expected = obvious_fusion(models, TEXT, strategy)
    ids = torch.tensor([TEXT])
    torch.testing.assert_close(fused(ids).logits[0].double().log_softmax(-1), expected, atol=2e-3, rtol=0)
    cache, steps = None, []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        output = fused(ids[:, start:end], past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits[0])
    torch.testing.assert_close(torch.cat(steps).double().log_softmax(-1), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_generation_drafts_and_traces_follow_the_formula(models, fused, strategy):
    fused.strategy = strategy
    inputs = {"input_ids": torch.tensor([TEXT]), "attention_mask": torch.ones(1, len(TEXT), dtype=torch.long)}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = [
        fused.generate(**inputs, **options, **more)[:, len(TEXT) :]
        for more in ({}, {"use_cache": False}, {"speculate": 3}, {"speculate": 3, "speculate_draft": "prompt"})
    ]
    for ids in found[1:]:
        check_same_tokens(fused, found[0], ids, inputs)
    text = [*TEXT, *found[0][0].tolist()]
    expected = obvious_fusion(models, text[:-1], strategy)[len(TEXT) - 1 :]
    assert expected.argmax(dim=-1).tolist() == found[0][0].tolist()
    trace = fused.trace(torch.tensor(TEXT), **options)
    strong = obvious_distributions(models, text[:-1])["strong"][len(TEXT) - 1 :]
    moved = (expected.exp() * (expected - strong)).sum(dim=-1)
    assert [step.token_id for step in trace.steps] == found[0][0].tolist()
    torch.testing.assert_close(torch.tensor([s.kl_nats for s in trace.steps]), moved.float(), atol=2e-3, rtol=0)


def test_rows_of_an_engine_are_fused_by_the_same_rule(models, fused):
    fused.strategy = STATIC
    vocabulary = fused.vocabulary
    logits = [
        vocabulary.align(name, model(vocabulary.read(name, torch.tensor([TEXT]))).logits[0].detach())
        for name, model in models.items()
    ]
    found = fuse_rows(logits, (0, 1, 2, 3), fused.strategy, vocabulary.size)
    torch.testing.assert_close(found, fused(torch.tensor([TEXT])).logits[0])


@pytest.mark.parametrize("amount", ["static", "filter", "product", "mixture"])
def test_what_small_members_lack_is_the_strong_models_to_decide(models, fused, amount):
    fused.strategy = {"amount": amount, "chooser": "sum"}
    strong = obvious_distributions(models, TEXT)["strong"]
    found = fused(torch.tensor([TEXT])).logits[0].double().log_softmax(-1)
    others = torch.arange(V + 3) != SOFT
    if amount == "mixture":
        torch.testing.assert_close(found[:, SOFT], strong[:, SOFT], atol=1e-4, rtol=0)
    assert (found[:, SOFT] > -30).all()
    moved = fused.strategy(*(law.float() for law in _restricted(models, others)))
    within = found[:, others].log_softmax(dim=-1)
    torch.testing.assert_close(within.float(), moved.log_probs, atol=1e-3, rtol=0)


def _restricted(models, kept):
    """strong, base, experts on the kept tokens alone."""
    laws = [law[:, kept].log_softmax(dim=-1) for law in obvious_distributions(models, TEXT).values()]
    return laws[0], laws[1], torch.stack(laws[2:])


def test_a_token_outside_the_vocabulary_is_refused_unless_it_is_padding(fused):
    fused.strategy = STATIC
    with pytest.raises(BadSetting, match=r"holds token 87, which is not in the fused vocabulary"):
        fused(torch.tensor([[5, V + 3]]))
    with pytest.raises(BadSetting, match="holds token 87"):
        fused.generate(torch.tensor([[5, V + 3]]), max_new_tokens=1)
    mask = torch.tensor([[0, 0, 1, 1]])
    beyond = fused(torch.tensor([[V + 3, V + 3, 5, 6]]), attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(beyond, fused(torch.tensor([[0, 0, 5, 6]]), attention_mask=mask).logits[:, 2:])
    torch.testing.assert_close(beyond, fused(torch.tensor([[5, 6]])).logits)


def test_a_member_with_other_ids_cannot_assist_but_may_draft(fused):
    inputs = {"input_ids": torch.tensor([TEXT]), "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(BadSetting, match=r"(?s)'swapped' cannot be the assistant_model.*speculate_draft='swapped'"):
        fused.generate(**inputs, assistant_model=fused.members.experts["swapped"].model)
    fused.generate(**inputs, speculate="auto", speculate_draft="swapped")  # the fix
