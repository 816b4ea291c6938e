"""CoBa against other weights of tasks: is the pace more even, and is the result better.

K tasks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import segloss
from bench.claims import tasks
from bench.claims.cells import Cell
from bench.claims.losses import RATES
from bench.claims.model import (
    IGNORE,
    Data,
    Transformer,
    likelihood,
    optimizer_of,
    order,
    scored,
    variant,
)

NAMES = ("addition", "sorting", "copying", "reversing")
PLACES = 18  # of the longest task; shorter ones are padded
VOCABULARY = 101 + len(NAMES)
# training items of each task: none seen twice, or so few that tasks end at different times
MIXES = {"plenty": (16000, 8000, 4000, 2400), "scarce": (800, 400, 200, 100)}
WEIGHTS = ("equal", "size", "coba", "uncertainty", "dwa")
EACH = 8  # items of a task in a batch
EVERY = 10  # steps between two full validations
SEEDS = 5


def padded(data: Data, task: int) -> Data:
    """With the task's sign in front."""
    rows, length = data.ids.shape
    ids = torch.zeros(rows, PLACES, dtype=torch.long)
    target = torch.full((rows, PLACES), IGNORE)
    ids[:, 0], ids[:, 1 : length + 1] = VOCABULARY - 1 - task, data.ids
    target[:, 1 : length + 1] = data.target
    return Data(ids, target)


def of_each(count: int, key) -> list[Data]:
    return [padded(tasks.GENERATED[name].make(count, key), k) for k, name in enumerate(NAMES)]


def joined(parts: list[Data]) -> Data:
    return Data(torch.cat([p.ids for p in parts]), torch.cat([p.target for p in parts]))


def task_losses(model: nn.Module, batch: Data) -> Tensor:
    """(K,) mean cross-entropy per token; the batch has as many items of each task, in order."""
    stats = segloss.logit_statistics(model(batch.ids), batch.target)
    log_prob = stats.log_prob.masked_fill(~stats.valid, 0).view(len(NAMES), -1)
    return -log_prob.sum(1) / stats.valid.view(len(NAMES), -1).sum(1)


# ------------------------------------------------------------------------------------ balancers


class Balancer(ABC):
    """`loss(losses)` of the tasks' losses (K,); `parameters` are trained with the model's."""

    parameters: tuple[Tensor, ...] = ()

    @abstractmethod
    def loss(self, losses: Tensor) -> Tensor: ...

    def after_step(self, validation: Callable[[], Tensor]) -> None:
        """`validation()`: the tasks' losses on a small batch, if they are needed."""
        return


class Fixed(Balancer):
    def __init__(self, sizes: tuple[int, ...]):
        self.weights = torch.tensor(sizes) / sum(sizes)

    def loss(self, losses: Tensor) -> Tensor:
        return self.weights @ losses


class ByCoBa(Balancer):
    def __init__(self, warmup: int = 20, history: int = 60):
        self.coba = segloss.CoBa(len(NAMES), warmup=warmup, history=history)

    def loss(self, losses: Tensor) -> Tensor:
        return self.coba.weights() @ losses

    def after_step(self, validation: Callable[[], Tensor]) -> None:
        self.coba.update(validation())


class Uncertainty(Balancer):
    """Learnt weights: `exp(-s) loss + s` for each task (Kendall et al. 2018, their (10))."""

    def __init__(self):
        self.log_variance = torch.zeros(len(NAMES), requires_grad=True)
        self.parameters = (self.log_variance,)

    def loss(self, losses: Tensor) -> Tensor:
        return ((-self.log_variance).exp() * losses + self.log_variance).mean()


class DWA(Balancer):
    """Dynamic weight average (Liu et al. 2019, their (7)): what falls slowly weighs more.

    An epoch is `span` steps here.
    """

    def __init__(self, span: int = 20, temperature: float = 2.0):
        self.span, self.temperature = span, temperature
        self.seen: list[Tensor] = []

    def loss(self, losses: Tensor) -> Tensor:
        self.seen.append(losses.detach())
        epochs = len(self.seen) // self.span
        weights = torch.full_like(losses, 1 / len(NAMES)).detach()
        if epochs >= 2:
            last, before = (
                torch.stack(self.seen[(e - 1) * self.span : e * self.span]).mean(0)
                for e in (epochs, epochs - 1)
            )
            weights = torch.softmax(last / before / self.temperature, 0)
        return weights @ losses


def balancer(name: str, sizes: tuple[int, ...]) -> Balancer:
    return {
        "equal": lambda: Fixed((1,) * len(NAMES)),
        "size": lambda: Fixed(sizes),
        "coba": ByCoBa,
        "uncertainty": Uncertainty,
        "dwa": DWA,
    }[name]()


# ----------------------------------------------------------------------------------------- runs


class Trained(NamedTuple):
    model: nn.Module
    """At the step of the least mean validation loss."""
    curve: Tensor
    """(validations, K) validation losses."""


def fit(name: str, sizes: tuple[int, ...], rate: float, seed: int, steps: int) -> Trained:
    data = [padded(tasks.GENERATED[t].make(size, ("train", seed)), k)
            for k, (t, size) in enumerate(zip(NAMES, sizes, strict=True))]  # fmt: skip
    drawn = [order(size, steps, EACH, seed) for size in sizes]
    validation = of_each(160, "validation")
    whole = joined(validation)
    torch.manual_seed(seed)
    model, weights = Transformer(VOCABULARY, PLACES), balancer(name, sizes)
    optimizer, schedule = optimizer_of([*model.parameters(), *weights.parameters], rate, steps)
    small = order(160, steps, EACH, seed + 1)
    best, curve, state = torch.inf, [], model.state_dict()
    for step in range(steps):
        batch = joined([d.rows(rows[step]) for d, rows in zip(data, drawn, strict=True)])
        optimizer.zero_grad()
        weights.loss(task_losses(model, batch)).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            part = [d.rows(small[step]) for d in validation]
            weights.after_step(lambda part=part: task_losses(model, joined(part)))
            if (step + 1) % EVERY == 0:
                curve.append(task_losses(model, whole))
                if curve[-1].mean() < best:
                    best, state = curve[-1].mean(), copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return Trained(model, torch.stack(curve))


def run(mix: str, name: str, seeds: int, steps: int, items: int) -> dict:
    parts = {
        "validation": joined(of_each(250, "chosen")),
        "test": joined(of_each(items // len(NAMES), "test")),
    }

    def once(rate: float, seed: int, part: str) -> dict:
        model, curve = fit(name, MIXES[mix], rate, seed, steps)
        found = scored(model, parts[part])
        best = (curve.argmin(0) + 1) * EVERY
        found |= {"best_steps": best.tolist(), "lowest": curve.min(0).values.tolist()}
        found["curve"] = [[round(x, 3) for x in row] for row in curve.tolist()]
        return found | {"spread": float(np.std(best.numpy()) / steps)}

    result = variant(once, RATES, seeds, likelihood)
    return result | {"weights": name, "items": len(parts["test"].ids), "tasks": list(NAMES)}


def cells(quick: bool = False) -> list[Cell]:
    seeds, steps, items = (2, 2 * EVERY, 80) if quick else (SEEDS, 300, 1000)
    return [
        Cell(f"coba/{mix}/{name}", partial(run, mix, name, seeds, steps, items), 2,
             7.0 * (seeds + len(RATES)))
        for mix in MIXES
        for name in WEIGHTS
    ]  # fmt: skip
