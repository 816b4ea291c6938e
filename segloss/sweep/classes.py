"""Which classes the sums of a sweep run over, and from where on an entry matters to a ranking.

N tokens, B samples, K classes present.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segloss.distributed import classes_over, reduce_over
from segloss.sweep.batch import Batch
from segloss.sweep.request import Request, Sweep


def class_index(target: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """The target as an index (N,): 0 where ignored.

    One that is out of range (only met on a GPU) is NaN in log_prob; as an index it stays inside.
    """
    return torch.where(valid, target, 0).clamp(0, num_classes - 1)


def class_ids(request: Request, batch: Batch) -> dict[str, Any]:
    """Which classes the sums run over, and where each token stands among them."""
    ids: dict[str, Any] = {}
    if not (request.prob_sums or request.rankings):
        return ids
    target = class_index(batch.target, batch.valid, batch.num_classes)
    ids["present"] = classes_over(target[batch.valid], batch.num_classes, batch.group)
    own = torch.searchsorted(ids["present"], target)
    ids["own"] = own.clamp(max=max(0, ids["present"].numel() - 1))
    if isinstance(request.classes, Tensor):
        ids["classes"] = request.classes
    else:
        ids["classes"] = ids["present"] if request.classes == "present" else None
    if request.per_sample:
        ids["sample"], ids["num_samples"] = batch.samples()
    else:
        ids["sample"] = torch.where(batch.valid, 0, -1)
    return ids


def smallest_error(error: Tensor, cell: Tensor, valid: Tensor, num_cells: int, group) -> Tensor:
    """`tau` (num_cells,): the least foreground error 1 - p_iy of each, inf for a cell without."""
    tau = error.new_full((num_cells,), torch.inf)
    if num_cells == 0:
        return tau
    cell = torch.where(valid, cell, 0)
    error = torch.where(valid, error, torch.inf)
    return reduce_over(tau.scatter_reduce(0, cell, error, "amin"), group, "min")


def thresholds(request: Request, batch: Batch, sweep: Sweep) -> Tensor:
    """(B, K') below which an entry matters to none of the requested rankings."""
    num_present = sweep.present.numel()
    error = -torch.expm1(sweep.log_prob)
    batch_tau = smallest_error(error, sweep.own, batch.valid, num_present, batch.group)
    sample_tau = batch_tau[None]
    if request.per_sample:
        cell = sweep.sample.clamp(min=0) * num_present + sweep.own
        num_cells = sweep.num_samples * num_present
        sample_tau = smallest_error(error, cell, batch.valid, num_cells, batch.group)
        sample_tau = sample_tau.view(sweep.num_samples, num_present)
    tau = torch.full_like(sample_tau, torch.inf)
    for per_sample, tolerance in request.rankings:
        own_tau = sample_tau if per_sample else batch_tau.expand_as(sample_tau)
        tau = torch.minimum(tau, own_tau.clamp(min=tolerance))
    return tau


def store_totals(sweep: Sweep, batch: Batch, prob_sum: Tensor | None, peak: Tensor | None) -> None:
    """Put the class sums (B, K_here) and the largest log p (B, W) of the columns here with those of
    the other ranks."""
    sharding, classes = batch.sharding, sweep.classes
    whole, parts = sharding.place(None), []
    if prob_sum is not None:
        size = batch.num_classes if classes is None else classes.numel()
        parts.append((prob_sum, sharding.place(classes), size))
    if peak is not None:
        finite = (peak.amax(0, keepdim=True) != -torch.inf).to(peak.dtype)
        parts += [(x, whole, batch.num_classes) for x in (peak.exp(), finite)]
    placed = iter(sharding.placed(parts))
    if prob_sum is not None:
        sweep.prob_sum = next(placed)
    if peak is not None:
        sweep.peak_prob = next(placed)
        sweep.finite = reduce_over(next(placed)[0], batch.group, "max") > 0


def group_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`out[index[i]] += values[i]` over a new (size,) tensor of zeros, the same bits every time."""
    if size == 0:
        return values[:0]  # still of the graph
    zeros = values.new_zeros(size)
    if values.is_cuda:  # index_add_ adds atomically there; the accumulating put sorts first
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)
