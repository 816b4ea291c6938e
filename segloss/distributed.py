"""What crosses ranks when tokens are sharded over a process group: sums, unions, lists.

Every rank ends with the same global loss, so the gradient of each collective is the identity on the
rank's own part: no collective runs in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = "dist.ProcessGroup"


def as_group(group) -> Any:
    """The process group of a 1-D DeviceMesh; anything else as it is."""
    if not hasattr(group, "mesh_dim_names"):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} dimensions; it takes a process group or a 1-D "
            'mesh, such as mesh["dp"]'
        )
    return group.get_group()


def gathered(x: Tensor, group) -> Tensor:
    """x of every rank, stacked along a new first dimension; without a gradient."""
    size = dist.get_world_size(group)
    every = x.new_empty(size * x.numel())
    # torch 2.13 gave it a new name and warns of the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every, x.reshape(-1), group=group)
    return every.view(size, *x.shape)


def scattered_sum(x: Tensor, group) -> Tensor:
    """This rank's part of the first dimension of the ranks' sum; without a gradient."""
    own = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, x.contiguous(), group=group)
    return own


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Lists(torch.autograd.Function):
    """Several lists of every rank one after the other, sizes first, then all values at once."""

    @staticmethod
    def forward(ctx, group, *lists):
        own = torch.tensor([x.numel() for x in lists], device=lists[0].device)
        sizes = gathered(own, group).tolist()
        result: list = [None] * len(lists)
        for dtype in dict.fromkeys(x.dtype for x in lists):
            chosen = [i for i, x in enumerate(lists) if x.dtype == dtype]
            flat = torch.cat([lists[i] for i in chosen])
            longest = max(sum(rank[i] for i in chosen) for rank in sizes)
            padded = flat.new_zeros(longest)
            padded[: flat.numel()] = flat
            parts: list[list[Tensor]] = [[] for _ in chosen]
            for rank, values in zip(sizes, gathered(padded, group), strict=True):
                cut = values[: sum(rank[i] for i in chosen)].split([rank[i] for i in chosen])
                for part, value in zip(parts, cut, strict=True):
                    part.append(value)
            for i, part in zip(chosen, parts, strict=True):
                result[i] = torch.cat(part)
        rank = dist.get_rank(group)
        ctx.before = [sum(r[i] for r in sizes[:rank]) for i in range(len(lists))]
        ctx.sizes = sizes[rank]
        ctx.mark_non_differentiable(*(x for x in result if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    def backward(ctx, *grads):
        own = zip(grads, ctx.before, ctx.sizes, strict=True)
        return None, *(None if g is None else g[first : first + size] for g, first, size in own)


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


def lists_over(lists: Sequence[Tensor], group) -> Sequence[Tensor]:
    """`concatenate_over` of several lists (n_i,): one gather of their sizes, one per dtype."""
    return lists if group is None else _Lists.apply(group, *lists)


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


def classes_over(ids: Tensor, num_classes: int, group) -> Tensor:
    """`union_over` of class ids, by one reduction of a byte per class."""
    if group is None:
        return torch.unique(ids)
    occurs = torch.zeros(num_classes, dtype=torch.uint8, device=ids.device)
    occurs[ids] = 1
    dist.all_reduce(occurs, dist.ReduceOp.MAX, group=group)
    return occurs.nonzero()[:, 0]
