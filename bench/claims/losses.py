"""Every loss, alone and in a sum with cross-entropy, from scratch on four tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from bench.claims import tasks
from bench.claims.cells import Cell, slug
from bench.claims.model import (
    Bag,
    Data,
    Transformer,
    criterion,
    exactness,
    packed,
    scored,
    train,
    variant,
)

RATES = (3e-3, 1e-2, 3e-2)
LOSSES = (
    "ce", "focal", "lovasz", "poly", "gce", "dft", "sadl", "dice", "jaccard", "tversky",
    "focal_tversky", "gdice",
)  # fmt: skip
SUMS = tuple(f"0.5*ce+0.5*{name}" for name in LOSSES[1:])
# what the paper's claim is about
CLAIMED = ("focal", "lovasz", "0.5*ce+0.5*focal", "0.5*ce+0.5*lovasz")
SEEDS, MORE_SEEDS = 5, 10


class Task(NamedTuple):
    steps: int
    batch: int
    seconds: float
    """Of one run."""


TASKS = {
    "addition": Task(120, 32, 0.8),
    "sorting": Task(200, 32, 1.5),
    "copying": Task(200, 32, 1.5),
    "subjects": Task(300, 64, 1.0),
}


def untrained(task: str, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if task == "subjects":
        return Bag(tasks.HASHED, tasks.SUBJECTS)
    return Transformer(tasks.GENERATED[task].vocabulary, data.ids.shape[1])


def parts(task: str, steps: int, batch: int, items: int) -> Callable[[str, int], Data]:
    """(part, seed) -> its items; of a generated task every seed trains on its own."""
    if task == "subjects":
        questions = tasks.subjects(tasks.hashed)
        return lambda part, seed: getattr(questions, part)
    make = tasks.GENERATED[task].make
    return lambda part, seed: (
        make(steps * batch, ("train", seed)) if part == "train" else make(items, part)
    )


def run(task: str, expression: str, seeds: int, steps: int, items: int) -> dict:
    batch = TASKS[task].batch
    data = parts(task, steps, batch, items)
    labelled = task == "subjects"

    def once(rate: float, seed: int, part: str) -> dict:
        rows = data("train", seed)
        model = untrained(task, rows, seed)
        train(model, rows, rate, criterion(expression), steps=steps, batch=batch, seed=seed)
        return scored(model, data(part, seed), said=labelled)

    result = variant(once, RATES, seeds, exactness)
    test = data("test", 0)
    result |= {"loss": expression, "items": len(test.ids)}
    if labelled:
        result["true"] = packed(test.target[:, 0].numpy().astype("uint8"))
    return result


def cells(quick: bool = False) -> list[Cell]:
    if quick:
        return [
            Cell(f"losses/{task}/{slug(loss)}", partial(run, task, loss, 2, 10, 100), 1, 2)
            for task in TASKS
            for loss in ("ce", "lovasz")
        ]
    found = []
    for task, size in TASKS.items():
        for loss in LOSSES + SUMS:
            first = loss == "ce" or loss in CLAIMED
            seeds = MORE_SEEDS if first else SEEDS
            found.append(
                Cell(
                    f"losses/{task}/{slug(loss)}",
                    partial(run, task, loss, seeds, size.steps, 1000),
                    1 if first else 5,
                    size.seconds * (seeds + len(RATES)),
                )
            )
    return found
