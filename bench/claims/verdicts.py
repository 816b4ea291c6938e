"""The rule by which a claim holds, as the protocol has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from segloss.compare.paired import Difference, difference

Outcome = Literal["better", "worse", "no gain", "undecided", "not run"]
Verdict = Literal[
    "holds", "holds under conditions", "does not hold", "undecided", "not run"
]  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A variant against another; `gain` is positive where it is better."""

    gain: Difference
    margin: float
    """The least gain that would be worth having."""

    @property
    def outcome(self) -> Outcome:
        """Of the interval: above 0, below 0, below the margin, or none of these."""
        if self.gain.low > 0:
            return "better"
        if self.gain.high < 0:
            return "worse"
        return "no gain" if self.gain.high < self.margin else "undecided"


def compared(first, second, margin: float, comparisons: int = 1, higher: bool = True) -> Compared:
    """Scores (seeds, items) of a variant, `second`, against those of `first`.

    The seeds that both have; `higher`: whether more is better. A score (seeds,) of a whole run has
    seeds alone to vary.
    """
    a, b = (np.asarray(scores, float) for scores in (first, second))
    seeds = min(len(a), len(b))
    if a.ndim == 1:
        # two items without any difference between them
        a, b = np.stack([a, a], 1), np.stack([b, b], 1)
    a, b = (a[:seeds], b[:seeds]) if higher else (-a[:seeds], -b[:seeds])
    return Compared(difference(a, b, comparisons=comparisons), margin)


def any_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Of a condition under which one variant of several is claimed to be better."""
    if not outcomes or all(o == "not run" for o in outcomes):
        return "not run"
    if "better" in outcomes:
        return "better"
    if any(o in ("undecided", "not run") for o in outcomes):
        return "undecided"
    return "worse" if all(o == "worse" for o in outcomes) else "no gain"


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Of a condition under which one variant is claimed to be better than each of several."""
    if not outcomes or all(o == "not run" for o in outcomes):
        return "not run"
    for outcome in ("worse", "no gain"):
        if outcome in outcomes:
            return outcome
    return "better" if all(o == "better" for o in outcomes) else "undecided"


def verdict(conditions: Mapping[str, Outcome]) -> tuple[Verdict, str]:
    """Of a claim, from its outcome under every condition; and that in words.

    holds                    better under every condition
    holds under conditions   better under some
    does not hold            better under none, and each is worse or shows no gain
    undecided                otherwise: under none better, under some undecided or not run
    """
    outcomes = set(conditions.values())
    words = by_outcome(conditions, get_args(Outcome))
    if outcomes <= {"not run"}:
        return "not run", words
    if outcomes == {"better"}:
        return "holds", words
    if "better" in outcomes:
        return "holds under conditions", words
    if outcomes <= {"worse", "no gain"}:
        return "does not hold", words
    return "undecided", words


def by_outcome(conditions: Mapping[str, Outcome], outcomes: Sequence[str]) -> str:
    """`better: addition, sorting; worse: copying`."""
    named = {o: [name for name, found in conditions.items() if found == o] for o in outcomes}
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in named.items() if names)


def same(gain: Difference, margin: float) -> Outcome:
    """Of a condition under which two are claimed to be the same: better if they are."""
    if -margin < gain.low and gain.high < margin:
        return "better"
    return "worse" if gain.low > margin or gain.high < -margin else "undecided"


def below(values: Sequence[float], limit: float) -> tuple[Outcome, Difference]:
    """Of a figure (seeds,) that is claimed to be at most `limit`, and its interval."""
    found = np.asarray(values, float)
    column = np.stack([found, found], 1)
    interval = difference(np.zeros_like(column), column)
    if interval.high <= limit:
        return "better", interval
    return ("worse" if interval.low > limit else "undecided"), interval
