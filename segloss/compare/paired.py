"""Whether two variants differ, from scores of the same items after training with the same seeds.

A score is an array (seeds, items). Both are random: another five seeds and another six hundred
items would give another difference, so an interval over the items alone is too short. With d_si
the difference of the two variants on item i after training with seed s, the two-way model

    d_si = mean + seed_s + item_i + rest_si

gives the variance of the mean: what the means of the seeds show, S^2 = var(d_s.) / seeds, in which
`rest` is included, and what the items add to it, I^2 = var(d_.i) / items - var(rest) / (seeds
items). The interval is mean ± sqrt((t S)^2 + (t' I)^2), with Student's t of seeds - 1 and items - 1
degrees of freedom: exact where one of the two is all there is, and slightly long between. It is at
least what `rest` alone makes of it, since the means of two or three seeds may coincide by chance.

What is no mean of items (a loss per token, macro-F1) is made one: `per_token` and `f1_parts` return
values of each item whose mean is the statistic and whose spread is that of the statistic without
the item (the jackknife; for a ratio of sums its first order, which is as good).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

POWER = 0.8
"""The probability with which a difference of the size `detectable` is found."""


@dataclass(frozen=True)
class Difference:
    """Second less first, in units of the score."""

    mean: float
    low: float
    high: float
    detectable: float
    """The size that a comparison like this one finds with a probability of 80 %; NaN where all
    differences are equal, since they then show nothing of their spread."""

    @property
    def found(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(
    first: Any, second: Any, confidence: float = 0.95, comparisons: int = 1
) -> Difference:
    """`(second - first).mean()` with an interval that counts both seeds and items as random.

    Args:
        first: (seeds, items) scores of the variant that is compared with, in any unit: 0 or 1 for
            an answer, a loss; row s with seed s, column i of item i.
        second: (seeds, items) scores of the other variant, with the same seeds and items.
        confidence: of the interval, as 0.95.
        comparisons: how many such differences are looked at; with Bonferroni's correction, all
            their intervals together are right with `confidence`.

    Raises `ValueError` where the arrays do not fit each other, hold numbers that are not finite, or
    have fewer than two seeds or two items.
    """
    table = differences(first, second)
    seeds, items = table.shape
    tail = tail_of(confidence, comparisons)
    _, of_items, of_rest = variances(table)
    over_seeds = math.sqrt(table.mean(1).var(ddof=1) / seeds)
    over_items, noise = math.sqrt(of_items / items), math.sqrt(of_rest / (seeds * items))

    def together(factor: Callable[[int, float], float]) -> float:
        few, many = factor(seeds - 1, tail), factor(items - 1, tail)
        return max(math.hypot(few * over_seeds, many * over_items), many * noise)

    mean, half = float(table.mean()), together(quantile)
    return Difference(mean, mean - half, mean + half, together(visible) if half else math.nan)


def f1_difference(
    true: Any,
    first: Any,
    second: Any,
    classes: Any = None,
    confidence: float = 0.95,
    comparisons: int = 1,
) -> Difference:
    """`difference` of macro-F1: the mean over `classes` of 2 TP / (2 TP + FP + FN).

    `true` (items,) and `first`, `second` (seeds, items) are labels of any kind, texts too;
    `classes` are by default all that occur in `true`. In units of macro-F1, from -1 to 1.
    """
    parts = (f1_parts(true, first, classes), f1_parts(true, second, classes))
    return difference(*parts, confidence=confidence, comparisons=comparisons)


def items_needed(
    points: float = 0.02,
    first: Any = None,
    second: Any = None,
    *,
    disagreement: float = 0.5,
    confidence: float = 0.95,
    comparisons: int = 1,
) -> float:
    """How many held-out items show a difference of this size with a probability of 80 %.

    Before anything has run: for answers that are right or wrong, from the share of the items on
    which the two variants may disagree. A half is what two independent coins do, which is the worst
    where neither variant is much better. It is taken to be the same items after every seed, and
    seeds to add nothing.

    With a pilot, its scores `first` and `second` (seeds, items) as for `difference`: from their
    variances, for the same number of seeds. Infinite where the seeds alone hide such a difference,
    and only more of them would show it.
    """
    if not points > 0:
        raise ValueError(f"points is {points}; it takes a positive number, 0.02 for two points")
    if not 0 < disagreement <= 1:
        raise ValueError(f"disagreement is {disagreement}; it takes a share above 0, up to 1")
    tail = tail_of(confidence, comparisons)
    if first is None and second is None:
        return math.ceil(disagreement * (visible(9_999, tail) / points) ** 2)
    table = differences(first, second)
    seeds, items = table.shape
    of_seeds, of_items, of_rest = variances(table)
    over_seeds, over_items = visible(seeds - 1, tail) ** 2 / seeds, visible(items - 1, tail) ** 2
    left = points**2 - over_seeds * of_seeds
    needed = over_seeds * of_rest + over_items * of_items
    return math.ceil(needed / left) if left > 0 else math.inf


# ------------------------------------------------------------------- statistics as means of items


def per_token(sums: Any, tokens: Any) -> np.ndarray:
    """(seeds, items) values whose mean is `sums.sum(1) / tokens.sum()`, after each seed.

    `sums` (seeds, items) are of the tokens of each item, as its nll; `tokens` (items,) their
    number.
    """
    sums, tokens = np.asarray(sums, float), np.asarray(tokens, float)
    ratio = sums.sum(1, keepdims=True) / tokens.sum()
    return ratio + (sums - ratio * tokens) / tokens.mean()


def f1_parts(true: Any, said: Any, classes: Any = None) -> np.ndarray:
    """(seeds, items) values whose mean is the macro-F1 of the answers `said`, after each seed.

    Each lacks one item's part in full: to first order alone, classes of two or three items made
    intervals too short by a fifth.
    """
    true, said = np.asarray(true), np.asarray(said)
    if true.shape != said.shape[1:]:
        raise ValueError(f"true is {true.shape} and the answers {said.shape}: (seeds, items)")
    classes = list(np.unique(true) if classes is None else classes)
    whole, without = 0.0, np.zeros(said.shape)
    for label in classes:
        is_true, is_said = true == label, said == label
        both = is_true + is_said.astype(float)
        hits, total = is_true & is_said, both.sum(1, keepdims=True)
        found = hits.sum(1, keepdims=True)
        whole += 2 * found / np.maximum(total, 1) / len(classes)
        without += 2 * (found - hits) / np.maximum(total - both, 1) / len(classes)
    return whole - (len(true) - 1) * (without - without.mean(1, keepdims=True))


# ------------------------------------------------------------------------------- what they are of


def tail_of(confidence: float, comparisons: int) -> float:
    """The probability above each interval, with Bonferroni's correction."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it takes a number between 0 and 1")
    if comparisons < 1:
        raise ValueError(f"comparisons is {comparisons}; it takes a whole number from 1")
    return (1 - confidence) / 2 / comparisons


def variances(table: np.ndarray) -> tuple[float, float, float]:
    """Of what is a seed's own, an item's own, and the rest; none below 0."""
    seeds, items = table.shape
    of_seed, of_item = table.mean(1), table.mean(0)
    rest = table - of_seed[:, None] - of_item + table.mean()
    of_rest = (rest**2).sum() / ((seeds - 1) * (items - 1))
    return (
        max(0.0, of_seed.var(ddof=1) - of_rest / items),
        max(0.0, of_item.var(ddof=1) - of_rest / seeds),
        of_rest,
    )


def differences(first: Any, second: Any) -> np.ndarray:
    arrays = {"first": np.asarray(first, float), "second": np.asarray(second, float)}
    for name, array in arrays.items():
        if array.ndim != 2:
            raise ValueError(f"{name} has the shape {array.shape}; it takes (seeds, items)")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has numbers that are not finite")
    a, b = arrays.values()
    if a.shape != b.shape:
        raise ValueError(f"first is {a.shape} and second {b.shape}; both are of the same items")
    if min(a.shape) < 2:
        raise ValueError(
            f"there are {a.shape[0]} seeds and {a.shape[1]} items; an interval takes two of each"
        )
    return b - a


@cache
def quantile(freedom: int, tail: float) -> float:
    """What Student's t exceeds with probability `tail`, below a half."""
    # with t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1)
    reach = math.atan(12 / math.sqrt(freedom)) if freedom > 50 else math.pi / 2
    angle = np.linspace(0, reach, 20001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(1 - 2 * tail, area / area[-1], angle))


@cache
def visible(freedom: int, tail: float) -> float:
    """The true difference that is found with a probability of `POWER`, in standard errors as seen.

    Another comparison sees a difference d and a standard error s' where this one saw s: all of
    them vary, and with few seeds greatly. d + factor s exceeds t s' with that probability.
    """
    draws = np.random.default_rng(0)
    seen, other = np.sqrt(draws.chisquare(freedom, (2, 200_000)) / freedom)
    error = draws.standard_normal(200_000)
    return float(np.quantile((quantile(freedom, tail) * other - error) / seen, POWER))
