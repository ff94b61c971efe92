"""The law of sampled texts with drafts where ends, padding, windows, joint forwards and processors meet them."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

import tiny
from text_laws import END, VOCAB, Case, Prompts, no_pair_twice, one_after_the_other, repeated_less, warped
from trimtab import FusedCausalLM
from trimtab.logits.forward.cache import FusedCache
from trimtab.logits.speculation import decode, ragged
from trimtab.logits.speculation.decode import SpeculativeDecoder
from trimtab.logits.speculation.processors import Scorer
from trimtab.logits.speculation.sequences import Rows

# peft asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ONE = Prompts.of([2, 3, 3])
RAGGED = Prompts.of([2], [3, 2, 3, 3, 2, 2, 3], [2, 3], [3, 3, 2, 2])
WINDOW = 3
LEAST_P = 1e-3  # of about 30 tests with fixed seeds


def make(kind, seed, layers=1, window=None):
    """A tiny random model."""
    config = tiny.config_of(kind, width=16, layers=layers, vocab=VOCAB)
    if window is not None:
        config.sliding_window = window
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def fuse(strong, base, strategy="dynamic", **options):
    """Fused with two full experts."""
    experts = {name: tiny.tuned(base, seed, strength=0.8) for name, seed in (("math", 10), ("facts", 11))}
    return FusedCausalLM.from_members(strong, base, experts, strategy, **options)


def fuse_adapters(folder):
    """Fused with two LoRA experts."""
    base = make("llama", 1)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("math", "facts")):
        torch.manual_seed(seed)
        own = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(own, config)
        for part, parameter in adapted.named_parameters():
            if "lora_" in part:
                torch.nn.init.normal_(parameter, std=0.4)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    experts = {name: folder / name for name in ("math", "facts")}
    return FusedCausalLM.from_members(make("llama", 0), folder / "base", experts, one_pass=True)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{name: case}."""
    plain = fuse(make("llama", 0), make("llama", 1), one_pass=False)
    filtered = fuse(make("llama", 0), make("llama", 1), {"amount": "filter", "chooser": "sum"})
    stacked = fuse(make("llama", 0), make("llama", 1), one_pass=True)
    windows = fuse(make("gemma2", 0, layers=2, window=WINDOW), make("mistral", 1, window=WINDOW))
    adapters = fuse_adapters(tmp_path_factory.mktemp("adapters"))
    pairs = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "temperature": 1.2, "top_p": 0.95, "top_k": 0}
    paired = one_after_the_other(repeated_less(1.7), no_pair_twice, warped(1.2, 0.95))
    return {
        "warped": Case(plain, ONE, {"temperature": 1.3, "top_p": 0.9, "top_k": 0}, warped(1.3, 0.9)),
        "ends": Case(plain, ONE, {"top_k": 0}, end=END),
        "ends of filtered": Case(filtered, ONE, {"top_k": 0, "temperature": 0.8}, warped(0.8, 1.0), END),
        "padding": Case(plain, RAGGED, {"top_k": 0}),
        "padding and ends": Case(plain, RAGGED, {"top_k": 0}, end=END),
        "windows": Case(windows, Prompts.of([2, 3, 3, 2, 2]), {"top_k": 0}),
        "windows, padding and ends": Case(windows, RAGGED, {"top_k": 0}, end=END),
        "stacked": Case(stacked, RAGGED, {"top_k": 0}, end=END),
        "adapters": Case(adapters, RAGGED, {"top_k": 0}, end=END),
        "adapters, long": Case(adapters, ONE, {"top_k": 0}),
        "processors": Case(plain, ONE, pairs, paired),
        "processors and padding": Case(plain, Prompts.of([2, 3], [3, 2, 2]), pairs, paired, END),
    }


NAMES = [
    "warped",
    "ends",
    "ends of filtered",
    "padding",
    "padding and ends",
    "windows",
    "windows, padding and ends",
    "stacked",
    "adapters",
    "adapters, long",
    "processors",
    "processors and padding",
]


def test_the_cases_are_what_they_say(cases):
    assert set(cases) == set(NAMES)
    kinds = {name: [group.kind for group in case.fused.reader.groups] for name, case in cases.items()}
    assert kinds["ends"] == ["alone"] * 4
    assert kinds["stacked"] == ["alone", "stacked"]
    assert kinds["adapters"] == kinds["adapters, long"] == ["alone", "adapters"]
    layers = cases["windows"].fused.reader.groups[0].new_group_cache().layers
    assert [getattr(layer, "sliding_window", None) for layer in layers] == [WINDOW, None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "texts"), [pytest.param(1, 60, marks=pytest.mark.thorough), (8, 240)])
def test_short_texts_follow_their_law(cases, name, batch, texts):
    case = cases[name]
    torch.manual_seed(12)
    sample = case.sample(batch, texts, steps=5)
    assert case.p_of_texts(sample) > LEAST_P
    assert case.p_of_tokens(sample) > LEAST_P


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in NAMES if "processors" not in name])
def test_a_thousand_texts_at_a_time_follow_their_law(cases, name):
    case = cases[name]
    torch.manual_seed(12)
    assert case.p_of_texts(case.sample(1000, 4000, steps=4)) > LEAST_P


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["padding", "windows", "adapters, long"])
@pytest.mark.parametrize(("batch", "texts"), [(1, 6), (8, 16)])
def test_tokens_of_long_texts_follow_their_law(cases, name, batch, texts):
    """Windows of 3 tokens slide ten times over."""
    case = cases[name]
    torch.manual_seed(12)
    assert case.p_of_tokens(case.sample(batch, texts, steps=30)) > LEAST_P


# ---- mistakes that the tests have to see


def of_the_strong_model(monkeypatch):
    """The bonus comes from the strong model."""
    honest = SpeculativeDecoder._with_bonus

    def with_bonus(self, target, logits, texts, draft):
        strong = [logits[self._run_of["strong"]]] * len(logits)
        return honest(self, target, dict(enumerate(strong)), texts, draft)

    monkeypatch.setattr(SpeculativeDecoder, "_with_bonus", with_bonus)


def of_the_fused_law(monkeypatch):
    """A rejected token is replaced by a draw from the fused law, not from the residual."""
    monkeypatch.setattr(decode, "residual", lambda target, proposal, rejected: target)


def writes_on_behind_ends(monkeypatch):
    """What is drafted behind an end, while other rows go on, is judged and emitted, too."""

    def extend(self, place, tokens, laws):
        self.texts[place] += tokens[: self._max_length - len(self.texts[place])]
        return self._is_done(self.texts[place], place)

    monkeypatch.setattr(Rows, "_extend", extend)
    monkeypatch.setattr(SpeculativeDecoder, "_until_ends", lambda self, ids: [ids.shape[1]] * len(ids))


def keeps_one_too_many(monkeypatch):
    """Each row forgets one token less than was not accepted."""
    honest = ragged.RaggedReading.take_back
    monkeypatch.setattr(
        ragged.RaggedReading, "take_back", lambda self, group, n: honest(self, group, (n - 1).clamp_min(0))
    )


def moves_no_keys(monkeypatch):
    """Rows that differ in length are cropped without being moved to the right."""
    monkeypatch.setattr(ragged, "_move_right", lambda layer, shift: None)


def keeps_the_wrong_rows(monkeypatch):
    """When rows end, the caches keep the first ones."""
    honest = FusedCache.batch_select_indices
    monkeypatch.setattr(FusedCache, "batch_select_indices", lambda self, rows: honest(self, torch.arange(len(rows))))


def loses_the_oldest_token_of_a_window(monkeypatch):
    """What a window shows first is gone after a round, as if the window had been cut before drafts were taken back."""
    honest = ragged.RaggedReading.take_back

    def take_back(self, group, counts):
        honest(self, group, counts)
        for layer in self.cache.views[group].layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.values = torch.cat([torch.zeros_like(layer.values[..., :1, :]), layer.values[..., 1:, :]], dim=-2)

    monkeypatch.setattr(ragged.RaggedReading, "take_back", take_back)


def processes_without_the_draft(monkeypatch):
    """The processors see the text before the draft only."""
    honest = Scorer._at
    monkeypatch.setattr(Scorer, "_at", lambda self, law, text, drafted, place: honest(self, law, text, [], place))


# A draft of one token stands often, so that there are many bonuses; of the base's tokens few stand.
OFTEN_WHOLE, OFTEN_REPLACED = {"speculate": 1}, {"speculate_draft": "base"}
MISTAKES = [
    (of_the_strong_model, "warped", (1, 8, 1000), OFTEN_WHOLE),
    (of_the_fused_law, "warped", (1, 8, 1000), OFTEN_REPLACED),
    (writes_on_behind_ends, "ends", (8,), {}),
    (keeps_one_too_many, "padding", (1, 8), OFTEN_REPLACED),
    (moves_no_keys, "padding", (8,), OFTEN_REPLACED),
    (keeps_the_wrong_rows, "padding and ends", (8,), {}),
    (loses_the_oldest_token_of_a_window, "windows", (1, 8), {}),
    (processes_without_the_draft, "processors", (1, 8), {}),
]
RUNS = [(mistake, name, batch, options) for mistake, name, batches, options in MISTAKES for batch in batches]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mistake", "name", "batch", "options"), RUNS, ids=[f"{run[0].__name__}-{run[1]}-{run[2]}" for run in RUNS]
)
def test_mistakes_are_seen(cases, monkeypatch, mistake, name, batch, options):
    """2,000 tokens or more of long texts, or some hundred short ones; and far below the honest tests' threshold."""
    case = cases[name]
    is_short = case.end is not None or name == "processors" or batch == 1000
    texts, steps = ({1: 150, 8: 400, 1000: 4000}, 4) if is_short else ({1: 50, 8: 40}, 60)
    mistake(monkeypatch)
    torch.manual_seed(12)
    sample = case.sample(batch, texts[batch], steps, **options)
    found = [case.p_of_texts(sample)] if is_short else []
    found += [case.p_of_tokens(sample)] if batch < 1000 else []
    assert min(found) < 1e-6
