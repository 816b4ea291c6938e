"""What the runs of a comparison have come to: one table, and a sentence for each variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from segloss.train.errors import UserError
from segloss.train.evaluation import same
from segloss.train.report import RESULTS, SCORES, aligned, cell, read_json, read_lines

from .paired import Difference, difference, f1_parts, per_token
from .runs import Run

LARGE = 0.02
"""The difference that the number of held-out items is said for: two points."""
NOTES = """\
Means over the seeds, of each task's held-out items; after a comma the difference from the first
variant, in brackets its 95 % interval, which counts both seeds and items as drawn at random. Where
it leaves out 0, a difference is found. It is corrected for the number of variants, not for that of
tasks and scores: of twenty scores without a difference one shows one. Loss: cross-entropy of the
right answer, the less the better. Exact match: of greedy answers. Accuracy and macro-F1: of the
option that decoding chooses where only the options may come."""


@dataclass(frozen=True)
class Outcome:
    """What one run has left: a row per held-out item, and the scores that its tasks have."""

    run: Run
    steps: int
    rows: dict[str, list[dict[str, Any]]]
    scores: dict[str, list[str]]

    def require_like(self, first: Outcome) -> None:
        """Raises `UserError` where the two were not trained and evaluated alike."""
        if self.steps != first.steps:
            raise UserError(
                f"{self.run} took {self.steps} steps and {first.run} {first.steps}; only equal "
                "numbers are compared: give --steps"
            )
        for task, rows in self.rows.items():
            if len(rows) < 2:
                raise UserError(
                    f"{self.run} was evaluated on 1 item of {task!r}; give --eval_items"
                )
        names = ("expected", "tokens")
        read = [{t: [[r[n] for n in names] for r in rows] for t, rows in o.rows.items()}
                for o in (self, first)]  # fmt: skip
        if read[0] != read[1]:
            raise UserError(f"{self.run} was evaluated on other items or tokens than {first.run}")


def outcome(run: Run) -> Outcome:
    found = read_json(run.folder / RESULTS)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(run.folder / "answers-after.jsonl"):
        rows.setdefault(row["task"], []).append(row)
    scores = {row["task"]: [name for name in SCORES if name in row] for row in found["tasks"]}
    return Outcome(run, found["steps"], rows, scores)


@dataclass(frozen=True)
class Score:
    """A score of a variant on a task: its mean over seeds, and the difference from the first."""

    task: str
    items: int
    variant: str
    first: str
    name: str
    """As in `SCORES`."""
    mean: float
    by_seed: list[float]
    """The differences; of the first variant itself, none."""
    difference: Difference | None

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.difference is not None and math.isnan(self.difference.detectable):
            found["difference"]["detectable"] = None
        return found

    @property
    def verdict(self) -> str:
        """better, worse, or nothing."""
        if self.difference is None or not self.difference.found:
            return ""
        return "better" if (self.difference.mean < 0) == (self.name == "nll") else "worse"


def compared(
    outcomes: dict[str, list[Outcome]], comparisons: int, min_class_items: int
) -> list[Score]:
    """Every score of every variant on every task, the first variant's first."""
    first = next(iter(outcomes))
    found = []
    for task, names in outcomes[first][0].scores.items():
        rows = {variant: [o.rows[task] for o in of_seeds] for variant, of_seeds in outcomes.items()}
        for variant in outcomes:
            for name in names:
                ours, theirs = (parts(rows[v], name, min_class_items) for v in (first, variant))
                found.append(score_of(task, variant, first, name, ours, theirs, comparisons))
    return found


def score_of(
    task: str, variant: str, first: str, name: str, ours: Any, theirs: Any, comparisons: int
) -> Score:
    items, mean = ours.shape[1], float(theirs.mean())
    if variant == first:
        return Score(task, items, variant, first, name, mean, [], None)
    by_seed = (theirs - ours).mean(1).tolist()
    found = difference(ours, theirs, comparisons=comparisons)
    return Score(task, items, variant, first, name, mean, by_seed, found)


def parts(rows: Sequence[Sequence[dict]], name: str, min_class_items: int) -> np.ndarray:
    """(seeds, items) values whose mean is the score, as `segloss train` gives it."""
    if name == "nll":
        nll, tokens = (
            [[row[key] for row in of_seed] for of_seed in rows] for key in (name, "tokens")
        )
        return per_token(nll, tokens[0])
    if name == "exact_match":
        return np.array([[same(row["answer"], row["expected"]) for row in r] for r in rows], float)
    true = np.array([(row["expected"] or "").strip() for row in rows[0]])
    said = np.array([[row["choice"] for row in of_seed] for of_seed in rows])
    if name == "accuracy":
        return (said == true).astype(float)
    classes, counts = np.unique(true, return_counts=True)
    return f1_parts(true, said, classes[counts >= min_class_items])


# -------------------------------------------------------------------------------------- in words


def markdown(scores: Sequence[Score]) -> str:
    return f"{aligned(table(scores))}\n\n{NOTES}"


def table(scores: Sequence[Score]) -> list[list[str]]:
    """A header, and a row for each variant on each task."""
    names = [name for name in SCORES if any(score.name == name for score in scores)]
    blocks: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        blocks.setdefault((score.task, score.variant), {})[score.name] = score
    header = ["task", "items", "variant", *(SCORES[name][0] for name in names)]
    rows, last = [header], None
    for (task, variant), block in blocks.items():
        items = next(iter(block.values())).items
        cells = [shown(block.get(name)) for name in names]
        rows.append([*(("", "") if task == last else (task, str(items))), variant, *cells])
        last = task
    return rows


def shown(score: Score | None) -> str:
    if score is None:
        return "-"
    _, scale, form = SCORES[score.name]
    mean, found = cell([score.mean], scale, form), score.difference
    if found is None:
        return mean
    signed = cell([found.mean, found.low, found.high], scale, form.replace("{:", "{:+"))
    return f"{mean}, {signed}"


def sentences(scores: Sequence[Score]) -> list[str]:
    """For each variant but the first one, and each task."""
    blocks: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        if score.difference is not None:
            blocks.setdefault((score.variant, score.task), []).append(score)
    return [
        f"{variant}, compared with {block[0].first}, on {task}: {verdicts(block)}."
        for name in dict.fromkeys(variant for variant, _ in blocks)
        for (variant, task), block in blocks.items()
        if variant == name
    ]


def verdicts(block: Sequence[Score]) -> str:
    """Of a variant on a task, for somebody who knows no statistics."""
    found, seen, small, alike = [], [], [], []
    for score in block:
        one = score.difference
        assert one is not None
        if score.verdict:
            low, high = sorted(map(abs, (one.low, one.high)))
            between = f"between {size(score, low, unit=False)} and {size(score, high, unit=False)}"
            by = size(score, abs(one.mean))
            found.append(f"{score.verdict} in {title(score)} by {by} ({between})")
        elif math.isnan(one.detectable):
            alike.append(title(score))
        elif score.name != "nll" and one.detectable > 1:
            small.append(title(score))
        else:
            seen.append((title(score), size(score, one.detectable)))
    none = "no difference found in "
    if seen:
        names, sizes = (listed(list(texts)) for texts in zip(*seen, strict=True))
        found.append(f"{none}{names}; this comparison could have shown one of about {sizes}")
    if small:
        found.append(f"{none}{listed(small)}; this comparison is too small to show any")
    if alike:
        found.append(f"{none}{listed(alike)}, the same on every item")
    return ". ".join([found[0], *(text[0].upper() + text[1:] for text in found[1:])])


def title(score: Score) -> str:
    return SCORES[score.name][0].partition(" (")[0]


def listed(texts: list[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([*([", ".join(texts[:-1])] if texts[:-1] else []), texts[-1]])


def size(score: Score, value: float, unit: bool = True) -> str:
    _, scale, form = SCORES[score.name]
    units = {"nll": " nats per token", "exact_match": " points", "accuracy": " points"}
    return form.format(scale * value) + units.get(score.name, "") * unit
