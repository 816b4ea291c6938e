"""Probabilities summed per class, and the sums' way back to the rows. Deterministic: no atomics.

N rows, V columns, K classes looked at (all V, or the columns listed), B samples.
A row with sample -1 is not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import (
    LOG2E,
    Rows,
    cdiv,
    exp_,
    jit,
    launcher,
    load_logits,
    parallel,
    row_offset,
    tl,
    use_triton,
)

# how many programs share the rows of a class block: enough for a GPU, few partial sums
SLABS = 64
# float32 bytes of a panel of gathered columns in the torch twins
PANEL_BYTES = 1 << 18
# sums of panels that wait to be added up: all of them would take as much as the logits
PARTIAL_SUMS = 16


@jit
def tile_probabilities(
    rows,  # KernelRows
    row_max,  # (N,)
    log_sum,  # (N,)
    row,  # (R, 1)
    columns,  # (1, C)
    inside,  # (R, C)
):
    """`exp(z - lse)` on a tile of rows and columns, 0 outside."""
    pointers = rows.logits + row_offset(rows, row) + columns.to(tl.int64) * rows.stride_v
    z = load_logits(rows, pointers, inside)
    # the row's numbers are read through the tile's mask: lanes outside must not poison the sum
    base = tl.load(row_max + row)
    rest = tl.load(log_sum + row)
    return tl.where(inside, tl.exp2((z - base - rest) * LOG2E), 0.0)


@jit
def class_sums_kernel(
    rows,  # KernelRows
    row_max,  # (N,)
    log_sum,  # (N,)
    row_weight,  # (N,), None for ones
    order,  # (N,) rows sorted by sample
    first_row,  # (B + 1,) where each sample starts in `order`
    columns_in,  # (K,), None for all V
    out,  # (SLABS, B, K)
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (class block, sample, slab of the sample's rows)."""
    sample = tl.program_id(1)
    slab = tl.program_id(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = k if columns_in is None else tl.load(columns_in + k, mask=k < K, other=0)
    begin = tl.load(first_row + sample)
    end = tl.load(first_row + sample + 1)
    share = tl.cdiv(end - begin, tl.num_programs(2))
    begin += slab * share
    end = tl.minimum(end, begin + share)
    total = tl.zeros((BLOCK_K,), rows.dtype)
    for at in range(begin, end, BLOCK_R):
        place = at + tl.arange(0, BLOCK_R)
        here = place < end
        row = tl.load(order + place, mask=here, other=0)
        inside = here[:, None] & (k < K)[None, :]
        p = tile_probabilities(rows, row_max, log_sum, row[:, None], columns[None, :], inside)
        if row_weight is not None:
            p *= tl.load(row_weight + row, mask=here, other=0.0)[:, None]
        total += tl.sum(p, axis=0)
    place = (slab * tl.num_programs(1) + sample).to(tl.int64) * K + k
    tl.store(out + place, total, mask=k < K)


@launcher
def class_sums_triton(rows, row_max, log_sum, columns, sample, num_samples, row_weight):
    order = torch.argsort(sample, stable=True)
    ids = torch.arange(num_samples + 1, device=sample.device)
    first_row = torch.searchsorted(sample[order], ids)
    num_columns = rows.num_classes if columns is None else columns.numel()
    slabs = max(1, min(SLABS, cdiv(rows.num_rows, 16)) // num_samples)
    out = rows.new(slabs, num_samples, num_columns)
    block = 64
    class_sums_kernel[(cdiv(num_columns, block), num_samples, slabs)](
        rows.for_kernel(),
        row_max,
        log_sum,
        row_weight,
        order,
        first_row,
        columns,
        out,
        num_columns,
        BLOCK_R=16,
        BLOCK_K=block,
        num_warps=8 if rows.dtype == torch.float64 else 4,
    )
    return out.sum(0)


def panel_rows(keep: Tensor, num_columns: int) -> list[Tensor]:
    """The kept rows in parts (R,), each a panel of a few MiB: the same split on any machine."""
    kept = keep.nonzero()[:, 0]
    step = max(1, PANEL_BYTES // (4 * max(1, num_columns)))
    return list(kept.split(step)) if kept.numel() else []


def panel_log_prob(rows: Rows, row_max, log_sum, columns, part: Tensor) -> Tensor:
    """log p (R, K) of the rows of a part."""
    z = rows.panel(part, columns)  # a gathered copy, ours to overwrite
    return z.sub_(row_max[part, None]).sub_(log_sum[part, None])


def class_sums_torch(rows, row_max, log_sum, columns, sample, num_samples, row_weight):
    num_columns = rows.num_classes if columns is None else columns.numel()

    def work(part: Tensor) -> tuple[Tensor, Tensor]:
        p = exp_(panel_log_prob(rows, row_max, log_sum, columns, part))
        if row_weight is not None:
            p.mul_(row_weight[part, None])
        if num_samples == 1:
            return torch.zeros_like(part[:1]), p.sum(0, keepdim=True)
        ids, index = torch.unique(sample[part], return_inverse=True)
        return ids, p.new_zeros(ids.numel(), num_columns).index_add_(0, index, p)

    total = rows.new(num_samples, num_columns).zero_()
    parts = panel_rows(sample >= 0, num_columns)
    for first in range(0, len(parts), PARTIAL_SUMS):
        for ids, partial in parallel(work, parts[first : first + PARTIAL_SUMS]):
            total[ids] += partial
    return total


def class_sums(
    rows: Rows,
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    columns: Tensor | None,  # (K,) int64, sorted; None for all V
    sample: Tensor,  # (N,) int64 in -1 .. B - 1
    num_samples: int,
    row_weight: Tensor | None = None,  # (N,)
) -> Tensor:
    """`prob_sum[b, k] = sum_{i in sample b} row_weight_i * p[i, columns[k]]`, shape (B, K)."""
    num_columns = rows.num_classes if columns is None else columns.numel()
    if rows.num_rows == 0 or num_samples == 0 or num_columns == 0:
        return rows.new(num_samples, num_columns).zero_()
    run = class_sums_triton if use_triton(rows.data) else class_sums_torch
    return run(rows, row_max, log_sum, columns, sample, num_samples, row_weight)


# ------------------------------------------------------------------------- the way back to rows


@jit
def row_dots_kernel(
    rows,  # KernelRows
    row_max,  # (N,)
    log_sum,  # (N,)
    sample_in,  # (N,)
    columns_in,  # (K,), None for all V
    class_grad,  # (B, K)
    out,  # (N,)
    K,
    BLOCK_K: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    sample = tl.load(sample_in + row)
    total = tl.zeros((BLOCK_K,), rows.dtype)
    if sample >= 0:
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = k < K
            columns = k if columns_in is None else tl.load(columns_in + k, mask=inside, other=0)
            p = tile_probabilities(rows, row_max, log_sum, row, columns, inside)
            total += p * tl.load(class_grad + sample * K + k, mask=inside, other=0.0)
    tl.store(out + row, tl.sum(total, axis=0))


@launcher
def row_dots_triton(rows, row_max, log_sum, columns, sample, class_grad):
    out = rows.new(rows.num_rows)
    row_dots_kernel[(rows.num_rows,)](
        rows.for_kernel(),
        row_max,
        log_sum,
        sample,
        columns,
        class_grad.contiguous(),
        out,
        class_grad.shape[1],
        BLOCK_K=512,
        num_warps=4,
    )
    return out


def row_dots_torch(rows, row_max, log_sum, columns, sample, class_grad):
    out = rows.new(rows.num_rows).zero_()

    def work(part: Tensor) -> None:
        p = exp_(panel_log_prob(rows, row_max, log_sum, columns, part))
        if class_grad.shape[0] == 1:
            out[part] = p @ class_grad[0]
        else:
            out[part] = p.mul_(class_grad[sample[part]]).sum(-1)

    parallel(work, panel_rows(sample >= 0, class_grad.shape[1]))
    return out


def row_dots(
    rows: Rows,
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    columns: Tensor | None,  # (K,)
    sample: Tensor,  # (N,)
    class_grad: Tensor,  # (B, K)
) -> Tensor:
    """`s_i = sum_k p[i, columns[k]] * class_grad[sample_i, k]` (N,); 0 where sample is -1."""
    if rows.num_rows == 0 or class_grad.numel() == 0:
        return rows.new(rows.num_rows).zero_()
    run = row_dots_triton if use_triton(rows.data) else row_dots_torch
    return run(rows, row_max, log_sum, columns, sample, class_grad)


# ------------------------------------------------------------------------------ class maxima


@jit
def class_peaks_kernel(
    rows,  # KernelRows
    row_max,  # (N,)
    log_sum,  # (N,)
    order,  # (N,) rows sorted by sample
    first_row,  # (B + 1,)
    peak_out,  # (B, V)
    peak_row_out,  # (B, V)
    BLOCK_V: tl.constexpr,
):
    """One program per (column block, sample), a running maximum over the sample's rows."""
    sample = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < rows.V
    begin = tl.load(first_row + sample)
    end = tl.load(first_row + sample + 1)
    peak = tl.full((BLOCK_V,), float("-inf"), rows.dtype)
    peak_row = tl.full((BLOCK_V,), -1, tl.int64)
    for at in range(begin, end):
        row = tl.load(order + at)
        pointers = rows.logits + row_offset(rows, row) + columns.to(tl.int64) * rows.stride_v
        z = load_logits(rows, pointers, inside)
        log_p = z - tl.load(row_max + row) - tl.load(log_sum + row)
        # a NaN wins: it must reach the loss
        higher = (log_p > peak) | (log_p != log_p)
        peak = tl.where(higher, log_p, peak)
        peak_row = tl.where(higher, row.to(tl.int64), peak_row)
    place = sample.to(tl.int64) * rows.V + columns
    tl.store(peak_out + place, peak, mask=inside)
    tl.store(peak_row_out + place, peak_row, mask=inside)


@launcher
def class_peaks_triton(rows, row_max, log_sum, sample, num_samples):
    order = torch.argsort(sample, stable=True)
    ids = torch.arange(num_samples + 1, device=sample.device)
    first_row = torch.searchsorted(sample[order], ids)
    peak = rows.new(num_samples, rows.num_classes)
    peak_row = rows.new(num_samples, rows.num_classes, dtype=torch.int64)
    block = 256
    class_peaks_kernel[(cdiv(rows.num_classes, block), num_samples)](
        rows.for_kernel(),
        row_max,
        log_sum,
        order,
        first_row,
        peak,
        peak_row,
        BLOCK_V=block,
        num_warps=4,
    )
    return peak, peak_row


def class_peaks_torch(rows, row_max, log_sum, sample, num_samples):
    peak = rows.new(num_samples, rows.num_classes).fill_(-torch.inf)
    peak_row = rows.new(num_samples, rows.num_classes, dtype=torch.int64).fill_(-1)
    for b in range(num_samples):
        for part in panel_rows(sample == b, rows.num_classes):
            value, where = panel_log_prob(rows, row_max, log_sum, None, part).max(0)
            higher = (value > peak[b]) | value.isnan()
            peak[b] = torch.where(higher, value, peak[b])
            peak_row[b] = torch.where(higher, part[where], peak_row[b])
    return peak, peak_row


def class_peaks(
    rows: Rows,
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    sample: Tensor,  # (N,) int64 in -1 .. B - 1
    num_samples: int,
) -> tuple[Tensor, Tensor]:
    """Largest `log p[i, c]` of each class over a sample's rows, and its row: two of shape (B, V).

    -inf and row -1 for a column without a finite logit: this is also how such columns are found.
    """
    if rows.num_rows == 0 or num_samples == 0 or rows.num_classes == 0:
        shape = (num_samples, rows.num_classes)
        return (
            rows.new(*shape).fill_(-torch.inf),
            rows.new(*shape, dtype=torch.int64).fill_(-1),
        )
    run = class_peaks_triton if use_triton(rows.data) else class_peaks_torch
    return run(rows, row_max, log_sum, sample, num_samples)
