"""Deltas and targets, and the rule for tokens that some members rule out."""

import pytest
import torch

from laws import draw_laws, kl
from trimtab.logits.solver.deltas import measure_deltas

IMPOSSIBLE = [-torch.inf, torch.finfo(torch.float32).min]


def test_targets_are_the_divergences_between_expert_and_base():
    strong, base, expert = draw_laws("gauss", rows=20, vocab=15, seed=1)
    pull = measure_deltas(strong, base, expert.unsqueeze(0))
    torch.testing.assert_close(pull.forward[0, 0], kl(expert, base))
    torch.testing.assert_close(pull.reverse[0, 0], kl(base, expert))


def test_a_constant_added_to_a_members_row_changes_nothing():
    strong, base, expert = draw_laws("gauss", rows=20, vocab=15, seed=2)
    plain, moved = measure_deltas(strong, base, expert[None]), measure_deltas(strong + 3, base - 5, expert[None] + 7)
    torch.testing.assert_close(plain.forward, moved.forward)
    torch.testing.assert_close(plain.reverse, moved.reverse)
    torch.testing.assert_close(plain.family.delta, moved.family.delta)


def test_all_targets_reach_every_expert():
    strong, base, _ = draw_laws("gauss", rows=5, vocab=15, seed=3)
    experts = torch.stack([draw_laws("gauss", rows=5, vocab=15, seed=s)[2] for s in (4, 5, 6)])
    own = measure_deltas(strong, base, experts)
    shared = own.with_all_targets()
    assert shared.forward.shape == (3, 3, 5)
    for expert in range(3):
        torch.testing.assert_close(shared.forward[:, expert], own.forward[0])
        torch.testing.assert_close(shared.reverse[:, expert], own.reverse[0])


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
@pytest.mark.parametrize("who", ["strong", "base", "expert", "base and expert", "all"])
def test_where_a_member_rules_a_token_out_there_is_no_delta(who, impossible):
    strong, base, expert = draw_laws("gauss", rows=6, vocab=10, seed=7)
    laws = {"strong": strong, "base": base, "expert": expert}
    for name in laws if who == "all" else who.split(" and "):
        laws[name] = laws[name].clone()
        laws[name][:, 4] = impossible
        laws[name] = laws[name].log_softmax(-1)
    pull = measure_deltas(laws["strong"], laws["base"], laws["expert"][None])
    for values in (pull.family.delta, pull.forward, pull.reverse):
        assert values.isfinite().all()
    assert (pull.forward >= 0).all()
    kept = [i for i in range(10) if i != 4]
    pulled = pull.family.delta[0]
    # The family centres its deltas: only differences between tokens mean anything. Token 4 has delta 0.
    gap = laws["expert"] - laws["base"]
    torch.testing.assert_close(pulled[:, kept] - pulled[:, :1], gap[:, kept] - gap[:, :1])
    if who != "strong" and who != "all":
        torch.testing.assert_close(pulled[:, 4] - pulled[:, 0], -gap[:, 0])


def test_divergences_are_those_of_the_laws_on_the_tokens_they_share():
    _, base, expert = draw_laws("gauss", rows=6, vocab=10, seed=8)
    masked = base.clone()
    masked[:, 2] = -torch.inf
    pull = measure_deltas(base, masked, expert[None])
    kept = [i for i in range(10) if i != 2]
    shared_expert, shared_base = expert[:, kept].log_softmax(-1), masked[:, kept].log_softmax(-1)
    torch.testing.assert_close(pull.forward[0, 0], kl(shared_expert, shared_base))
    torch.testing.assert_close(pull.reverse[0, 0], kl(shared_base, shared_expert))


def test_laws_that_share_no_token_pull_nowhere():
    base = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    expert = torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64)
    pull = measure_deltas(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), base, expert[None])
    assert pull.family.delta.abs().max() == pull.forward.item() == pull.reverse.item() == 0
