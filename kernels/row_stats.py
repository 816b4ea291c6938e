"""One read of the logits: maximum, log-sum-exp, target log-probability and more, per row.

N rows, V columns. A row whose target is `ignore_index` is never read; all its statistics are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    BLOCK_BYTES,
    EXPONENT_UNIT,
    LOG2E,
    Block,
    Rows,
    bounds,
    exp_,
    exponentials,
    jit,
    launcher,
    load_logits,
    parallel,
    rounds_once,
    row_offset,
    row_tile,
    tile_columns,
    tl,
    use_triton,
)

# sum of exponentials relative to the target's above which the maximum is too far from it
FAR = 2.0**60
LOWEST = -3.4028234663852886e38 if tl is None else tl.constexpr(-3.4028234663852886e38)


class RowStats(NamedTuple):
    """Per-row statistics, all (N,); `lse = row_max + log_sum`.

    The maximum and the logarithm of the rest are kept apart: their rounded sum would cost the small
    `nll` of a confident row its digits. Where nothing else is asked for, a CPU takes the target's
    logit for the maximum.
    """

    row_max: Tensor
    log_sum: Tensor
    log_prob: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None  # int64, -1 at ignored rows
    logit_sum: Tensor | None = None  # sum_j w_j z_ij over the row's columns with a finite logit
    weight_sum: Tensor | None = None  # sum_j w_j over the same columns
    num_finite: Tensor | None = None  # how many they are
    exp_scale: Tensor | None = None  # with `exp_out`: that times it is p


@jit
def online_softmax(z, row_max, exp_sum):
    """Fold a tile (L, G) into each line's running maximum and sum (L,)."""
    new_max = tl.maximum(row_max, tl.max(z, axis=1))
    # a line that starts with -inf has no maximum yet: the floor keeps -inf - -inf out of exponents
    base = tl.maximum(new_max, LOWEST)
    rescale = tl.exp2((row_max - base) * LOG2E)
    exp_z = tl.exp2((z - base[:, None]) * LOG2E)
    return new_max, base, rescale, exp_z, exp_sum * rescale + tl.sum(exp_z, axis=1)


@jit
def row_stats_kernel(
    rows,  # KernelRows
    target,  # (N,)
    column_weight,  # (V,), None for ones
    out,  # RowStats
    ignore_index,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row, one online sweep over its V columns.

    Every line of a tile keeps sums of its own, relative to a maximum of its own: within the loop no
    thread waits for another.
    """
    row = tl.program_id(0)
    V = rows.V
    y = tl.load(target + row).to(tl.int64)
    if y == ignore_index:
        zero = tl.zeros((), rows.dtype)
        tl.store(out.row_max + row, zero)
        tl.store(out.log_sum + row, zero)
        tl.store(out.log_prob + row, zero)
        if out.entropy is not None:
            tl.store(out.entropy + row, zero)
        if out.argmax is not None:
            tl.store(out.argmax + row, tl.full((), -1, tl.int64))
        if out.logit_sum is not None:
            tl.store(out.logit_sum + row, zero)
            tl.store(out.weight_sum + row, zero)
            tl.store(out.num_finite + row, zero)
        return

    start = rows.logits + row_offset(rows, row)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    LINES: tl.constexpr = BLOCK_V // GROUP
    line_max = tl.full((LINES,), float("-inf"), rows.dtype)
    exp_sum = tl.zeros((LINES,), rows.dtype)
    weighted_sum = tl.zeros((LINES,), rows.dtype)  # sum_j exp(z_j - max) (z_j - max)
    best = tl.zeros((LINES,), tl.int32)
    logit_sum = tl.zeros((LINES,), rows.dtype)
    weight_sum = tl.zeros((LINES,), rows.dtype)
    num_finite = tl.zeros((LINES,), rows.dtype)
    tile = tile_columns(ALIGNED, GROUP, BLOCK_V)
    # whole tiles, which need no mask, then the rest of the row; in float64 all in one loop, whose
    # code is long enough
    ONE_LOOP: tl.constexpr = 1 if rows.dtype == tl.float64 else 0
    whole = 0 if ONE_LOOP else V // BLOCK_V * BLOCK_V
    for REST in tl.static_range(ONE_LOOP, 2):
        for first in range(whole if REST else 0, V if REST else whole, BLOCK_V):
            columns = first + tile
            inside = columns < V if REST else None
            pointers = start + columns.to(tl.int64) * rows.stride_v
            z = load_logits(rows, pointers, inside)
            old_max = line_max
            line_max, base, rescale, exp_z, exp_sum_new = online_softmax(z, line_max, exp_sum)
            if out.entropy is not None:
                shift = tl.where(old_max == float("-inf"), 0.0, old_max - base)
                # the floor makes p log p = 0 at p = 0
                terms = exp_z * tl.maximum(z - base[:, None], -1e4)
                weighted_sum = (weighted_sum + exp_sum * shift) * rescale + tl.sum(terms, axis=1)
            exp_sum = exp_sum_new
            if out.argmax is not None:
                here = tl.min(tl.where(z == line_max[:, None], columns, V), axis=1)
                best = tl.where((line_max > old_max) & (here < V), here, best)
            if out.logit_sum is not None:
                finite = z > float("-inf")
                w = 1.0
                if column_weight is not None:
                    w = tl.load(column_weight + columns, mask=inside).to(rows.dtype)
                    weight_sum += tl.sum(tl.where(finite, w, 0.0), axis=1)
                logit_sum += tl.sum(tl.where(finite, w * z, 0.0), axis=1)
                num_finite += tl.sum(tl.where(finite, 1.0, 0.0), axis=1)

    row_max = tl.max(line_max, axis=0)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    rescale = tl.exp2((line_max - base) * LOG2E)
    total = tl.sum(exp_sum * rescale, axis=0)
    log_sum = tl.log(total)
    # never a stray read: a target outside the classes makes the row's log-probability NaN
    known = (y >= 0) & (y < V)
    z_y = load_logits(rows, start + y * rows.stride_v, known)
    log_prob = tl.where(known, z_y - base - log_sum, float("nan"))
    tl.store(out.row_max + row, base)
    tl.store(out.log_sum + row, log_sum)
    tl.store(out.log_prob + row, log_prob)
    if out.entropy is not None:
        shift = tl.where(line_max == float("-inf"), 0.0, line_max - base)
        weighted_total = tl.sum((weighted_sum + exp_sum * shift) * rescale, axis=0)
        tl.store(out.entropy + row, log_sum - weighted_total / total)
    if out.argmax is not None:
        first_best = tl.min(tl.where(line_max == row_max, best, V), axis=0)
        tl.store(out.argmax + row, first_best.to(tl.int64))
    if out.logit_sum is not None:
        count = tl.sum(num_finite, axis=0)
        tl.store(out.logit_sum + row, tl.sum(logit_sum, axis=0))
        total_weight = count if column_weight is None else tl.sum(weight_sum, axis=0)
        tl.store(out.weight_sum + row, total_weight)
        tl.store(out.num_finite + row, count)


def stats_tile(rows: Rows, stats: RowStats) -> dict[str, int]:
    """`row_tile`; half of it where every statistic is asked for, whose sums take the registers."""
    everything = stats.entropy is not None and stats.logit_sum is not None
    return row_tile(rows, halved=everything)


@launcher
def row_stats_triton(
    rows: Rows,
    target: Tensor,  # (N,)
    ignore_index: int,
    stats: RowStats,
    column_weight: Tensor | None,  # (V,)
) -> None:
    row_stats_kernel[(rows.num_rows,)](
        rows.for_kernel(),
        target,
        column_weight,
        stats,
        ignore_index,
        ALIGNED=rows.aligned,
        GROUP=16 // rows.data.element_size(),
        **stats_tile(rows, stats),
    )


def multiplies(rows: Rows, stats: RowStats) -> bool:
    """Whether the twin takes exponents in one pass: nothing else asks for `z - max`."""
    return stats.entropy is None and rows.dtype == torch.float32 and rounds_once()


def row_stats_torch(
    rows: Rows,
    target: Tensor,  # (N,)
    ignore_index: int,
    stats: RowStats,
    column_weight: Tensor | None,  # (V,)
    exp_out: Tensor | None = None,  # (N, V)
) -> None:
    valid = target != ignore_index
    y = target.clamp(0, rows.num_classes - 1)
    every_row = torch.arange(rows.num_rows, device=target.device)
    z_y = rows.at(every_row, y)  # before exp_out is written over the logits
    blocks = rows.blocks()
    valid_before = bounds(valid.nonzero()[:, 0], blocks)

    def work(group: list[Block]) -> None:
        buffer = rows.new(max(last - first for first, last, _ in group), rows.num_classes)
        for first, last, raw in group:
            if valid_before[first] < valid_before[last]:
                here = slice(first, last)
                block_stats(rows, raw, buffer, here, stats, column_weight, exp_out)

    sums_alone = exp_out is None and all(out is None for out in stats[3:])
    if sums_alone and multiplies(rows, stats) and bool((y == target)[valid].all()):
        sums_from_target(rows, z_y, blocks, valid_before, stats)
    else:
        parallel(work, blocks)
    # so far log_sum holds the sum itself, entropy sum_j exp(z_j - max) (z_j - max): what is left is
    # arithmetic on vectors, done once for all rows
    total, log_sum = stats.log_sum.clone(), stats.log_sum.log_()
    torch.sub(z_y - stats.row_max, log_sum, out=stats.log_prob)
    stats.log_prob.masked_fill_(y != target, torch.nan)  # as the kernel
    if stats.entropy is not None:
        torch.sub(log_sum, stats.entropy / total, out=stats.entropy)
    for out in stats:
        if out is not None:
            out.masked_fill_(~valid, -1 if out is stats.argmax else 0)
    if exp_out is not None:
        here = (y == target).nonzero()[:, 0]  # a target elsewhere has no column to clear
        exp_out[here, y[here]] = 0
        exp_out[(~valid).nonzero()[:, 0]] = 0  # by index: a mask would pass over the whole


def sums_from_target(
    rows: Rows,
    z_y: Tensor,  # (N,)
    blocks: list[list[Block]],
    valid_before: dict[int, int],
    stats: RowStats,
) -> None:
    """Sums of exponentials relative to the target's logit z_y: a pass less than relative to
    the maximum, and the same where p is near 1.

    Where the maximum is so far above that float32's range might not do, the row is read again.
    """
    total = stats.log_sum.fill_(1)
    shift = stats.row_max.copy_(z_y)[:, None] * -EXPONENT_UNIT

    def work(group: list[Block]) -> None:
        buffer = rows.new(max(last - first for first, last, _ in group), rows.num_classes)
        for first, last, raw in group:
            if valid_before[first] < valid_before[last]:
                place = buffer[: last - first]
                exp_z = exponentials(rows.load(raw, place), shift[first:last], place)
                torch.sum(exp_z, -1, out=total[first:last])

    def from_maximum(some: Tensor) -> None:
        raw = rows.data[some // rows.data.shape[1], some % rows.data.shape[1]]
        part = RowStats(*(rows.new(some.numel()) for _ in range(3)))
        block_stats(rows, raw, rows.new(*raw.shape), slice(None), part, None, None)
        stats.row_max[some], total[some] = part.row_max, part.log_sum

    parallel(work, blocks)
    # the rounding of the shift is one factor of the whole row, which the target's own 1 tells
    at_target = exponentials(z_y[:, None], shift, torch.empty_like(shift))
    total.div_(at_target[:, 0]).clamp_(min=1)
    far = (~(total < FAR)).nonzero()[:, 0]
    parallel(from_maximum, far.split(max(1, BLOCK_BYTES // (4 * rows.num_classes))))


def block_stats(
    rows: Rows,
    raw: Tensor,  # (R, V)
    buffer: Tensor,  # (>= R, V)
    here: slice,
    stats: RowStats,
    column_weight: Tensor | None,  # (V,)
    exp_out: Tensor | None,  # (N, V)
) -> None:
    """The passes over one block; each operation counts, so that nothing per row is done here."""
    if exp_out is not None and exp_out.dtype == rows.dtype:
        buffer = exp_out[here]
    z = rows.load(raw, buffer)
    row_max = torch.amax(z, -1, out=stats.row_max[here])
    nothing = row_max == -torch.inf
    row_max.masked_fill_(nothing, 0)
    if stats.argmax is not None:
        torch.argmax(z, -1, out=stats.argmax[here])
    if stats.logit_sum is not None:
        finite = z > -torch.inf
        kept = torch.where(finite, z, 0)
        stats.num_finite[here] = finite.sum(-1)
        if column_weight is None:
            stats.logit_sum[here] = kept.sum(-1)
            stats.weight_sum[here] = stats.num_finite[here]
        else:
            w = column_weight.to(z.dtype)
            stats.logit_sum[here] = kept @ w
            stats.weight_sum[here] = finite.to(z.dtype) @ w
    slope = rows.slope(z) if exp_out is not None else 1.0
    floored, place = None, buffer[: z.shape[0]]
    if multiplies(rows, stats):
        # the rounding of the shift is one factor of the whole row, which the maximum's 1 tells
        shift = row_max[:, None] * -EXPONENT_UNIT
        at_max = exponentials(row_max[:, None], shift, torch.empty_like(shift))
        exp_z = exponentials(z, shift, place)
        total = torch.sum(exp_z, -1, out=stats.log_sum[here])
        total.div_(at_max[:, 0]).clamp_(min=1).masked_fill_(nothing, 0)
    else:
        shifted = torch.sub(z, row_max[:, None], out=place)
        # the floor makes p log p = 0 at p = 0
        floored = shifted.clamp(min=-1e4) if stats.entropy is not None else None
        exp_z = exp_(shifted)
        torch.sum(exp_z, -1, out=stats.log_sum[here])
    if floored is not None:
        torch.sum(floored.mul_(exp_z), -1, out=stats.entropy[here])
    if exp_out is not None:
        if not (isinstance(slope, float) and slope == 1):
            exp_z.mul_(slope)
        if exp_z.data_ptr() != exp_out[here].data_ptr():
            exp_out[here] = exp_z


def row_stats(
    rows: Rows,
    target: Tensor,  # (N,) int64
    ignore_index: int,
    *,
    entropy: bool = False,
    argmax: bool = False,
    column_sums: bool = False,
    column_weight: Tensor | None = None,  # (V,)
    exp_out: Tensor | None = None,  # (N, V), not on a GPU
) -> RowStats:
    """`torch.log_softmax(z, -1)` reduced to one number per row and statistic.

    `exp_out`, maybe the memory of the logits, gets `exp(z - row_max)` times the transform's slope,
    0 at the target and in ignored rows, so that one exponential serves statistics and gradient.
    A target outside the columns gives NaN in `log_prob` and leaves the rest as it is; without any
    column `log_sum` is -inf.

    Outputs have the compute dtype (float32, or float64 for float64 logits).
    """
    n = rows.num_rows
    stats = RowStats(
        rows.new(n),
        rows.new(n),
        rows.new(n),
        rows.new(n) if entropy else None,
        rows.new(n, dtype=torch.int64) if argmax else None,
        *((rows.new(n), rows.new(n), rows.new(n)) if column_sums else (None, None, None)),
    )
    if n and rows.num_classes == 0:
        for out, value in zip(stats, (0, -torch.inf, torch.nan), strict=False):
            out.fill_(value)
        for out in stats[3:]:
            if out is not None:
                out.zero_()
    elif n:
        if use_triton(rows.data) and exp_out is None:
            row_stats_triton(rows, target, ignore_index, stats, column_weight)
        else:
            row_stats_torch(rows, target, ignore_index, stats, column_weight, exp_out)
    return stats if exp_out is None else stats._replace(exp_scale=torch.exp(-stats.log_sum))
