"""What crosses ranks when tokens are sharded over a process group: sums, unions, lists.

Every rank ends with the same global loss, so the gradient of each collective is the identity on the
rank's own part: no collective runs in backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = "dist.ProcessGroup"


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        sizes = gather_sizes(x.shape[0], x.device, group)
        parts = [x.new_empty((size, *x.shape[1:])) for size in sizes]
        longest = max(sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=group)
        rank = dist.get_rank(group)
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        parts = [part[:size] for part, size in zip(received, sizes, strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.own], None


def gather_sizes(size: int, device: torch.device, group) -> list[int]:
    own = torch.tensor([size], device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    return [int(s) for s in sizes]


def sum_over(x: Tensor, group) -> Tensor:
    """The sum of x over the ranks; x itself without a group."""
    return x if group is None else _Sum.apply(x, group)


def concatenate_over(x: Tensor, group) -> Tensor:
    """x (n, ...) of every rank one after the other, n may differ; x itself without a group."""
    return x if group is None else _Concatenate.apply(x, group)


def reduce_over(x: Tensor, group, op: str) -> Tensor:
    """Element-wise "min" or "max" of x over the ranks, without gradient."""
    if group is None:
        return x
    total = x.clone()
    dist.all_reduce(total, {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op], group=group)
    return total


def union_over(ids: Tensor, group) -> Tensor:
    """Sorted distinct values of ids (n,) over all ranks."""
    return torch.unique(concatenate_over(ids, group))
