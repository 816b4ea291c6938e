"""Runs a function in several processes that know each other, over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS = 2


def spawn(results: Callable[..., object], folder, ranks: int = RANKS) -> list:
    """`results(rank, group)` of every rank; importable, because processes are spawned."""
    torch.multiprocessing.spawn(_run, args=(results, str(folder), ranks), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run(rank: int, results: Callable[..., object], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    # what a launcher such as torchrun sets
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),  # a rank that waits for one that failed
    )
    torch.save(results(rank, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
