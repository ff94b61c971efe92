"""Rows fused each by its own request's settings: laws of the scale, of groups, and of what is counted and kept."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from trimtab import make_strategy
from trimtab.core.divergence import kl_nats
from trimtab.logits.registry import AMOUNTS
from trimtab.serving.histograms import KL_EDGES, Histograms
from trimtab.serving.requests import NOTHING_SET, RequestSettings
from trimtab.serving.steering import RowOwners, Steering, fuse_each
from trimtab.serving.traces import REQUESTS_KEPT, TraceBook, TraceKey

NAMES = ("math", "facts")
ROWS, VOCAB = 7, 40


def members(seed: int):
    """(strong, base, experts): log-probabilities of random members."""
    draws = torch.randn(4, ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
    return draws[0], draws[1], draws[2:]


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_scale_0_is_the_strong_model_and_1_the_strategy(amount: str, seed: int) -> None:
    strategy = make_strategy(amount, expert_names=NAMES)
    laws = members(seed)
    same(fuse_each(*laws, [RequestSettings(0.0)] * ROWS, strategy).log_probs, laws[0])
    same(fuse_each(*laws, [NOTHING_SET] * ROWS, strategy).log_probs, strategy(*laws).log_probs)


@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_the_scale_multiplies_a_strategys_alpha(scale: float) -> None:
    laws = members(1)
    scaled = fuse_each(*laws, [RequestSettings(scale)] * ROWS, make_strategy("static", "sum", NAMES, alpha=0.8))
    direct = make_strategy("static", "sum", NAMES, alpha=0.8 * scale)(*laws)
    same(scaled.log_probs, direct.log_probs)
    same(scaled.alpha, direct.alpha)
    same(scaled.kl_nats, direct.kl_nats)


def test_tokens_that_are_ruled_out_stay_so_and_nothing_is_undefined() -> None:
    strong, base, experts = members(2)
    strong = strong.index_fill(-1, torch.tensor([3]), -torch.inf).log_softmax(-1)
    for amount, scale in itertools.product(AMOUNTS, (0.0, 0.5, 2.0)):
        fusion = fuse_each(strong, base, experts, [RequestSettings(scale)] * ROWS, make_strategy(amount))
        assert not fusion.log_probs.isnan().any(), (amount, scale)
        assert (fusion.log_probs[:, 3] == -torch.inf).all(), (amount, scale)
        same(fusion.log_probs.exp().sum(-1), torch.ones(ROWS))


def test_rows_of_unlike_settings_are_each_what_they_are_alone() -> None:
    strategy = make_strategy("dynamic", expert_names=NAMES)
    laws = members(3)
    settings = [
        NOTHING_SET,
        RequestSettings(0.5),
        RequestSettings(experts=("facts",)),
        RequestSettings(numbers=(("alpha_max", 0.2),)),
        NOTHING_SET,
        RequestSettings(1.5, ("math",)),
        RequestSettings(0.5),
    ]
    together = fuse_each(*laws, settings, strategy)
    for row, asked in enumerate(settings):
        strong, base, experts = laws[0][row : row + 1], laws[1][row : row + 1], laws[2][:, row : row + 1]
        alone = fuse_each(strong, base, experts, [asked], strategy)
        same(together.log_probs[row], alone.log_probs[0])
        same(together.alpha[:, row], alone.alpha[:, 0])
        same(together.kl_nats[row], kl_nats(alone.log_probs, strong)[0])
        assert together.is_chosen[:, row].tolist() == alone.is_chosen[:, 0].tolist()
    assert not together.is_chosen[0, 2]
    assert together.is_chosen[1, 2]
    assert float(together.alpha[:, 3].max()) <= 0.2 + 1e-6
    # The settings do something at all.
    assert (together.log_probs[1] - strategy(*laws).log_probs[1]).abs().max() > 0.01


class Named:
    """Owners that a test names."""

    def __init__(self, owners) -> None:
        self.owners = owners

    def of(self, hidden_states):
        return self.owners


def steering_of(owners, strategy=None) -> Steering:
    plan = SimpleNamespace(
        strategy=strategy or make_strategy("dynamic", expert_names=NAMES), vocab_size=VOCAB, body_of=(0, 1, 2, 3)
    )
    return Steering(plan, Named(owners))


def test_an_engine_fuses_counts_and_keeps(monkeypatch) -> None:
    strong, base, experts = members(4)
    logits = [torch.cat([part, torch.zeros(ROWS, 2)], dim=-1) for part in (strong, base, *experts)]  # padded vocabulary
    a, b = TraceKey("a"), TraceKey("b", 2)
    keys = [a, None, a, b, None, None, None]
    owners = RowOwners([RequestSettings(0.5)] * ROWS, keys, [4, 9, 5, 7, 0, 0, 0], [True] * 5 + [False] * 2)
    steering = steering_of(owners)
    whole = steering.fuse(logits, torch.zeros(ROWS, 1))
    expected = fuse_each(strong, base, experts, owners.settings, steering.plan.strategy)
    same(whole, expected.log_probs)
    histograms = steering.histograms.to_dict()
    assert sum(sum(counts["buckets"]) for counts in histograms["alpha"].values()) == 5
    same(sum(counts["sum"] for counts in histograms["kl_nats"].values()), float(expected.kl_nats[:5].sum()))
    steps = steering.traces.steps(a, 4)
    assert [step["kl_nats"] for step in steps] == pytest.approx(expected.kl_nats[[0, 2]].tolist())
    assert steps[0]["alpha"] == pytest.approx(dict(zip(NAMES, expected.alpha[:, 0].tolist(), strict=True)))
    assert len(steering.traces.steps(b, 7)) == 1
    # Some rows at a time it is the same.
    monkeypatch.setattr("trimtab.serving.batch_fusion.CHUNK_NUMBERS", VOCAB * 4 * 2)
    pieces = steering_of(owners)
    same(pieces.fuse(logits, torch.zeros(ROWS, 1)), whole)
    assert pieces.histograms.to_dict()["alpha"]["math"]["buckets"] == histograms["alpha"]["math"]["buckets"]
    assert pieces.traces.steps(a, 4) == steps


def test_rows_of_nobody_are_fused_and_not_counted() -> None:
    strong, base, experts = members(5)
    steering = steering_of(None)
    fused = steering.fuse([strong, base, *experts], torch.zeros(ROWS, 1))
    same(fused, steering.plan.strategy(strong, base, experts).log_probs)
    assert steering.histograms.to_dict() == {}


def test_the_tally_puts_values_under_the_edges_that_hold_them() -> None:
    histograms = Histograms(NAMES)
    strong, base, experts = members(6)
    fusion = make_strategy("static", "only", NAMES, expert="facts", alpha=0.5)(strong, base, experts)
    histograms.add(fusion)
    histograms.add(fusion)
    found = histograms.to_dict()
    assert found["alpha"]["facts"] == {"sum": pytest.approx(0.5 * 2 * ROWS), "buckets": [0, 0, 2 * ROWS] + [0] * 7}
    assert sum(found["alpha"]["math"]["buckets"]) == sum(found["alpha"]["none"]["buckets"]) == 0
    under_one = int((fusion.kl_nats <= 1.0).sum())
    assert sum(found["kl_nats"]["facts"]["buckets"][: KL_EDGES.index(1.0) + 1]) == 2 * under_one
    silent = Histograms(NAMES)
    silent.add(make_strategy("contrastive", expert_names=NAMES)(strong, base, experts))
    assert sum(silent.to_dict()["kl_nats"]["none"]["buckets"]) == ROWS


def test_traces_of_the_latest_requests_are_kept_in_order_and_without_gaps() -> None:
    fusion = make_strategy("dynamic", expert_names=NAMES)(*members(7))
    book, x = TraceBook(NAMES), TraceKey("x")
    book.add(fusion, [TraceKey("old")] + [None] * 6, [0] * ROWS)
    book.add(fusion, [x, x, x] + [None] * 4, [3, 2, 5] + [0] * 4)
    assert [step["kl_nats"] for step in book.steps(x, 2)] == pytest.approx(fusion.kl_nats[[1, 0]].tolist())
    book.add(fusion, [None] * 6 + [x], [2] * ROWS)  # read again
    assert book.steps(x, 2)[0]["kl_nats"] == pytest.approx(float(fusion.kl_nats[6]))
    for number in range(REQUESTS_KEPT):
        book.add(fusion, [TraceKey(f"new {number}")] + [None] * 6, [0] * ROWS)
    assert book.steps(TraceKey("old"), 0) == []
    assert len(book.steps(TraceKey(f"new {REQUESTS_KEPT - 1}"), 0)) == 1


def test_all_choices_of_a_request_count_as_one_request() -> None:
    fusion = make_strategy("dynamic", expert_names=NAMES)(*members(7))
    book = TraceBook(NAMES)
    book.add(fusion, [TraceKey("other")] + [None] * 6, [0] * ROWS)
    for choice in range(2 * REQUESTS_KEPT):
        book.add(fusion, [TraceKey("one", choice)] + [None] * 6, [0] * ROWS)
    assert len(book.steps(TraceKey("other"), 0)) == 1
    assert all(len(book.steps(TraceKey("one", choice), 0)) == 1 for choice in range(2 * REQUESTS_KEPT))


def test_a_dropped_request_that_goes_on_does_not_come_back(monkeypatch) -> None:
    monkeypatch.setattr("trimtab.serving.traces.REQUESTS_KEPT", 2)
    fusion = make_strategy("dynamic", expert_names=NAMES)(*members(7))
    book, keys = TraceBook(NAMES), [TraceKey(name) for name in "abc"]
    for position in range(3):  # three at a time, where there is room for two
        for key in keys:
            book.add(fusion, [key] + [None] * 6, [position] * ROWS)
    assert [len(book.steps(key, 0)) for key in keys] == [0, 3, 3]
    assert book.steps(keys[0], 1) == []  # nor from the middle on


def test_traces_take_bounded_room_however_long_the_texts_are(monkeypatch) -> None:
    monkeypatch.setattr("trimtab.serving.traces.ALL_POSITIONS_KEPT", 20)
    monkeypatch.setattr("trimtab.serving.traces.POSITIONS_KEPT", 14)
    fusion = make_strategy("dynamic", expert_names=NAMES)(*members(7))
    book = TraceBook(NAMES)

    def read(key: str, *starts: int, choice: int = 0) -> None:
        for start in starts:
            book.add(fusion, [TraceKey(key, choice)] * ROWS, range(start, start + ROWS))

    def kept(*keys: str) -> list[int]:
        return [len(book.steps(TraceKey(key), 0)) for key in keys]

    read("a", 0, 0)  # read twice, counted once
    read("b", 0)
    assert kept("a", "b") == [7, 7]
    read("c", 0)
    assert kept("a", "b", "c") == [0, 7, 7]
    read("c", 7, 14)  # more than one request may have
    read("c", 0, choice=1)  # nor may its choices have more together
    assert kept("b", "c") == [0, 14]
    assert book.steps(TraceKey("c", 1), 0) == []
    read("d", 0)
    assert kept("c", "d") == [0, 7]
