"""Subsets of tasks looked for by their estimated loss, and estimates held to true losses."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Names = tuple[str, ...]


@dataclass
class Selection:
    """What `GradEx.select` found."""

    objective: str
    method: str
    chosen: tuple[str, ...]
    estimated: float
    """Of the chosen subset."""
    subsets: list[tuple[tuple[str, ...], float]]
    """Every subset that was looked at and is allowed, with its estimated loss, best first."""
    scores: dict[str, float]
    """Ensemble: the mean estimate of the subsets that hold the task; lower is better."""


@dataclass
class Comparison:
    """Estimated against true losses of the same subsets."""

    subsets: list[tuple[str, ...]]
    estimated: list[float]
    true: list[float]

    @property
    def spearman(self) -> float:
        """Rank correlation; NaN for fewer than two subsets."""
        return spearman(self.estimated, self.true)

    @property
    def relative_error(self) -> float:
        """Mean of |estimated - true| / true."""
        pairs = zip(self.estimated, self.true, strict=True)
        return float(np.mean([abs(e - t) / abs(t) for e, t in pairs]))

    def __str__(self) -> str:
        width = max(len(" ".join(tasks)) for tasks in self.subsets)
        lines = [f"{'subset':<{width}}  estimated    true   error"]
        for tasks, e, t in zip(self.subsets, self.estimated, self.true, strict=True):
            lines.append(f"{' '.join(tasks):<{width}}  {e:9.4f} {t:7.4f} {(e - t) / t:+7.1%}")
        lines.append(
            f"mean |error| {self.relative_error:.1%}, rank correlation {self.spearman:.2f}"
        )
        return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank."""
    if len(a) < 2:
        return math.nan
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def search(
    estimate: Callable[[Names], float],
    tasks: Names,
    method: str,
    *,
    subsets: int,
    size: int | None,
    smallest: int,
    seed: int,
) -> tuple[list[tuple[Names, float]], dict[str, float]]:
    """Every subset of at least `smallest` tasks that the method looked at, with its estimate, best
    first, and the scores of tasks (ensemble only). See `GradEx.select`.

    A subset is estimated once, its tasks in the order of `tasks`.
    """
    looked_at: dict[Names, float] = {}

    def value(subset: Sequence[str]) -> float:
        key = tuple(task for task in tasks if task in subset)
        if key not in looked_at:
            looked_at[key] = estimate(key)
        return looked_at[key]

    scores: dict[str, float] = {}
    sizes = range(smallest, len(tasks) + 1)
    if method == "exhaustive":
        for count in sizes:
            for subset in itertools.combinations(tasks, count):
                value(subset)
    elif method == "ensemble":
        drawn = list(random_subsets(tasks, subsets, size, seed))
        for task in tasks:
            holding = [value(subset) for subset in drawn if task in subset]
            scores[task] = float(np.mean(holding)) if holding else math.nan
        ranking = sorted(tasks, key=lambda task: (math.isnan(scores[task]), scores[task]))
        for count in sizes:
            value(ranking[:count])
    elif method == "forward":
        add_one_by_one(value, tasks, smallest)
    else:
        raise ValueError(
            f"method is {method!r}; it takes 'auto', 'exhaustive', 'ensemble' or 'forward'"
        )
    allowed = [item for item in looked_at.items() if len(item[0]) >= smallest]
    return sorted(allowed, key=lambda item: item[1]), scores


def add_one_by_one(value: Callable[[Sequence[str]], float], tasks: Names, smallest: int) -> None:
    """Adds the task that helps most, until none does."""
    chosen: list[str] = []
    while len(chosen) < len(tasks):
        rest = [task for task in tasks if task not in chosen]
        best = min(rest, key=lambda task: value([*chosen, task]))
        if len(chosen) >= smallest and value([*chosen, best]) >= value(chosen):
            break
        chosen.append(best)


def random_subsets(tasks: Names, count: int, size: int | None, seed: int) -> Iterator[Names]:
    """`count` subsets of `size` tasks, half of them by default."""
    size = max(1, len(tasks) // 2) if size is None else size
    if not 1 <= size <= len(tasks):
        raise ValueError(f"size is {size}; it takes 1 to {len(tasks)}, the number of tasks")
    rng = random.Random(seed)
    for _ in range(count):
        yield tuple(rng.sample(tasks, size))
