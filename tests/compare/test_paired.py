"""The intervals of `segloss compare`: closed forms, and how often they are wrong in simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from segloss.compare.paired import (
    Difference,
    difference,
    f1_difference,
    f1_parts,
    items_needed,
    per_token,
    quantile,
    visible,
)
from segloss.train.evaluation import macro_f1

SIMULATIONS = 1000
NORMAL = NormalDist()


# ------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("tail", [0.2, 0.025, 0.025 / 11])
def test_quantile_is_students_t(tail: float) -> None:
    assert quantile(1, tail) == pytest.approx(math.tan(math.pi * (0.5 - tail)), rel=1e-4)
    p = 1 - tail
    assert quantile(2, tail) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * tail), rel=1e-4)
    # four degrees of freedom, from the polynomial of their distribution function
    t = quantile(4, tail)
    below = 0.5 + t / math.sqrt(4 + t * t) * (1 + 2 / (4 + t * t)) / 2
    assert below == pytest.approx(p, rel=1e-6)
    assert quantile(100_000, tail) == pytest.approx(NORMAL.inv_cdf(p), rel=1e-4)
    around = (quantile(50, tail), quantile(51, tail))  # where the grid changes
    assert 0 < around[0] - around[1] < 0.003 * around[0]


def test_visible_is_the_sum_of_two_normal_quantiles_with_many_items() -> None:
    assert visible(100_000, 0.025) == pytest.approx(1.95996 + 0.84162, rel=5e-3)


def test_interval_is_a_t_interval_over_seeds_where_items_are_alike(rng) -> None:
    shifts = rng.normal(size=4)
    first, second = np.zeros((4, 30)), np.repeat(shifts[:, None], 30, 1)
    found = difference(first, second)
    half = 3.182446 * shifts.std(ddof=1) / 2
    assert found.mean == pytest.approx(shifts.mean())
    assert found.high - found.mean == pytest.approx(half, rel=1e-5)
    assert found.mean - found.low == pytest.approx(half, rel=1e-5)


def test_interval_is_a_t_interval_over_items_where_seeds_are_alike(rng) -> None:
    shifts = rng.normal(size=25)
    found = difference(np.zeros((3, 25)), np.repeat(shifts[None], 3, 0))
    assert found.high - found.mean == pytest.approx(2.063899 * shifts.std(ddof=1) / 5, rel=1e-5)


def test_interval_of_both_is_the_two_way_anova(rng) -> None:
    table = rng.normal(size=(5, 40)) + 0.3 * rng.normal(size=(5, 1)) + rng.normal(size=40)
    rows = 40 * table.mean(1).var(ddof=1)
    columns = 5 * table.mean(0).var(ddof=1)
    rest = (table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()) ** 2
    rest = rest.sum() / (4 * 39)
    half = math.sqrt(2.776445**2 * rows + 2.022691**2 * (columns - rest)) / math.sqrt(200)
    found = difference(np.ones((5, 40)), 1 + table)
    assert found.high - found.mean == pytest.approx(half, rel=1e-5)


def test_comparisons_are_bonferronis(rng) -> None:
    first, second = rng.normal(size=(2, 5, 40))
    both = difference(first, second, 0.95, comparisons=2), difference(first, second, 0.975)
    assert both[0].high == pytest.approx(both[1].high, rel=1e-9)
    assert both[0].detectable == pytest.approx(both[1].detectable, rel=1e-9)


def test_per_token_has_the_ratio_as_its_mean(rng) -> None:
    tokens = rng.integers(1, 9, size=50)
    sums = rng.gamma(2.0, size=(3, 50)) * tokens
    parts = per_token(sums, tokens)
    np.testing.assert_allclose(parts.mean(1), sums.sum(1) / tokens.sum(), rtol=1e-12)
    # items of the same loss per token show no spread, however long they are
    np.testing.assert_allclose(per_token(2.5 * tokens[None], tokens), 2.5, rtol=1e-12)


def test_f1_parts_are_the_jackknife_of_macro_f1(rng) -> None:
    true = np.r_[0, rng.integers(0, 4, size=29)]
    said = rng.integers(0, 5, size=(2, 30))
    classes = [0, 1, 3]
    parts = f1_parts(true, said, classes)
    for seed in range(2):
        whole = macro_f1(true, said[seed], classes)
        assert parts[seed].mean() == pytest.approx(whole, rel=1e-12)
        keep = [np.arange(30) != i for i in range(30)]
        without = np.array([macro_f1(true[k], said[seed][k], classes) for k in keep])
        expected = whole - 29 * (without - without.mean())
        np.testing.assert_allclose(parts[seed], expected, rtol=1e-9)
    texts = np.array(["no", "yes", "maybe", "other", "never"])
    np.testing.assert_array_equal(f1_parts(texts[true], texts[said], texts[classes]), parts)


def test_variants_that_are_alike_differ_by_nothing() -> None:
    found = difference(np.ones((3, 10)), np.ones((3, 10)))
    assert (found.mean, found.low, found.high, found.found) == (0, 0, 0, False)
    assert math.isnan(found.detectable)


@pytest.mark.parametrize(
    "first, second, message",
    [
        (np.ones((1, 9)), np.ones((1, 9)), "there are 1 seeds and 9 items"),
        (np.ones((2, 1)), np.ones((2, 1)), "there are 2 seeds and 1 items"),
        (np.ones((2, 9)), np.ones((2, 8)), r"first is \(2, 9\) and second \(2, 8\)"),
        (np.ones(9), np.ones(9), r"first has the shape \(9,\); it takes \(seeds, items\)"),
        (np.ones((2, 9)), np.full((2, 9), np.nan), "second has numbers that are not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(first, second, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        difference(first, second)


def test_items_needed_finds_two_points() -> None:
    # (1.96 + 0.84)^2 x 0.5 / 0.02^2
    assert items_needed() == pytest.approx(9811, rel=1e-2)
    assert items_needed(disagreement=0.1) == pytest.approx(1962, rel=1e-2)
    assert items_needed(0.04) == pytest.approx(items_needed() / 4, rel=1e-3)
    assert items_needed(comparisons=5) > 1.4 * items_needed()


def test_items_needed_of_a_pilot_counts_its_seeds_and_items(rng) -> None:
    item, rest = rng.normal(size=9000), rng.normal(size=(5, 9000))
    pilot = np.zeros((5, 9000)), 0.5 * item + rest - rest.mean(1, keepdims=True)
    expected = (visible(4, 0.025) ** 2 / 5 + visible(8999, 0.025) ** 2 * 0.25) / 0.1**2
    assert items_needed(0.1, *pilot) == pytest.approx(expected, rel=0.05)
    pilot[1][:] += rng.normal(size=(5, 1))
    assert items_needed(0.1, *pilot) == math.inf


# ------------------------------------------------------------------------------- simulations


def answers(rng, seeds: int, items: int, seed: float, item: float, size: float = 0.0):
    """Hits of two variants, the second better by `size`: `seed` and `item` are each variant's own.

    Whether an answer is right has a part that is the item's, however it is trained, and noise.
    """
    spread = math.sqrt(1 + seed**2 + item**2 + 1)
    better = np.array([0, spread * NORMAL.inv_cdf(min(0.5 + size, 1 - 1e-9))])
    latent = (
        better[:, None, None]
        + rng.normal(size=items)
        + seed * rng.normal(size=(2, seeds, 1))
        + item * rng.normal(size=(2, 1, items))
        + rng.normal(size=(2, seeds, items))
    )
    return latent > 0


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "items, seed, item", [(200, 0.0, 0.0), (200, 0.1, 0.5), (600, 0.05, 0.7), (2000, 0.05, 0.2)]
)
def test_answers_of_equal_variants_seldom_differ_and_a_planted_difference_is_found(
    rng, seeds: int, items: int, seed: float, item: float
) -> None:
    equal = [difference(*answers(rng, seeds, items, seed, item)) for _ in range(SIMULATIONS)]
    assert share([d.found for d in equal]) <= 0.07
    # in another comparison than the one that said how much it could show; a size above half of all
    # answers cannot be planted, and 3 seeds that differ by chance may say it
    sizes = [min(d.detectable, 0.49) for d in equal]
    planted = [difference(*answers(rng, seeds, items, seed, item, size)) for size in sizes]
    assert share([d.low > 0 for d in planted]) >= 0.78


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("items, disagree", [(30, 0.1), (60, 0.02), (200, 0.02)])
def test_few_answers_that_differ_are_no_difference(
    rng, seeds: int, items: int, disagree: float
) -> None:
    """Where the seeds' means coincide, which with few such answers is often, they show nothing."""
    found = []
    for _ in range(SIMULATIONS):
        right = rng.random(items) < 0.5
        found.append(difference(*(right ^ (rng.random((2, seeds, items)) < disagree / 2))).found)
    assert share(found) <= 0.05


def found_of_equal(equal: list[Difference]) -> tuple[float, float]:
    """The shares in which a difference is reported, and a planted one is found.

    A score that every item has more of moves the interval and nothing else; the next comparison is
    asked for the size that this one says.
    """
    sizes = np.roll([d.detectable for d in equal], 1)
    planted = [d.low + size > 0 for d, size in zip(equal, sizes, strict=True)]
    return share([d.found for d in equal]), share(planted)


@pytest.mark.parametrize("seeds, comparisons", [(3, 1), (5, 1), (5, 4)])
def test_losses_per_token(rng, seeds: int, comparisons: int) -> None:
    equal = []
    for _ in range(SIMULATIONS):
        tokens = rng.integers(1, 9, size=400)
        hard, own = rng.normal(size=400), 0.2 * rng.normal(size=(2, 1, 400))
        noise = 0.02 * rng.normal(size=(2, seeds, 1)) + 0.3 * rng.normal(size=(2, seeds, 400))
        first, second = tokens * np.exp(hard + own + noise)
        parts = per_token(first, tokens), per_token(second, tokens)
        equal.append(difference(*parts, comparisons=comparisons))
    reported, planted = found_of_equal(equal)
    assert reported <= 0.07 / comparisons
    assert planted >= 0.78


@pytest.mark.parametrize("seeds", [3, 5])
def test_macro_f1_of_twenty_unequal_classes(rng, seeds: int) -> None:
    prior = 1 / np.arange(1, 21)
    prior /= prior.sum()

    def said(true):
        known = 0.6 + 0.3 * rng.normal(size=200) + 0.03 * rng.normal(size=(seeds, 1))
        right = 0.5 * (rng.random((seeds, 200)) + easy) < known
        return np.where(right, true, rng.choice(20, p=prior, size=(seeds, 200)))

    equal = []
    for _ in range(SIMULATIONS // 2):
        true, easy = rng.choice(20, p=prior, size=200), rng.random(200)
        equal.append(f1_difference(true, said(true), said(true)))
    reported, planted = found_of_equal(equal)
    assert reported <= 0.07
    assert planted >= 0.78


@pytest.fixture
def rng():
    return np.random.default_rng(20)
