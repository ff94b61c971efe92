"""The solver against dense float64 scans, on ordinary laws and on laws that were made to mislead it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab.logits.solver.tilted
from laws import ALPHA_MAX, LAWS, draw_laws, kl, objective, rises_nearby, scan
from trimtab.logits.solver.match import EVALUATIONS, match_divergences, smaller_root
from trimtab.logits.solver.tilted import TiltedFamily


def solve(strong, base, expert, alpha_max=ALPHA_MAX):
    """The solver's match, and the family it used."""
    family = TiltedFamily(strong, expert - base)
    return match_divergences(family, kl(expert, base), kl(base, expert), alpha_max), family


def check_against_scan(strong, base, expert, points=1001):
    """The solver against the scan: J everywhere, alpha where it is determined. Returns the scan's alpha there."""
    match, family = solve(strong, base, expert)
    alpha, best, minima = scan(strong, base, expert, points)
    assert family.evaluations <= EVALUATIONS
    assert not match.alpha.isnan().any()
    assert ((match.alpha >= 0) & (match.alpha <= ALPHA_MAX)).all()
    reached = objective(strong, base, expert, match.alpha)
    torch.testing.assert_close(match.objective, reached, rtol=1e-9, atol=1e-11)
    assert (reached - best).max() <= 1e-6
    clear = rises_nearby(strong, base, expert, alpha, best)  # at the ends of the range as well
    assert ((match.alpha - alpha).abs()[clear] <= 1e-5).all()
    assert (match.floor <= best + 1e-9 * (1 + best)).all()
    return alpha[clear], minima


@pytest.mark.parametrize("vocab", [5, 40, 300])
@pytest.mark.parametrize("name", LAWS)
def test_the_minimum_is_the_scans(name, vocab):
    check_against_scan(*draw_laws(name, rows=300 if vocab < 100 else 60, vocab=vocab, seed=vocab))


@pytest.mark.slow
def test_no_local_minimum_is_mistaken_for_the_global_one():
    minima = [check_against_scan(*draw_laws("steps", rows=1500, vocab=6, seed=seed))[1] for seed in range(2)]
    assert (torch.cat(minima) > 1).sum() > 200  # or this test would show little


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(LAWS)), vocab=st.integers(2, 80), seed=st.integers(0, 2**31))
def test_the_minimum_is_the_scans_for_any_draw(name, vocab, seed):
    check_against_scan(*draw_laws(name, rows=8, vocab=vocab, seed=seed))


def test_the_ends_of_the_range_are_among_the_minima():
    """Or the comparison with the scans would show nothing about them."""
    found = [check_against_scan(*draw_laws(name, rows=300, vocab=40, seed=40))[0] for name in ("gauss", "spikes")]
    alpha = torch.cat(found)
    assert (alpha == ALPHA_MAX).sum() > 20
    assert ((alpha > 0) & (alpha < ALPHA_MAX)).sum() > 20


@pytest.mark.parametrize("vocab", [1_000, 50_000, 260_000])
@pytest.mark.parametrize("name", ["gauss", "spikes"])
def test_the_minimum_is_the_scans_at_any_vocabulary(name, vocab):
    alpha, _ = check_against_scan(*draw_laws(name, rows=min(8, 520_000 // vocab), vocab=vocab, seed=9), points=101)
    assert len(alpha) > 0


@pytest.mark.parametrize("name", LAWS)
def test_never_worse_than_the_papers_grid(name):
    laws = draw_laws(name, rows=200, vocab=20, seed=9)
    match, _ = solve(*laws)
    for alpha in torch.linspace(0, 2, 21, dtype=torch.float64):
        assert (match.objective <= objective(*laws, alpha.expand(200)) + 1e-6).all()


def test_rows_do_not_see_each_other():
    laws = draw_laws("heavy", rows=60, vocab=20, seed=1)
    together, _ = solve(*laws)
    alone = torch.cat([solve(*(law[i : i + 1] for law in laws))[0].alpha for i in range(60)])
    torch.testing.assert_close(together.alpha, alone, rtol=0, atol=5e-6)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled, _ = solve(*(law[order] for law in laws))
    torch.testing.assert_close(together.alpha[order], shuffled.alpha, rtol=0, atol=5e-6)


def test_a_constant_added_to_a_delta_changes_nothing():
    strong, base, expert = draw_laws("gauss", rows=50, vocab=20, seed=1)
    targets = kl(expert, base), kl(base, expert)
    plain = match_divergences(TiltedFamily(strong, expert - base), *targets, ALPHA_MAX)
    moved = match_divergences(TiltedFamily(strong - 7.0, expert - base + 40.0), *targets, ALPHA_MAX)
    torch.testing.assert_close(plain.alpha, moved.alpha, rtol=0, atol=5e-6)


def test_an_expert_that_learned_nothing_gets_alpha_0():
    strong, base, _ = draw_laws("gauss", rows=20, vocab=30, seed=2)
    match, _ = solve(strong, base, base)
    assert (match.alpha == 0).all()
    assert match.objective.max() < 1e-20


def test_the_same_law_as_strong_base_and_target_gets_alpha_1():
    """Where strong is the base, alpha = 1 gives the expert back, and both divergences meet their targets."""
    _, base, expert = draw_laws("gauss", rows=50, vocab=30, seed=4)
    match, _ = solve(base, base, expert)
    clear = kl(expert, base) > 1e-4
    torch.testing.assert_close(match.alpha[clear], torch.ones_like(match.alpha[clear]), rtol=0, atol=1e-5)


def test_targets_out_of_reach_end_at_the_end_of_the_range():
    strong, base, expert = draw_laws("gauss", rows=20, vocab=30, seed=5)
    family = TiltedFamily(strong, 0.01 * (expert - base))
    moves = family.at(torch.full((20,), ALPHA_MAX, dtype=torch.float64)).kl_nats > 1e-6
    far = torch.full((20,), 50.0, dtype=torch.float64)
    for alpha in (match_divergences(family, far, far, ALPHA_MAX).alpha, smaller_root(family, far, far, ALPHA_MAX)):
        assert (alpha[moves] == ALPHA_MAX).all()
    assert moves.sum() > 10


def test_one_hot_laws_and_impossible_tokens_give_no_nan():
    one_hot = torch.full((4, 9), -torch.inf, dtype=torch.float64)
    one_hot[:, 3] = 0.0
    strong, base, expert = draw_laws("gauss", rows=4, vocab=9, seed=6)
    targets = kl(expert, base), kl(base, expert)
    for solver in (lambda f: match_divergences(f, *targets, ALPHA_MAX).alpha, lambda f: smaller_root(f, *targets, 2.0)):
        assert (solver(TiltedFamily(one_hot, expert - base)) == 0).all()  # nothing can move: the flat objective's 0
        assert (solver(TiltedFamily(strong, torch.zeros_like(strong))) == 0).all()


def test_a_range_of_zero_and_a_batch_of_zero():
    strong, base, expert = draw_laws("gauss", rows=4, vocab=9, seed=7)
    assert (solve(strong, base, expert, alpha_max=0.0)[0].alpha == 0).all()
    empty, _ = solve(strong[:0], base[:0], expert[:0])
    assert empty.alpha.shape == (0,)


def test_targets_may_be_huge():
    strong, base, expert = draw_laws("heavy", rows=50, vocab=12, seed=8)
    for scale in (1e2, 1e4):
        match, _ = solve(strong * scale, base * scale, expert * scale)
        assert not match.alpha.isnan().any()


def test_fewer_evaluations_than_the_limit_where_a_row_is_easy():
    strong, base, expert = draw_laws("gauss", rows=1, vocab=30, seed=1)
    _, family = solve(strong, base, expert)
    assert family.evaluations < EVALUATIONS


def test_without_float64_the_answer_is_close(monkeypatch):
    monkeypatch.setattr(trimtab.logits.solver.tilted, "wide_type", lambda like: torch.float32)
    strong, base, expert = (law.float() for law in draw_laws("gauss", rows=100, vocab=30, seed=3))
    match, family = solve(strong, base, expert)
    assert family.delta.dtype == torch.float32
    _, best, _ = scan(*draw_laws("gauss", rows=100, vocab=30, seed=3))
    assert ((match.objective - best) <= 1e-3 * (1 + best)).all()


@pytest.mark.parametrize("vocab", [5, 40, 300])
@pytest.mark.parametrize("name", LAWS)
def test_the_smaller_root_is_bisections(name, vocab):
    strong, base, expert = draw_laws(name, rows=200 if vocab < 100 else 50, vocab=vocab, seed=vocab + 1)
    forward, reverse = kl(expert, base), kl(base, expert)
    low, high = torch.zeros_like(forward), torch.full_like(forward, ALPHA_MAX)
    for _ in range(40):
        alpha = (low + high) / 2
        fused = (strong + alpha.unsqueeze(-1) * (expert - base)).log_softmax(-1)
        is_over = (kl(fused, strong) > forward) | (kl(strong, fused) > reverse)
        low, high = torch.where(is_over, low, alpha), torch.where(is_over, alpha, high)
    family = TiltedFamily(strong, expert - base)
    root = smaller_root(family, forward, reverse, ALPHA_MAX)
    assert family.evaluations <= EVALUATIONS
    at_end = (strong + ALPHA_MAX * (expert - base)).log_softmax(-1)
    clear = (torch.minimum(forward, reverse) > 1e-5) & (kl(at_end, strong) + kl(strong, at_end) > 1e-9)
    assert clear.sum() > 10
    assert ((root - low).abs()[clear] <= 1e-5).all()


def test_the_smaller_root_never_exceeds_a_target():
    strong, base, expert = draw_laws("steps", rows=300, vocab=12, seed=2)
    forward, reverse = kl(expert, base), kl(base, expert)
    family = TiltedFamily(strong, expert - base)
    moments = family.at(smaller_root(family, forward, reverse, ALPHA_MAX))
    assert (moments.kl_nats <= forward + 1e-6).all()
    assert (moments.reverse_kl_nats <= reverse + 1e-6).all()


def test_nothing_depends_on_reading_values_back():
    """Tensors without values have nothing to read: on a GPU, the whole solve is queued at once."""
    laws = [law.to("meta") for law in draw_laws("heavy", rows=6, vocab=20, seed=1)]
    match, family = solve(*laws)
    root = smaller_root(family, kl(laws[2], laws[1]), kl(laws[1], laws[2]), ALPHA_MAX)
    assert match.alpha.shape == root.shape == (6,)
    assert family.evaluations == 2 * EVALUATIONS


@pytest.mark.gpu
def test_nothing_is_copied_back_from_a_gpu():
    laws = [law.cuda() for law in draw_laws("heavy", rows=64, vocab=200, seed=1)]
    solve(*laws)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        match, family = solve(*laws)
        smaller_root(family, kl(laws[2], laws[1]), kl(laws[1], laws[2]), ALPHA_MAX)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, _ = solve(*(law.cpu() for law in laws))
    torch.testing.assert_close(match.alpha.cpu(), on_cpu.alpha, rtol=0, atol=5e-6)
