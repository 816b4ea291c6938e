"""GradEx at three lengths of fine-tuning: how far off are the estimates, and is the choice good.

A small transformer that has begun to add is fine-tuned on groups of sums: right ones, ones with
random answers, and differences instead of sums. Every length is a cell: one model trained on all
groups, gradients once, and for each subset an estimate and a retraining.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.claims import tasks
from bench.claims.cells import Cell
from bench.claims.model import Data, Transformer, criterion, scored, train
from segloss.selection import GradEx, Sample

DIGITS = 3


@dataclass(frozen=True)
class Size:
    steps: int
    seeds: int = 5
    subsets: int = 12
    clean: int = 6
    noisy: int = 3
    other: int = 3
    group: int = 25
    base_steps: int = 60
    estimated: int = 200
    """Held-out items that the estimates are of."""
    items: int = 1000
    rate: float = 3e-3

    @property
    def groups(self) -> list[str]:
        counts = (("clean", self.clean), ("noisy", self.noisy), ("other", self.other))
        return [f"{kind}{i}" for kind, count in counts for i in range(count)]


LENGTHS = (20, 80, 320)


def group(name: str, size: Size, seed: int) -> Data:
    data = tasks.addition(size.group, (name, seed), DIGITS, float(name.startswith("noisy")))
    if not name.startswith("other"):
        return data
    # the sum's digits in reverse: another task with the same question
    answer = slice(DIGITS, None)
    target = data.target.clone()
    target[:, answer] = data.target[:, answer].flip(1)
    ids = data.ids.clone()
    ids[:, DIGITS + 1 :] = target[:, DIGITS:-1]
    return Data(ids, target)


def joined(groups: dict[str, Data], names) -> Data:
    chosen = [groups[name] for name in names]
    return Data(torch.cat([g.ids for g in chosen]), torch.cat([g.target for g in chosen]))


def outputs(model: nn.Module, item: Data) -> tuple[Tensor, Tensor]:
    return model(item.ids[None]), item.target[None]


def samples(name: str, data: Data) -> list[Sample]:
    return [Sample(f"{name}-{i}", name, data.rows(i)) for i in range(len(data.ids))]


def similar(gradex: GradEx, count: int) -> tuple[str, ...]:
    """The groups whose mean gradient points most along the target's."""
    rows, aim = gradex.rows("train"), gradex.rows("target").gradient.mean(0)
    means = {
        name: rows.gradient[torch.from_numpy(rows.task == name)].mean(0) for name in gradex.tasks()
    }
    cosine = {n: float(torch.cosine_similarity(m, aim, dim=0)) for n, m in means.items()}
    return tuple(sorted(cosine, key=cosine.__getitem__, reverse=True)[:count])


def one(size: Size, seed: int) -> dict:
    torch.manual_seed(seed)
    base = Transformer(101, 2 * DIGITS + 1)
    plain = criterion("ce")
    data = tasks.addition(32 * size.base_steps, ("base", seed), DIGITS)
    train(base, data, 1e-2, plain, steps=size.base_steps, batch=32, seed=seed)
    groups = {name: group(name, size, seed) for name in size.groups}
    target = tasks.addition(size.estimated, "target", DIGITS)
    test = tasks.addition(size.items, "test", DIGITS)
    seconds = {}

    def tuned(subset) -> nn.Module:
        model = copy.deepcopy(base)
        return train(
            model, joined(groups, subset), size.rate, plain,
            steps=size.steps, batch=32, seed=seed,
        )  # fmt: skip

    started = time.process_time()

    def lap(name: str) -> None:
        nonlocal started
        now = time.process_time()
        seconds[name], started = now - started, now

    every = tuned(groups)
    lap("all groups")
    gradex = GradEx(every, dim=400, seed=seed, outputs=outputs, relative=True)
    gradex.collect(s for name, data in groups.items() for s in samples(name, data))
    gradex.collect(samples("sums", target), role="target")
    lap("gradients")
    rng = random.Random(seed)
    half = len(groups) // 2
    subsets = [tuple(sorted(rng.sample(list(groups), half))) for _ in range(size.subsets)]
    estimated = [gradex.estimate(subset) for subset in subsets]
    lap("estimates")
    selection = gradex.select(subsets=200, size=half, smallest=half, method="ensemble")
    lap("selection")
    retrained = [tuned(subset) for subset in subsets]
    lap("retraining")
    gradex.relative = False
    plainly = [gradex.estimate(subset) for subset in subsets]
    choices = {"chosen": selection.chosen, "similar": similar(gradex, half)}
    models = {"base": base, "all": every} | {n: tuned(subset) for n, subset in choices.items()}
    runs = {name: scored(model, test) for name, model in models.items()}
    on_subsets = [scored(model, test) for model in retrained]
    return {
        "runs": runs,
        "random": on_subsets,
        "choices": {name: list(subset) for name, subset in choices.items()},
        "subsets": [list(subset) for subset in subsets],
        "estimated": estimated,
        "not_relative": plainly,
        "true": [scored(model, target)["mean_nll"] for model in retrained],
        "selection_subsets": len(selection.subsets),
        "seconds": seconds,
    }


def run(size: Size) -> dict:
    return {
        "steps": size.steps,
        "items": size.items,
        "seeds": [one(size, seed) for seed in range(size.seeds)],
    }


def cells(quick: bool = False) -> list[Cell]:
    if quick:
        small = {"subsets": 3, "clean": 2, "noisy": 1, "other": 1, "group": 6, "base_steps": 5}
        size = partial(Size, seeds=2, estimated=20, items=100, **small)
        return [Cell("gradex/steps4", partial(run, size(4)), 3, 10)]
    return [
        Cell(f"gradex/steps{steps}", partial(run, Size(steps)), 3, 5 * (15 + 0.1 * steps))
        for steps in LENGTHS
    ]
