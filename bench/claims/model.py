"""The small models of the study, and how they are trained and scored.

B items, T positions, V classes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segloss

IGNORE = -100
BINS = 15  # of the expected calibration error


class Data(NamedTuple):
    """Items: ids (N, T) and what is to be predicted from each place, -100 for nothing."""

    ids: Tensor
    target: Tensor

    def rows(self, index) -> Data:
        return Data(self.ids[index], self.target[index])


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.before_attention(hidden))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp(self.before_mlp(hidden))


class Transformer(nn.Module):
    """A causal transformer with learnt positions: logits (B, T, V) of ids (B, T)."""

    def __init__(self, vocabulary: int, length: int, width: int = 48, layers: int = 2):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def hidden(self, ids: Tensor) -> Tensor:
        position = self.position.weight[: ids.shape[1]]
        return self.norm(self.blocks(self.token(ids) + position))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class Last(nn.Module):
    """A transformer's last hidden state, and a new head: logits (B, 1, classes)."""

    def __init__(self, body: Transformer, classes: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.head.in_features, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body.hidden(ids)[:, -1:])


class Bag(nn.Module):
    """The mean of the words' embeddings (id 0 is no word), a layer: logits (B, 1, classes)."""

    def __init__(self, vocabulary: int, classes: int, width: int = 64):
        super().__init__()
        self.word = nn.EmbeddingBag(vocabulary, width, padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.word(ids))[:, None]


# ------------------------------------------------------------------------------------ training


def optimizer_of(parameters, rate: float, steps: int):
    """AdamW and its schedule: a tenth of the steps up to `rate`, then down to 0 in a line."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    rising = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising))
    )
    return optimizer, schedule


def order(items: int, steps: int, batch: int, seed: int) -> Tensor:
    """(steps, batch) rows, each as often as any other, to one time more or less."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // items)
    rows = torch.cat([torch.randperm(items, generator=generator) for _ in range(rounds)])
    return rows[: steps * batch].view(steps, batch)


def train(
    model: nn.Module,
    data: Data,
    rate: float,
    loss: Callable[[nn.Module, Data], Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> nn.Module:
    """The same order of items for the same seed, whatever the loss."""
    optimizer, schedule = optimizer_of(model.parameters(), rate, steps)
    model.train()
    for rows in order(len(data.ids), steps, batch, seed):
        optimizer.zero_grad()
        loss(model, data.rows(rows)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def criterion(expression: str) -> Callable[[nn.Module, Data], Tensor]:
    """The loss that `segloss train --loss expression` takes."""
    loss = segloss.parse_loss(expression)
    return lambda model, data: loss(model(data.ids), data.target)


# ------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def scored(model: nn.Module, data: Data, batch: int = 500, said: bool = False) -> dict[str, Any]:
    """What a cell keeps of a trained model: `hit` and `nll` of every item, packed, and their means.

    An item is hit if the likeliest class of every target is the target, which is when greedy
    decoding gives the answer. `nll` is the mean over the item's targets. `said`: the classes
    answered too, of data with one target an item.
    """
    hits, nll, sure, right, answers = [], [], [], [], []
    for first in range(0, len(data.ids), batch):
        part = data.rows(slice(first, first + batch))
        logits = model(part.ids)
        stats = segloss.logit_statistics(logits, part.target)
        valid = part.target != IGNORE
        log_p, best = logits.log_softmax(-1).max(-1)
        hits.append(((best == part.target) | ~valid).all(1))
        nll.append(-(stats.log_prob.masked_fill(~valid, 0)).sum(1) / valid.sum(1))
        sure.append(log_p.exp()[valid])
        right.append((best == part.target)[valid])
        answers.append(best[:, 0])
    hit, each = torch.cat(hits).numpy(), torch.cat(nll).numpy()
    result = {
        "exact": float(hit.mean()),
        "mean_nll": float(each.mean()),
        "ece": calibration(torch.cat(sure).numpy(), torch.cat(right).numpy()),
        "hit": packed(np.packbits(hit)),
        "nll": packed(each.astype(np.float16)),
    }
    if said:
        result["said"] = packed(torch.cat(answers).numpy().astype(np.uint8))
    return result


def calibration(sure: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence and accuracy, by `BINS` bins."""
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, sure - right, minlength=BINS)
    return float(np.abs(gap).sum() / len(sure))


def packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def hits_of(run: dict, items: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(run["hit"]), np.uint8))[:items]


def nll_of(run: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(run["nll"]), np.float16).astype(float)


def said_of(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


# ------------------------------------------------------------------------- a variant of the study

TUNING_SEED = 1000
"""Of the runs that choose the learning rate; counted runs have the seeds 0, 1, 2 ..."""


def variant(
    run: Callable[[float, int, str], dict],
    rates: Sequence[float],
    seeds: int,
    better: Callable[[dict], float],
) -> dict[str, Any]:
    """`run(rate, seed, part)` with each rate, scored on "validation"; with the best, on "test"."""
    tried = {rate: run(rate, TUNING_SEED, "validation") for rate in rates}
    value = {rate: better(found) for rate, found in tried.items()}
    rate = max(rates, key=lambda r: value[r] if value[r] == value[r] else -np.inf)
    return {
        "rates": {str(r): {"exact": f["exact"], "nll": f["mean_nll"]} for r, f in tried.items()},
        "rate": rate,
        "runs": [run(rate, seed, "test") for seed in range(seeds)],
    }


def exactness(found: dict) -> float:
    return found["exact"]


def likelihood(found: dict) -> float:
    return -found["mean_nll"]
