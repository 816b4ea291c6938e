"""Lovász-Softmax from the few entries of p that matter.

N tokens, B samples, K classes present, M candidates (entries above their class's least foreground
error). A group is a class, or a (sample, class) pair with `per_sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segloss.checks import check_number
from segloss.distributed import concatenate_over, lists_over
from segloss.kernels.common import cdiv, parallel
from segloss.losses.region import ClassLoss
from segloss.sweep.batch import Batch
from segloss.sweep.classes import group_sum
from segloss.sweep.request import Request, Sweep

__all__ = ["LovaszSoftmaxLoss"]

# Entries sorted at a time: a saturated foreground token makes all its class's rows candidates, and
# sorting takes some ten numbers per entry.
SORT_ENTRIES = 1 << 24
# Values of a running sum that are added up in one go on a GPU; a power of two.
SCAN = 1024


def descending_in_groups(error: Tensor, group: Tensor) -> Tensor:
    """Indices (E,) that sort by group, and by descending error within it."""
    if error.dtype == torch.float32:
        # one sort of integers: the bits of floats >= 0 (not -0.0) are ordered as the floats are
        bits = (error + 0.0).view(torch.int32).long()
        return torch.argsort((group << 32) | (0x7FFFFFFF - bits), stable=True)
    order = torch.argsort(error, descending=True, stable=True)
    return order[torch.argsort(group[order], stable=True)]


def running_sum(values: Tensor) -> Tensor:
    """`values.cumsum(0)` (E,), the same bits every time: a GPU's own depends on which of its blocks
    is ready first. Doubled distances within SCAN values, then the same over their totals."""
    if not values.is_cuda:
        return values.cumsum(0)
    parts = F.pad(values, (0, -values.numel() % SCAN)).view(-1, SCAN)
    for distance in (1 << k for k in range(SCAN.bit_length() - 1)):
        parts = parts + F.pad(parts[:, :-distance], (distance, 0))
    if parts.shape[0] > 1:
        parts[1:] += running_sum(parts[:, -1])[:-1, None]
    return parts.view(-1)[: values.numel()]


def lovasz_weights(
    error: Tensor,  # (E,)
    group: Tensor,  # (E,) int64
    foreground: Tensor,  # (E,) bool
    weight: Tensor,  # (E,) how often the entry is listed
    num_groups: int,
) -> Tensor:
    """What each entry's error is multiplied by in its group's loss (E,), float64.

    In descending order of error, after foreground weight P and background weight B including the
    entry itself, with M the group's foreground weight: foreground `w / (M + B)`, background
    `w (M - P) / ((M + B - w) (M + B))`.
    """
    order = descending_in_groups(error, group)
    group, foreground = group[order], foreground[order]
    weight = weight[order].double()
    own = torch.where(foreground, weight, 0)
    seen = running_sum(own)  # over all groups so far: the earlier groups' part is taken off
    seen_other = running_sum(weight - own)
    first = torch.searchsorted(group, torch.arange(num_groups + 1, device=group.device))
    seen_before = torch.cat([seen.new_zeros(1), seen])[first]
    other_before = torch.cat([seen.new_zeros(1), seen_other])[first]
    total = seen_before.diff()[group]
    p = seen - seen_before[group]
    b = seen_other - other_before[group]
    left = total - p  # rounding may take it below 0; a group without foreground has none
    background = weight * left / ((total + b - weight) * (total + b))
    result = torch.where(foreground, weight / (total + b), torch.where(left > 0, background, 0))
    return torch.empty_like(result).index_copy_(0, order, result)


def weights_in_parts(error, group, foreground, weight, num_groups: int) -> Tensor:
    """`lovasz_weights` of ranges of groups: one per thread on a CPU, SORT_ENTRIES on a GPU."""
    entries = error.numel()
    threads = 1 if error.is_cuda or entries < 1 << 14 else torch.get_num_threads()
    per_part = min(SORT_ENTRIES, cdiv(entries, threads))
    if entries <= per_part:
        return lovasz_weights(error, group, foreground, weight, num_groups)
    filled = torch.bincount(group, minlength=num_groups).cumsum(0)
    # cut where a part is full; a group is never split
    part_of_group = (filled - 1).clamp(min=0) // per_part
    starts = torch.searchsorted(part_of_group, torch.unique(part_of_group)).tolist()
    result = torch.empty(entries, dtype=torch.float64, device=error.device)

    def work(span: tuple[int, int]) -> None:
        first, last = span
        here = ((group >= first) & (group < last)).nonzero()[:, 0]
        result[here] = lovasz_weights(
            error[here], group[here] - first, foreground[here], weight[here], last - first
        )

    parallel(work, list(zip(starts, [*starts[1:], num_groups], strict=True)))
    return result


class LovaszSoftmaxLoss(ClassLoss, function="lovasz_softmax", short="lovasz"):
    """Lovász-Softmax: the convex surrogate of one minus the Jaccard index, mean over classes.

        p = torch.softmax(logits.float(), -1)                      # for each class c present:
        fg = (target == c).float()
        error, order = (fg - p[:, c]).abs().sort(descending=True)
        fg = fg[order]
        jaccard = 1 - (fg.sum() - fg.cumsum(0)) / (fg.sum() + (1 - fg).cumsum(0))
        loss_c = error @ jaccard.diff(prepend=jaccard.new_zeros(1))

    Exact, though only entries with `p_ic` above the class's least foreground error are looked at:
    all others carry neither value nor gradient.

    Args:
        classes: "present", or "all": an absent class then adds its largest probability.
        per_sample: the loss of each sample, then the mean over samples.
        tolerance: entries below it may be left out; the value of a class moves by no more than it.
        weight: (V,) class weights of the mean over classes, or None.
        reduction: over samples if `per_sample`, else over classes.

    Alone it learns slowly from scratch; it is meant for fine-tuning, or beside cross-entropy.
    The value of a batch is not the mean of the values of its parts.
    Source: Berman et al., arXiv 1705.08790, algorithm 1 and eq. 11.
    """

    def __init__(
        self,
        classes: str = "present",
        per_sample: bool = False,
        tolerance: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(classes, per_sample, weight, ignore_index, reduction, group)
        self.tolerance = check_number("tolerance", tolerance, 0, 1)

    def request(self) -> Request:
        return Request(
            rankings=frozenset({(self.per_sample, self.tolerance)}),
            per_sample=self.per_sample,
            peaks=self.classes == "all",
        )

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        num_present = sweep.present.numel()
        num_samples = sweep.num_samples if self.per_sample else 1
        sample = sweep.sample.clamp(min=0) if self.per_sample else torch.zeros_like(sweep.sample)
        dtype = sweep.log_prob.dtype

        # every valid token is a foreground entry of its own class, which the rank that has the
        # class's column sorts
        token = (batch.valid & batch.sharding.holds(sweep.target)).nonzero()[:, 0]
        row = sweep.candidate_row
        weights = batch.weights()
        log_prob = batch.sharding.divided(sweep.log_prob)
        lists = (
            -torch.expm1(log_prob[token]),
            sweep.candidate_prob,
            weights[token],
            weights[row],
            sample[token] * num_present + sweep.own[token],
            sample[row] * num_present + sweep.candidate_class,
        )
        miss, prob, *rest = lists_over(lists, batch.group)
        error, weight, group = torch.cat([miss, prob]), torch.cat(rest[:2]), torch.cat(rest[2:])
        foreground = torch.arange(error.numel(), device=error.device) < miss.numel()

        num_groups = num_samples * num_present
        with torch.no_grad():
            share = weights_in_parts(error, group, foreground, weight, num_groups).to(dtype)
            counts = group_sum(torch.where(foreground, weight, 0), group, num_groups)
            occurs = batch.sharding.sum(counts) > 0
        value = batch.sharding.joined(group_sum(share * error, group, num_groups))
        value = value.view(num_samples, num_present)
        occurs = occurs.view(num_samples, num_present)
        occupied = occurs.any(-1)
        ids = sweep.present
        if self.classes == "all":
            value, occurs, ids = self.with_absent(sweep, batch, value, occurs), None, None
            occurs = sweep.finite & occupied[:, None]
        class_weight = self.class_weight(ids, occurs, dtype)
        return self.reduce_classes(value, class_weight, occupied, batch, normalizer)

    def with_absent(self, sweep: Sweep, batch: Batch, value: Tensor, occurs: Tensor) -> Tensor:
        """Values of all classes (B, V): an absent one's is its largest probability."""
        peak = sweep.peak_prob if self.per_sample else sweep.peak_prob.amax(0, keepdim=True)
        if batch.group is not None:
            peak = concatenate_over(peak[None], batch.group).amax(0)
        full = torch.zeros_like(peak).index_copy(1, sweep.present, value)
        present = torch.zeros_like(peak, dtype=torch.bool)
        present = present.index_copy(1, sweep.present, occurs)
        return torch.where(present, full, peak)
