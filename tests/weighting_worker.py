"""What each process of the tests of weights over a group runs; importable, as it is spawned."""

from __future__ import annotations

import torch
from ranks import RANKS

import segloss

SCHEMES = ("irdro", "linupper", "rank")
FIRST = 3  # of 8 samples, how many rank 0 has


def validation():
    """(losses (RANKS, T, K), counts (RANKS, T, K)): some tasks are on one rank, some on none."""
    generator = torch.Generator().manual_seed(3)
    t = torch.arange(25, dtype=torch.float64)[:, None]
    losses = torch.exp(-t * torch.tensor([0.1, 0.03, 0.01]).double())
    shape = (RANKS, 25, 3)
    losses = losses * (1 + 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64))
    counts = torch.randint(0, 6, shape, generator=generator)
    counts[:, 0] += 1  # every task has its first loss on both ranks
    return losses, counts


def coba(mode, group=None):
    return segloss.CoBa(3, warmup=6, history=9, mode=mode, group=group)


def sample_loss():
    loss = torch.tensor([6.0, 2.1, 2.35, 2.6, 2.85, 3.1, 3.35, 3.6], dtype=torch.float64)
    loss[2] = torch.nan
    return loss


def tokens():
    num_tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    options = {
        "sample_weights": torch.arange(1, 9, dtype=torch.float64) / 36,
        "task_ids": torch.tensor([0, 1, 1, 0, 0, 1, 1, 1]),
        "task_weights": torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64),
    }
    return num_tokens, options


def shard(value, rank):
    return value[:FIRST] if rank == 0 else value[FIRST:]


def results(rank: int, group) -> dict:
    out = {}
    losses, counts = validation()
    for mode in ("paper", "published"):
        weighing = coba(mode, group)
        for row, count in zip(losses[rank], counts[rank], strict=True):
            weighing.update(torch.where(count > 0, row, torch.nan), counts=count)
        out["coba", mode] = weighing.weights()
    weighing = coba("paper", group)
    for row, count in zip(losses[rank], counts[rank], strict=True):
        weighing.update(torch.where(count > 0, row, torch.nan))
    out["coba", "no counts"] = weighing.weights()
    for scheme in SCHEMES:
        weighting = segloss.SampleWeighting(scheme, group=group)
        out["samples", scheme] = weighting(shard(sample_loss(), rank))
        out["effective", scheme] = weighting.effective_sample_size
    num_tokens, options = tokens()
    own = {k: v if k == "task_weights" else shard(v, rank) for k, v in options.items()}
    out["tokens"] = segloss.token_weights(shard(num_tokens, rank), **own, group=group)
    out["tokens", "mean"] = segloss.token_weights(shard(num_tokens, rank), group=group)
    return out
