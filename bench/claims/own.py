"""What this package does on its own: `grad_filter`, and bf16, against float32 without a filter."""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
from torch import Tensor, nn

import segloss
from bench.claims import tasks
from bench.claims.cells import Cell
from bench.claims.losses import MORE_SEEDS, RATES
from bench.claims.model import Data, Transformer, criterion, likelihood, scored, train, variant

VOCABULARY = 8192
VARIANTS = ("float32", "filter", "bf16")
FILTER = 2**-12
BATCH = 32


def loss_of(name: str):
    def loss(model: Transformer, data: Data) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            hidden = model.hidden(data.ids)
            logits = segloss.LinearLogits(
                hidden, model.head.weight, grad_filter=FILTER if name == "filter" else 0.0
            )
            return segloss.cross_entropy(logits, data.target)

    return loss


@cache
def base(steps: int) -> nn.Module:
    torch.manual_seed(0)
    model, data = Transformer(VOCABULARY, tasks.LENGTH), tasks.text(VOCABULARY).general.train
    return train(model, data, 1e-2, criterion("ce"), steps=steps, batch=BATCH, seed=0)


def run(name: str, seeds: int, steps: int, items: int) -> dict:
    text = tasks.text(VOCABULARY).medical

    def once(rate: float, seed: int, part: str) -> dict:
        model = copy.deepcopy(base(3 * steps))
        train(model, text.train, rate, loss_of(name), steps=steps, batch=BATCH, seed=seed)
        # scored in float32, whatever it was trained in
        return scored(model, getattr(text, part).rows(slice(0, items)), batch=250)

    return variant(once, RATES, seeds, likelihood) | {"items": items}


def cells(quick: bool = False) -> list[Cell]:
    seeds, steps, items = (2, 3, 100) if quick else (MORE_SEEDS, 100, 1000)
    return [
        Cell(f"own/{name}", partial(run, name, seeds, steps, items), 4, 3.0 * (seeds + len(RATES)))
        for name in VARIANTS
    ]
