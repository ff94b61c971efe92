"""The solver at positions of the zoo's own trios, against dense float64 scans: real laws, as decoding meets them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from laws import ALPHA_MAX, kl, objective, rises_nearby, scan
from trimtab import zoo
from trimtab.logits.solver.match import EVALUATIONS, match_divergences
from trimtab.logits.solver.tilted import TiltedFamily

ITEMS = 6  # per task: about 2,000 positions over all trios
POINTS = 201


@pytest.fixture(scope="module")
def members():
    """Loaded members by name; each is read once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(zoo.resolve(f"zoo:{name}"), dtype=torch.float32).eval()
        return loaded[name]

    return load


@torch.no_grad()
def laws_at(model, texts: list[list[int]]) -> torch.Tensor:
    """The model's log-probabilities at every position of the texts, float64 [row, vocab]."""
    rows = [model(torch.tensor([ids])).logits[0] for ids in texts]
    return torch.cat(rows).double().log_softmax(-1)


def check(strong: torch.Tensor, base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """The solver against the scan: J everywhere, alpha where J measurably rises within 1e-5 of its minimum,
    at the ends of the range as well. Returns the scan's alpha there."""
    family = TiltedFamily(strong, expert - base)
    match = match_divergences(family, kl(expert, base), kl(base, expert), ALPHA_MAX)
    alpha, best, _ = scan(strong, base, expert, points=POINTS)
    assert family.evaluations <= EVALUATIONS
    assert (objective(strong, base, expert, match.alpha) - best).max() <= 1e-6
    clear = rises_nearby(strong, base, expert, alpha, best)
    assert clear.sum() > 10
    assert ((match.alpha - alpha).abs()[clear] <= 1e-5).all()
    assert (match.floor <= best + 1e-9).all()
    return alpha[clear]


@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_the_minimum_is_the_scans_on_random_models(strength):
    base = tiny.make(seed=1)
    models = tiny.make(seed=0, width=48, layers=3), base, tiny.tuned(base, seed=2, strength=strength)
    texts = [torch.randint(0, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    check(*(laws_at(model, texts) for model in models))


@pytest.mark.slow
@pytest.mark.parametrize("task", zoo.TUNED_TASKS)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_minimum_is_the_scans_at_every_position_of_a_zoo_trio(members, size, task):
    tokenizer = AutoTokenizer.from_pretrained(zoo.resolve("zoo:tokenizer"))
    items = zoo.load_items(task, "validation", limit=ITEMS)
    texts = [tokenizer(item.prompt + item.target)["input_ids"] for item in items]
    alpha = check(*(laws_at(members(name), texts) for name in ("strong", size, f"{size}/{task}")))
    assert (alpha == ALPHA_MAX).any(), "real laws reach the end of the range"
