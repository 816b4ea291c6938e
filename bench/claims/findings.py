"""The stored cells as the claims' comparisons: what the page shows and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.claims import coba, gradex, irdro, losses, smollm2
from bench.claims.cells import Store, slug
from bench.claims.model import hits_of, nll_of, said_of
from bench.claims.verdicts import (
    Compared,
    Outcome,
    Verdict,
    all_of,
    any_of,
    below,
    compared,
    same,
    verdict,
)
from segloss.compare.paired import f1_parts

POINTS, NATS, SPREAD = 0.02, 0.02, 0.02  # margins
ERROR, SPEED = 0.01, 1 / 30
SOME = ("0.5", "1", "2")


class Scores(NamedTuple):
    """Of a variant, all (seeds, items)."""

    hit: np.ndarray
    nll: np.ndarray


def scores(result: dict[str, Any], runs: Sequence[dict] | None = None) -> Scores:
    runs = result["runs"] if runs is None else runs
    hits = [hits_of(run, result["items"]) for run in runs]
    return Scores(np.array(hits, float), np.array([nll_of(run) for run in runs]))


def over(result: dict, name: str) -> np.ndarray:
    """(seeds,) a number of each run."""
    return np.array([run[name] for run in result["runs"]], float)


class Claim(NamedTuple):
    number: int
    text: str
    source: str
    conditions: dict[str, Outcome]
    single: dict[str, Outcome] = {}  # noqa: RUF012 - never written to
    """The comparisons that the conditions' outcomes are made of, where there are several."""

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """And the outcomes in words; without single comparisons it is a figure that is judged."""
        found, words = verdict(self.conditions)
        if not self.single:
            words = words.replace("better:", "as claimed:").replace("worse:", "not as claimed:")
        return found, words


def outcome(found: Compared | None) -> Outcome:
    return "not run" if found is None else found.outcome


# -------------------------------------------------------------------------------------- losses


def loss_cell(task: str, loss: str) -> str:
    return f"smollm2/{slug(loss)}" if task == "smollm2" else f"losses/{task}/{slug(loss)}"


def loss_gain(store: Store, task: str, loss: str, score: str = "hit") -> Compared | None:
    """Against cross-entropy; `score` is hit, nll or f1."""
    first, second = store.find(loss_cell(task, "ce")), store.find(loss_cell(task, loss))
    if first is None or second is None:
        return None
    claimed = smollm2.LOSSES[1:] if task == "smollm2" else losses.CLAIMED
    others = [name for name in losses.LOSSES + losses.SUMS if name not in ("ce", *claimed)]
    count = len(claimed) if loss in claimed else len(others)
    if score == "f1":
        a, b = (f1_parts(true_of(r), answers(r)) for r in (first, second))
        return compared(a, b, POINTS, count)
    a, b = (getattr(scores(r), score) for r in (first, second))
    margin = NATS if score == "nll" else POINTS
    return compared(a, b, margin, count, higher=score == "hit")


def true_of(result: dict) -> np.ndarray:
    if "true" in result:
        return said_of(result["true"])
    return np.array(result["runs"][0]["true"])


def answers(result: dict) -> np.ndarray:
    found = [said_of(run["said"]) for run in result["runs"]]
    if "true" in result:
        return np.array(found)
    return np.array([np.array(r["names"])[s] for r, s in zip(result["runs"], found, strict=True)])


# ---------------------------------------------------------------------- CoBa, sample weights


def coba_gain(store: Store, mix: str, other: str, score: str) -> Compared | None:
    """CoBa against other weights; `score` is hit, nll or spread."""
    first, second = store.find(f"coba/{mix}/{other}"), store.find(f"coba/{mix}/coba")
    if first is None or second is None:
        return None
    count = len(coba.WEIGHTS) - 1
    if score == "spread":
        a, b = over(first, "spread"), over(second, "spread")
        return compared(a, b, SPREAD, count, higher=False)
    a, b = (getattr(scores(r), score) for r in (first, second))
    margin = NATS if score == "nll" else POINTS
    return compared(a, b, margin, count, higher=score == "hit")


def others_than_coba() -> list[str]:
    return [name for name in coba.WEIGHTS if name != "coba"]


def weighting_gain(store: Store, setting: str, kind: str, name: str) -> Compared | None:
    """Against no weights, by exact match, of text by nll."""
    where = f"irdro/{setting}/{kind}"
    first, second = store.find(f"{where}/none"), store.find(f"{where}/{name}")
    if first is None or second is None:
        return None
    claimed = [v for v in irdro.VARIANTS if v.startswith("irdro")]
    count = len(claimed) if name in claimed else len(irdro.VARIANTS) - len(claimed) - 1
    if setting == "text":
        return compared(scores(first).nll, scores(second).nll, NATS, count, higher=False)
    return compared(scores(first).hit, scores(second).hit, POINTS, count)


# -------------------------------------------------------------------------------------- GradEx


def gradex_cell(steps: int) -> str:
    return f"gradex/steps{steps}"


def errors(result: dict, name: str = "estimated") -> np.ndarray:
    """(seeds,) mean relative error of the estimates."""
    return np.array(
        [
            np.mean(np.abs(np.array(seed[name]) - seed["true"]) / np.array(seed["true"]))
            for seed in result["seeds"]
        ]
    )


def correlations(result: dict) -> np.ndarray:
    """(seeds,) rank correlation of estimated and true losses."""
    rank = lambda values: np.argsort(np.argsort(values))  # noqa: E731
    return np.array(
        [np.corrcoef(rank(seed["estimated"]), rank(seed["true"]))[0, 1] for seed in result["seeds"]]
    )


def speeds(result: dict) -> np.ndarray:
    """(seeds,) time of estimating and choosing over that of as many retrainings."""
    found = []
    for seed in result["seeds"]:
        t = seed["seconds"]
        retraining = t["retraining"] / len(seed["subsets"]) * seed["selection_subsets"]
        found.append((t["all groups"] + t["gradients"] + t["selection"]) / retraining)
    return np.array(found)


def choice_scores(result: dict, name: str) -> Scores:
    """Of the models trained on a choice; `random` is the mean over random subsets."""
    if name != "random":
        return scores(result, [seed["runs"][name] for seed in result["seeds"]])
    each = [scores(result, seed["random"]) for seed in result["seeds"]]
    return Scores(np.array([s.hit.mean(0) for s in each]), np.array([s.nll.mean(0) for s in each]))


RIVALS = ("all", "random", "similar")


def choice_gain(store: Store, steps: int, rival: str) -> Compared | None:
    """The chosen subset against another, nll."""
    result = store.find(gradex_cell(steps))
    if result is None:
        return None
    a, b = choice_scores(result, rival).nll, choice_scores(result, "chosen").nll
    return compared(a, b, NATS, len(RIVALS), higher=False)


def gradex_limit(store: Store, steps: int, figure, limit: float) -> Outcome:
    result = store.find(gradex_cell(steps))
    return "not run" if result is None else below(figure(result), limit)[0]


# ------------------------------------------------------------------------------------------ own


def own_gain(store: Store, name: str) -> Compared | None:
    first, second = store.find("own/float32"), store.find(f"own/{name}")
    if first is None or second is None:
        return None
    return compared(scores(first).nll, scores(second).nll, NATS, 2, higher=False)


def own_outcome(store: Store, name: str) -> Outcome:
    found = own_gain(store, name)
    return "not run" if found is None else same(found.gain, found.margin)


# --------------------------------------------------------------------------------------- claims


def condition(
    judge: Callable[[Sequence[Outcome]], Outcome], single: dict[str, dict[str, Outcome]]
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """Of `single[condition][variant]`: the conditions' outcomes, and all single ones."""
    conditions = {name: judge(list(each.values())) for name, each in single.items()}
    flat = {
        f"{variant} ({name})": found
        for name, each in single.items()
        for variant, found in each.items()
    }
    return conditions, flat


def claims(store: Store) -> list[Claim]:
    def lengths(judge) -> dict[str, Any]:
        return {f"{steps} steps": judge(steps) for steps in gradex.LENGTHS}

    def mixes(score: str) -> dict[str, dict[str, Outcome]]:
        return {
            mix: {f"over {o}": outcome(coba_gain(store, mix, o, score)) for o in others_than_coba()}
            for mix in coba.MIXES
        }

    def rivals(steps: int) -> dict[str, Outcome]:
        return {f"over {r}": outcome(choice_gain(store, steps, r)) for r in RIVALS}

    tasks = dict.fromkeys(losses.TASKS, losses.CLAIMED) | {"smollm2": smollm2.LOSSES[1:]}
    by_loss = {
        task: {slug(name): outcome(loss_gain(store, task, name)) for name in names}
        for task, names in tasks.items()
    }
    by_temperature = {
        f"{setting} {kind}": {
            f"irdro-{t}": outcome(weighting_gain(store, setting, kind, f"irdro-{t}")) for t in SOME
        }
        for setting in irdro.SETTINGS
        for kind in irdro.DATA
    }
    return [
        Claim(
            1,
            "Focal or Lovász-Softmax, alone or summed, gives more exact matches than cross-entropy",
            "2409.13641",
            *condition(any_of, by_loss),
        ),
        Claim(
            2,
            "CoBa lets tasks converge at a more even pace",
            "2410.06741",
            *condition(all_of, mixes("spread")),
        ),
        Claim(
            3,
            "CoBa is better than the other balancers",
            "2410.06741",
            *condition(all_of, mixes("hit")),
        ),
        Claim(
            4,
            "GradEx's estimates are 1 % off",
            "2409.19458",
            lengths(lambda steps: gradex_limit(store, steps, errors, ERROR)),
        ),
        Claim(
            5,
            "GradEx is 30 x faster than retraining",
            "2409.19458",
            lengths(lambda steps: gradex_limit(store, steps, speeds, SPEED)),
        ),
        Claim(
            6,
            "GradEx's choice is better than all groups, random subsets and similar gradients",
            "2409.19458",
            *condition(all_of, lengths(rivals)),
        ),
        Claim(
            7,
            "IR-DRO gives consistent gains",
            "2402.14270",
            *condition(any_of, by_temperature),
        ),
        Claim(
            8,
            "`grad_filter` changes nothing in training",
            "this package",
            {"text": own_outcome(store, "filter")},
        ),
        Claim(
            9,
            "bf16 changes nothing in training",
            "this package",
            {"text": own_outcome(store, "bf16")},
        ),
    ]
