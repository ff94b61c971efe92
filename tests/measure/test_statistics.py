import pytest
import torch

from trimtab.measure.statistics import gap_recovered, measured, paired_test, ratio_to_ceiling, resample, weighted


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coin(rate: float, count: int, seed: int) -> torch.Tensor:
    return 100.0 * (torch.rand(count, generator=generator(seed)) < rate).float()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    scores = coin(0.3, 400, seed=1)
    found = measured(resample({"a": {"t": scores}}, generator())["a"]["t"])
    expected = 1.96 * float(scores.std()) / 400**0.5
    assert found.value == pytest.approx(float(scores.mean()))
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(2 * expected, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(200):
        drawn = resample({"a": {"t": coin(0.4, 200, seed=seed)}}, generator(seed), num_draws=400)["a"]["t"]
        where = measured(drawn).interval
        assert where is not None
        covered += where.low <= 40.0 <= where.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not() -> None:
    table = {"a": {"t": torch.rand(50, generator=generator(2))}}
    first, again = (measured(resample(table, generator(5))["a"]["t"]) for _ in range(2))
    assert first == again
    assert first != measured(resample(table, generator(6))["a"]["t"])


def test_columns_share_the_drawn_items_so_that_a_constant_lead_has_no_spread() -> None:
    scores = coin(0.5, 100, seed=3)
    draws = resample({"a": {"t": scores}, "b": {"t": scores + 1.0}}, generator())
    lead = measured(draws["b"]["t"] - draws["a"]["t"])
    assert lead.interval is not None
    assert lead.interval.low == pytest.approx(1.0)
    assert lead.interval.high == pytest.approx(1.0)


def test_tasks_weigh_the_same_whatever_their_number_of_items() -> None:
    table = {"a": {"few": torch.full((10,), 100.0), "many": torch.zeros(1000)}}
    drawn = resample(table, generator())["a"]
    assert float(weighted(drawn, {"few": 0.5, "many": 0.5})[0]) == pytest.approx(50.0)


def test_ratio_and_gap_differ_as_in_the_paper() -> None:
    fused, expert, ceiling = (torch.full((11,), value) for value in (46.09, 44.13, 47.79))
    assert ratio_to_ceiling(fused, ceiling).value == pytest.approx(0.964, abs=5e-4)
    assert gap_recovered(fused, expert, ceiling).value == pytest.approx(0.536, abs=5e-4)


def test_a_gap_that_is_not_there_has_no_value_but_a_reason() -> None:
    fused, expert = torch.full((11,), 50.0), torch.full((11,), 49.5)
    found = gap_recovered(fused, expert, torch.full((11,), 50.0))
    assert found.value is None
    assert "0.5 points" in found.reason
    assert gap_recovered(fused, expert, torch.full((11,), 50.0), min_gap=0.4).value == pytest.approx(1.0)


def test_a_gap_that_vanishes_in_some_draws_has_no_interval() -> None:
    ceiling = torch.cat([torch.tensor([52.0]), torch.linspace(45.0, 60.0, 100)])
    found = gap_recovered(torch.full((101,), 51.0), torch.full((101,), 50.0), ceiling)
    assert found.value == pytest.approx(0.5)
    assert found.interval is None
    assert "no interval" in found.reason


def test_a_ratio_to_nothing_has_no_value() -> None:
    assert ratio_to_ceiling(torch.ones(5), torch.zeros(5)).value is None


def test_paired_test_of_equals_says_so() -> None:
    scores = {"t": coin(0.5, 80, seed=4)}
    found = paired_test(scores, scores, {"t": 1.0}, generator())
    assert (found.difference, found.p_value, found.num_wins, found.num_losses) == (0.0, 1.0, 0, 0)


def test_paired_test_agrees_with_all_flips_counted_by_hand() -> None:
    # 5 wins and no loss: of the 32 ways to flip, the observed one and its mirror are as extreme.
    first, second = {"t": torch.tensor([100.0] * 5 + [0.0] * 5)}, {"t": torch.zeros(10)}
    found = paired_test(first, second, {"t": 1.0}, generator(), num_flips=40_000)
    assert found.difference == pytest.approx(50.0)
    assert found.p_value == pytest.approx(2 / 32, abs=0.006)
    assert (found.num_wins, found.num_losses) == (5, 0)


def test_paired_test_under_the_null_is_rarely_small() -> None:
    small = sum(
        paired_test(
            {"t": coin(0.5, 60, seed)}, {"t": coin(0.5, 60, seed + 999)}, {"t": 1.0}, generator(seed), 500
        ).p_value
        < 0.05
        for seed in range(200)
    )
    assert small / 200 <= 0.1


def test_paired_test_weighs_tasks_as_the_average_does() -> None:
    first = {"a": torch.full((4,), 100.0), "b": torch.full((50,), 10.0)}
    second = {"a": torch.zeros(4), "b": torch.zeros(50)}
    assert paired_test(first, second, {"a": 0.5, "b": 0.5}, generator(), 10).difference == pytest.approx(55.0)
    assert paired_test(first, second, {"a": 0.2, "b": 0.8}, generator(), 10).difference == pytest.approx(28.0)


def test_paired_test_is_antisymmetric_in_its_difference() -> None:
    first, second = {"t": coin(0.7, 50, 1)}, {"t": coin(0.4, 50, 2)}
    one, two = paired_test(first, second, {"t": 1.0}, generator()), paired_test(second, first, {"t": 1.0}, generator())
    assert one.difference == pytest.approx(-two.difference)
    assert one.p_value == two.p_value
