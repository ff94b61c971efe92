"""The compiled family and its searches against the plain ones."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import trimtab
from laws import ALPHA_MAX, LAWS, draw_laws, draw_members
from trimtab.logits.solver import compiled
from trimtab.logits.solver.compiled import CompiledFamily
from trimtab.logits.solver.deltas import measure_deltas, measure_deltas_plainly
from trimtab.logits.solver.match import EVALUATIONS, match_divergences, smaller_root
from trimtab.logits.solver.tilted import TiltedFamily

IMPOSSIBLE = [-torch.inf, torch.finfo(torch.float32).min]


def both_deltas(strong, base, expert):
    """The same pull, compiled and plain."""
    ours, plain = measure_deltas(strong, base, expert[None]), measure_deltas_plainly(strong, base, expert[None])
    assert isinstance(ours.family, CompiledFamily)
    assert isinstance(plain.family, TiltedFamily)
    return ours, plain


def is_clear(plain, truth, alpha_max):
    """Where J rises measurably within 1e-5 of its minimum: elsewhere rounding decides between equally good alphas."""
    targets = plain.forward[0], plain.reverse[0]
    scale = targets[0] ** 2 + targets[1] ** 2
    beside = [plain.family.at((truth.alpha + step).clamp(0.0, alpha_max)) for step in (-1e-5, 1e-5)]
    rises = [(m.kl_nats - targets[0]) ** 2 + (m.reverse_kl_nats - targets[1]) ** 2 - truth.objective for m in beside]
    return (torch.stack(rises).amax(0) > 1e-11 * scale) & (scale > 1e-10)


def check_agreement(strong, base, expert, alpha_max=ALPHA_MAX):
    """Targets, J, alpha and root of both versions; returns the compiled match."""
    ours, plain = both_deltas(strong, base, expert)
    torch.testing.assert_close(ours.forward, plain.forward, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours.reverse, plain.reverse, rtol=1e-10, atol=1e-13)
    match, truth = (match_divergences(p.family, p.forward[0], p.reverse[0], alpha_max) for p in (ours, plain))
    assert ours.family.evaluations <= EVALUATIONS
    assert not match.alpha.isnan().any()
    assert ((match.alpha >= 0) & (match.alpha <= alpha_max)).all()
    assert ((match.objective - truth.objective).abs() <= 1e-6 * (1e-3 + truth.objective)).all()
    assert (match.floor <= truth.objective * (1 + 1e-9) + 1e-12).all()
    clear = is_clear(plain, truth, alpha_max)
    assert ((match.alpha - truth.alpha).abs()[clear] <= 1e-5).all()
    root, true_root = (smaller_root(p.family, p.forward[0], p.reverse[0], alpha_max) for p in (ours, plain))
    is_measurable = torch.minimum(plain.forward[0], plain.reverse[0]) > 1e-9
    assert ((root - true_root).abs()[is_measurable] <= 1e-5).all()
    assert ours.family.evaluations <= 2 * EVALUATIONS
    return match


@pytest.mark.parametrize("alpha_max", [0.0, 0.3, 2.0, 10.0])
@pytest.mark.parametrize("vocab", [5, 40, 300, 4000])
@pytest.mark.parametrize("name", LAWS)
def test_the_compiled_search_is_the_plain_one(name, vocab, alpha_max):
    rows = {5: 200, 40: 200, 300: 40, 4000: 12}[vocab]
    check_agreement(*draw_laws(name, rows=rows, vocab=vocab, seed=vocab), alpha_max=alpha_max)


@pytest.mark.parametrize("vocab", [5, 1_000, 50_000, 260_000])
@pytest.mark.parametrize("name", ["gauss", "spikes"])
def test_float32_members_of_any_vocabulary(name, vocab):
    check_agreement(*(law.float() for law in draw_laws(name, rows=2, vocab=vocab, seed=3)))


@pytest.mark.parametrize("name", LAWS)
def test_moments_are_the_plain_ones(name):
    ours, plain = both_deltas(*draw_laws(name, rows=60, vocab=50, seed=5))
    for value in (-2.0, 0.0, 1e-3, 0.7, 2.0):
        alpha = torch.full((1, 60), value, dtype=torch.float64)
        found, truth = ours.family.at(alpha), plain.family.at(alpha)
        scale = plain.family.delta.abs().amax(-1)
        assert ((found.log_partition - truth.log_partition).abs() <= 1e-12 * (1 + scale)).all()
        assert ((found.mean - truth.mean).abs() <= 1e-11 * (1 + scale)).all()
        assert ((found.variance - truth.variance).abs() <= 1e-10 * (1 + scale**2)).all()


def gathered(pull, row, half):
    """A row's tokens as the search of large vocabularies holds them: listed ones and moments."""
    from trimtab.logits.solver import kernel

    vocab = pull.family.strong.shape[-1]
    log_probs, deltas, moments = (torch.zeros(n, dtype=torch.float64).numpy() for n in (vocab + 8, vocab + 8, 18))
    strong, base, experts = pull.family._members
    known = pull.family._row_stats[row]
    count = kernel._gather(strong[row], base[row], experts[0, row], known, half, log_probs, deltas, moments)

    def at(alpha):
        return kernel._gathered_moments(
            log_probs[:count], deltas[:count], moments, known[kernel.PLAIN_MEAN], half, alpha
        )

    return count, at


@pytest.mark.parametrize("alpha_max", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("name", LAWS)
def test_moments_hold_tokens_within_the_stated_bound(name, alpha_max):
    ours, plain = both_deltas(*draw_laws(name, rows=6, vocab=4099, seed=11))
    for row in range(6):
        _, at = gathered(ours, row, alpha_max / 2)
        for share in (0.0, 0.01, 0.4, 0.77, 1.0):
            alpha = torch.full((1, 6), share * alpha_max, dtype=torch.float64)
            truth = plain.family.at(alpha)
            value, mean, variance = (float(x[0, row]) for x in (truth.log_partition, truth.mean, truth.variance))
            found = at(share * alpha_max)
            # The bound on what moments leave out, and rounding of sums of numbers of this size.
            rounding = 2e-14 * (1 + value + float(plain.family.delta[0, row].abs().max()))
            assert abs(found[0] - value) <= 1e-13 + rounding
            assert abs(found[1] - mean) <= 1e-13 * (1 + abs(mean)) + 10 * rounding * (1 + abs(mean))
            most = 3 * (1 + abs(mean)) ** 2 + variance
            assert abs(found[2] - variance) <= (1e-13 + 10 * rounding) * most


def test_moments_hold_most_of_a_large_vocabulary():
    strong, base, experts = draw_members(1, 50_000, count=1, seed=4)
    listed, _ = gathered(measure_deltas(2 * strong, base, experts), 0, half=1.0)
    assert 0 < listed < 0.3 * 50_000
    listed, _ = gathered(measure_deltas(2 * strong, base, base[None]), 0, half=1.0)
    assert listed == 0  # a delta of zero needs no list at all


@pytest.mark.parametrize("name", LAWS)
def test_tilted_laws_and_how_far_they_moved(name):
    strong, base, expert = draw_laws(name, rows=30, vocab=50, seed=6)
    experts = torch.stack([expert, 2 * base - expert]).log_softmax(-1)
    ours, plain = measure_deltas(strong, base, experts), measure_deltas_plainly(strong, base, experts)
    alpha = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    who = torch.arange(30) % 2
    found, truth = ours.family.tilt(alpha, who), plain.family.tilt(alpha, who)
    torch.testing.assert_close(found.log_probs, truth.log_probs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.kl_nats, truth.kl_nats, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found.reverse_kl_nats, truth.reverse_kl_nats, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found.log_probs.logsumexp(-1), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-11)


def test_copies_in_float64_are_the_plain_familys():
    strong, base, experts = draw_members(3, 40, count=2, seed=1)
    ours, plain = measure_deltas(strong, base, experts).family, measure_deltas_plainly(strong, base, experts).family
    torch.testing.assert_close(ours.strong, plain.strong, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.delta, plain.delta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
@pytest.mark.parametrize("who", ["strong", "base", "expert", "base and expert", "all"])
def test_where_a_member_rules_tokens_out(who, impossible):
    laws = dict(zip(("strong", "base", "expert"), draw_laws("gauss", rows=30, vocab=20, seed=7), strict=True))
    for name in laws if who == "all" else who.split(" and "):
        laws[name] = laws[name].clone()
        laws[name][:, 4:9] = impossible
        laws[name] = laws[name].log_softmax(-1)
    check_agreement(*laws.values())
    ours, plain = both_deltas(*laws.values())
    alpha, first = torch.full((1, 30), 1.2, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
    found, truth = ours.family.tilt(alpha, first), plain.family.tilt(alpha, first)
    torch.testing.assert_close(found.log_probs, truth.log_probs, rtol=1e-9, atol=1e-9)


def test_one_hot_flat_and_disjoint_laws():
    one_hot = torch.full((4, 9), -torch.inf, dtype=torch.float64)
    one_hot[:, 3] = 0.0
    flat = torch.full((4, 9), -torch.tensor(9.0, dtype=torch.float64).log().item(), dtype=torch.float64)
    strong, base, expert = draw_laws("gauss", rows=4, vocab=9, seed=6)
    other = one_hot.roll(1, dims=-1)
    for laws in ((one_hot, base, expert), (strong, base, base), (flat, flat, flat), (strong, one_hot, other)):
        match = check_agreement(*laws)
        assert (match.alpha == 0).all()  # nothing can move
    check_agreement(flat, base, expert)
    check_agreement(strong, flat, one_hot)


def test_a_constant_added_to_a_members_row_changes_nothing():
    strong, base, expert = draw_laws("gauss", rows=20, vocab=50, seed=2)
    plain = measure_deltas(strong, base, expert[None])
    # Within the mask's threshold of -10,000; far out of the range of float64's exponentials all the same.
    moved = measure_deltas(strong + 3000, base - 5000, expert[None] + 7000)
    torch.testing.assert_close(plain.forward, moved.forward, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(plain.reverse, moved.reverse, rtol=1e-8, atol=1e-10)
    alphas = [match_divergences(p.family, p.forward[0], p.reverse[0], ALPHA_MAX).alpha for p in (plain, moved)]
    torch.testing.assert_close(alphas[0], alphas[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_deltas(scale):
    """Sums of exponentials that leave float64 are shifted, as the plain version does."""
    ours, plain = both_deltas(*(law * scale for law in draw_laws("heavy", rows=50, vocab=12, seed=8)))
    alpha = torch.full((1, 50), 2.0, dtype=torch.float64)
    torch.testing.assert_close(ours.family.at(alpha).log_partition, plain.family.at(alpha).log_partition)
    match = match_divergences(ours.family, ours.forward[0], ours.reverse[0], ALPHA_MAX)
    truth = match_divergences(plain.family, plain.forward[0], plain.reverse[0], ALPHA_MAX)
    torch.testing.assert_close(match.objective, truth.objective, rtol=1e-6, atol=1e-6)
    assert not match.alpha.isnan().any()


def test_nearly_constant_deltas_keep_their_variance():
    """A mean far above the spread: the variance at alpha = 0 must not be a difference of two large squares."""
    strong, base, _ = draw_laws("gauss", rows=20, vocab=50, seed=9)
    ours, plain = both_deltas(strong, base, base + 900.0 + 1e-4 * strong)
    spread = torch.from_numpy(ours.family._row_stats[:, 2])
    truth = plain.family.at(torch.zeros(1, 20, dtype=torch.float64)).variance[0]
    torch.testing.assert_close(spread, truth, rtol=1e-4, atol=1e-20)


def test_a_members_nan_stays_visible():
    strong, base, experts = draw_members(2, 40, count=1, seed=1)
    strong[0, 3] = torch.nan
    pull = measure_deltas(strong, base, experts)
    law = pull.family.tilt(torch.ones(1, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)).log_probs
    assert law[0].isnan().all()
    assert law[1].isfinite().all()


def test_rows_do_not_see_each_other():
    laws = draw_laws("heavy", rows=60, vocab=20, seed=1)

    def solve(part):
        pull, _ = both_deltas(*(law[part] for law in laws))
        return match_divergences(pull.family, pull.forward[0], pull.reverse[0], ALPHA_MAX).alpha[0]

    together = solve(slice(None))
    assert torch.equal(together, torch.cat([solve(slice(i, i + 1)) for i in range(60)]))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together[order], solve(order))


def test_threads_change_nothing(monkeypatch):
    members = draw_members(7, 300, count=3, seed=2)

    def everything():
        pull = measure_deltas(*members)
        alpha = match_divergences(pull.family, pull.forward[0], pull.reverse[0], ALPHA_MAX).alpha
        tilt = pull.family.tilt(alpha, torch.arange(7) % 3)
        return alpha, pull.family.at(alpha).variance, tilt.log_probs, tilt.kl_nats

    alone = everything()
    monkeypatch.setattr(compiled, "WORTH_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    pools = []
    monkeypatch.setattr(compiled, "ThreadPoolExecutor", lambda count: pools.append(count) or ThreadPoolExecutor(count))
    for ours, theirs in zip(everything(), alone, strict=True):
        assert torch.equal(ours, theirs)
    assert set(pools) == {4}


def test_views_are_read_as_they_stand():
    strong, base, experts = draw_members(4, 30, count=2, seed=3)
    truth = measure_deltas(strong, base, experts).forward
    views = measure_deltas(strong.T.contiguous().T, base[:, :], experts.permute(1, 0, 2).contiguous().permute(1, 0, 2))
    assert torch.equal(views.forward, truth)


def test_a_batch_of_none():
    strong, base, experts = draw_members(4, 30, count=2, seed=3)
    pull = measure_deltas(strong[:0], base[:0], experts[:, :0])
    assert match_divergences(pull.family, pull.forward[0], pull.reverse[0], ALPHA_MAX).alpha.shape == (2, 0)


@pytest.mark.parametrize("why", ["gradients", "half precision", "mixed types", "no numba"])
def test_who_is_answered_plainly(why, monkeypatch):
    strong, base, experts = draw_members(4, 30, count=2, seed=3)
    if why == "gradients":
        strong.requires_grad_()
    if why == "half precision":
        base = base.bfloat16()
    if why == "mixed types":
        base = base.double()
    if why == "no numba":
        monkeypatch.setattr(compiled, "is_available", lambda: False)
    pull = measure_deltas(strong, base, experts)
    assert isinstance(pull.family, TiltedFamily)
    assert pull.forward.isfinite().all()


def test_without_numba_everything_works(tmp_path):
    """In a process that cannot find numba, a whole strategy answers, and says that it does so plainly."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
        "import torch; from trimtab import make_strategy; from trimtab.logits.solver import compiled\n"
        "laws = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)\n"
        "fusion = make_strategy('dynamic')(laws[0], laws[1], laws[2:])\n"
        "compiled.warm_up()\n"
        "print(compiled.is_available(), bool(fusion.log_probs.isfinite().all()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout.split() == ["False", "True"]


def test_where_nothing_can_be_written_it_is_compiled_all_the_same(tmp_path):
    """A read-only installation and a home that cannot be written: machine code is made anew, and no error."""
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []; c.CompileResultCacheImpl._locator_classes = []\n"
        "from trimtab.logits.solver import kernel\n"
        "print(kernel._exp(1.0))"
    )
    environment = {"PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(ran.stdout) == pytest.approx(2.718281828459045, rel=1e-15)


def test_exponentials_are_exact_to_rounding():
    from trimtab.logits.solver import kernel

    points = torch.linspace(-707, 708, 4001, dtype=torch.float64)
    ours = torch.tensor([kernel._exp(x) for x in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, points.exp(), rtol=4e-16, atol=0)
    assert kernel._exp(float("nan")) != kernel._exp(float("nan"))
    assert kernel._exp(-float("inf")) < 1e-300
