"""The entries of p that carry value or gradient in the Lovász-Softmax loss.

N rows, K classes looked at, B samples, M candidates. A row with sample -1 is not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .class_stats import panel_log_prob, panel_rows, tile_probabilities
from .common import Rows, exp_, jit, launcher, parallel, tl, use_triton


class Candidates(NamedTuple):
    """Triples, ordered by row and then by class."""

    row: Tensor  # (M,) int64
    class_index: Tensor  # (M,) int64 into `columns`
    prob: Tensor  # (M,)


@jit
def candidates_kernel(
    rows,  # KernelRows
    row_max,  # (N,)
    log_sum,  # (N,)
    sample_in,  # (N,)
    own_in,  # (N,) the row's own class as an index into `columns`
    columns_in,  # (K,)
    threshold,  # (B, K)
    count,  # (N,) written by the count pass, which has no `out`; bounds the write pass
    first,  # (N,) where a row's candidates start: read by the write pass
    out,  # Candidates
    K,
    BLOCK_K: tl.constexpr,
):
    """One program per row; the count pass and the write pass test the very same numbers."""
    row = tl.program_id(0)
    sample = tl.load(sample_in + row)
    own = tl.load(own_in + row)
    at = tl.full((), 0, tl.int64) if out is None else tl.load(first + row)
    # logits that change between the passes must not lead a write astray
    end = at if out is None else at + tl.load(count + row)
    if sample >= 0:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < K
            columns = tl.load(columns_in + k, mask=inside, other=0)
            p = tile_probabilities(rows, row_max, log_sum, row, columns, inside)
            tau = tl.load(threshold + sample * K + k, mask=inside, other=float("inf"))
            chosen = (p > tau) & (k != own)
            hits = chosen.to(tl.int32)
            if out is not None:
                place = at + tl.cumsum(hits, axis=0) - 1
                fits = chosen & (place < end)
                tl.store(out.row + place, tl.full((BLOCK_K,), row, tl.int64), mask=fits)
                tl.store(out.class_index + place, k.to(tl.int64), mask=fits)
                tl.store(out.prob + place, p, mask=fits)
            at += tl.sum(hits, axis=0)
    if out is None:
        tl.store(count + row, at)


@launcher
def candidates_triton(rows, row_max, log_sum, columns, sample, own, threshold) -> Candidates:
    def launch(count, first, out):
        candidates_kernel[(rows.num_rows,)](
            rows.for_kernel(),
            row_max,
            log_sum,
            sample,
            own,
            columns,
            threshold,
            count,
            first,
            out,
            columns.numel(),
            BLOCK_K=256 if rows.dtype == torch.float64 else 512,
            num_warps=4,
        )

    count = rows.new(rows.num_rows, dtype=torch.int64)
    launch(count, None, None)
    total = count.cumsum(0)
    num = int(total[-1])
    out = Candidates(
        rows.new(num, dtype=torch.int64), rows.new(num, dtype=torch.int64), rows.new(num)
    )
    if num:
        launch(count, total - count, out)
    return out


def candidates_torch(rows, row_max, log_sum, columns, sample, own, threshold) -> Candidates:
    def work(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = exp_(panel_log_prob(rows, row_max, log_sum, columns, part))
        tau = threshold if threshold.shape[0] == 1 else threshold[sample[part]]
        chosen = p > tau
        mine = own[part]
        here = (mine >= 0).nonzero()[:, 0]
        chosen[here, mine[here]] = False
        place = chosen.view(-1).nonzero()[:, 0]
        r, k = place // columns.numel(), place % columns.numel()
        return part[r], k, p.view(-1)[place]

    found = parallel(work, panel_rows(sample >= 0, columns.numel()))
    return Candidates(*(torch.cat(column) for column in zip(*found, strict=True)))


def candidates(
    rows: Rows,
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    columns: Tensor,  # (K,) int64
    sample: Tensor,  # (N,) int64 in -1 .. B - 1
    own: Tensor,  # (N,) int64 in 0 .. K - 1, -1 for none of the columns
    threshold: Tensor,  # (B, K), inf for a class to leave out
) -> Candidates:
    """All `(i, k, p_ik)` with `p_ik > threshold[sample_i, k]` and k not the row's own class.

    Counted first, then written into buffers of exactly that size: nothing is ever dropped.
    """
    if rows.num_rows == 0 or columns.numel() == 0 or not bool((sample >= 0).any()):
        empty = rows.new(0, dtype=torch.int64)
        return Candidates(empty, empty, rows.new(0))
    run = candidates_triton if use_triton(rows.data) else candidates_torch
    return run(rows, row_max, log_sum, columns, sample, own, threshold.contiguous())
