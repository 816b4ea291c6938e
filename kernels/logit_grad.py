"""The one backward: gradients of the row and class statistics back into the logits.

    dz_ij = p_ij (prob_coef_i + class_grad_[b_i]j + g_ij - h_i (log p_ij + H_i))
            + [j = y_i] v_i + t_i w_j + r_ij

N rows, V columns, K listed classes, B samples, M entries with a g or r of their own.
Three passes over less and less, each with the whole formula, so that an element is rounded once:
all N x V elements, then the K listed columns (class_grad), then the M entries (g, r).

At the target the terms -v p (part of prob_coef) and v nearly cancel as p -> 1; there the formula is
written p (prob_coef + v) + v (1 - p), with v (1 - p) from the row's accurate log-probability.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    EXPONENT_UNIT,
    LOG2E,
    Block,
    Rows,
    bounds,
    cdiv,
    exp_,
    exponentials,
    jit,
    launcher,
    load_logits,
    parallel,
    rounds_once,
    row_offset,
    row_tile,
    tl,
    use_triton,
)


@dataclass
class GradTerms:
    """What `dlogits` is made of; None leaves a term out. Ignored rows get 0 in any case."""

    valid: Tensor  # (N,) bool
    target: Tensor  # (N,) int64
    row_max: Tensor  # (N,)
    log_sum: Tensor  # (N,)
    prob_coef: Tensor  # (N,) dL/dlse_i - s_i
    target_coef: Tensor  # (N,) v, dL/dz_iy
    target_rest: Tensor  # (N,) v (1 - p_iy)
    entropy: Tensor | None = None  # (N,)
    entropy_grad: Tensor | None = None  # (N,)
    sum_grad: Tensor | None = None  # (N,) dL/dlogit_sum_i
    column_weight: Tensor | None = None  # (V,), None for ones
    sample: Tensor | None = None  # (N,) int64
    class_grad: Tensor | None = None  # (B, K), of dL/dprob_sum
    row_weight: Tensor | None = None  # (N,), what prob_sum weighted rows by
    columns: Tensor | None = None  # (K,) int64 sorted, None for all V
    entry_row: Tensor | None = None  # (M,) int64, ascending
    # (M,) int64 into `columns`, or a column if that is None; on a GPU, -1 is no entry
    entry_class: Tensor | None = None
    entry_grad: Tensor | None = None  # (M,)
    entry_rest: Tensor | None = None  # (M,) dL/dz_ij of the logit alone

    def for_kernel(self) -> KernelTerms:
        terms = KernelTerms(**vars(self))
        weight = None if self.sum_grad is None else self.column_weight
        return terms._replace(valid=self.valid.view(torch.uint8), column_weight=weight)


# `GradTerms` as a Triton kernel takes them: one argument, `terms.log_sum` and so on inside
KernelTerms = namedtuple("KernelTerms", [field.name for field in fields(GradTerms)])


class RowTerms(NamedTuple):
    """What a kernel has loaded of the terms for one row, or for a vector of them."""

    row_max: object
    log_sum: object
    prob_coef: object
    target_coef: object
    target_rest: object
    entropy: object
    entropy_grad: object
    sum_grad: object


@jit
def grad_tile(
    rows,  # KernelRows
    terms,  # KernelTerms: which there are
    of_row,  # RowTerms; they, and all below, broadcast to the tile
    z,
    is_target,
    extra,  # class_grad + g of the tile, or 0
    column_weight,
    rest,  # r of the tile, or 0
):
    """The formula at the head of this file on one tile."""
    shifted = z - of_row.row_max
    coef = of_row.prob_coef + extra
    if terms.entropy_grad is not None:
        log_p = tl.maximum(shifted - of_row.log_sum, -1e4)  # p log p = 0 at p = 0
        coef = coef - of_row.entropy_grad * (log_p + of_row.entropy)
    if is_target is not None:
        coef = tl.where(is_target, coef + of_row.target_coef, coef)
    # the division by the sum is one multiplication per row, outside the exponent and the loop
    dz = tl.exp2(shifted * LOG2E) * (coef * tl.exp2(-of_row.log_sum * LOG2E))
    if is_target is not None:
        dz += tl.where(is_target, of_row.target_rest, 0.0) + rest
    if terms.sum_grad is not None:
        dz += tl.where(z > float("-inf"), of_row.sum_grad * column_weight, 0.0)
    if rows.softcap is not None:
        ratio = tl.maximum(z * (1 / tl.full((), rows.softcap, rows.dtype)), -1.0)
        dz = dz * (1.0 - ratio * ratio)
    if rows.scale is not None:
        dz = dz * tl.full((), rows.scale, rows.dtype)
    return dz


@jit
def load_row_terms(terms, row, mask):
    """The terms of one row or a vector of them; the maximum stands for those there are not."""
    row_max = tl.load(terms.row_max + row, mask=mask, other=0.0)
    entropy, entropy_grad, sum_grad = row_max, row_max, row_max
    if terms.entropy_grad is not None:
        entropy = tl.load(terms.entropy + row, mask=mask, other=0.0)
        entropy_grad = tl.load(terms.entropy_grad + row, mask=mask, other=0.0)
    if terms.sum_grad is not None:
        sum_grad = tl.load(terms.sum_grad + row, mask=mask, other=0.0)
    return RowTerms(
        row_max,
        tl.load(terms.log_sum + row, mask=mask, other=0.0),
        tl.load(terms.prob_coef + row, mask=mask, other=0.0),
        tl.load(terms.target_coef + row, mask=mask, other=0.0),
        tl.load(terms.target_rest + row, mask=mask, other=0.0),
        entropy,
        entropy_grad,
        sum_grad,
    )


@jit
def grad_rows_kernel(
    rows,  # KernelRows
    dlogits,  # (N, V)
    terms,  # KernelTerms; class_grad only where it covers every column
    BLOCK_V: tl.constexpr,
):
    """One program per row: its V elements."""
    row = tl.program_id(0)
    V = rows.V
    out = dlogits + row.to(tl.int64) * V
    if tl.load(terms.valid + row) == 0:
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            zeros = tl.zeros((BLOCK_V,), dlogits.dtype.element_ty)
            tl.store(out + columns, zeros, mask=columns < V)
        return

    start = rows.logits + row_offset(rows, row)
    y = tl.load(terms.target + row)
    of_row = load_row_terms(terms, row, True)
    grads = None
    weight = 1.0
    if terms.class_grad is not None:
        grads = terms.class_grad + tl.load(terms.sample + row) * V
        if terms.row_weight is not None:
            weight = tl.load(terms.row_weight + row)

    # The target's element is written again after all others, which are then spared the question
    # whether they are it. Its logit is read before, for dlogits may lie where the logits do.
    known = (y >= 0) & (y < V)
    z_y = load_logits(rows, start + y * rows.stride_v, known)
    tl.debug_barrier()

    tile = tl.arange(0, BLOCK_V)
    # whole tiles, which need no mask, then the rest of the row; in float64 all in one loop, whose
    # code is long enough
    ONE_LOOP: tl.constexpr = 1 if rows.dtype == tl.float64 else 0
    whole = 0 if ONE_LOOP else V // BLOCK_V * BLOCK_V
    for REST in tl.static_range(ONE_LOOP, 2):
        for first in range(whole if REST else 0, V if REST else whole, BLOCK_V):
            columns = first + tile
            inside = columns < V if REST else None
            z = load_logits(rows, start + columns.to(tl.int64) * rows.stride_v, inside)
            extra = 0.0 if grads is None else tl.load(grads + columns, mask=inside) * weight
            w = load_column_weight(rows, terms, columns, inside)
            dz = grad_tile(rows, terms, of_row, z, None, extra, w, 0.0)
            tl.store(out + columns, dz.to(dlogits.dtype.element_ty), mask=inside)

    tl.debug_barrier()
    extra = 0.0 if grads is None else tl.load(grads + y, mask=known) * weight
    w = load_column_weight(rows, terms, y, known)
    dz = grad_tile(rows, terms, of_row, z_y, True, extra, w, 0.0)
    tl.store(out + y, dz.to(dlogits.dtype.element_ty), mask=known)


@jit
def load_column_weight(rows, terms, columns, mask):
    if terms.column_weight is None:
        return 1.0
    else:
        return tl.load(terms.column_weight + columns, mask=mask).to(rows.dtype)


@jit
def grad_entries_kernel(
    rows,  # KernelRows
    dlogits,  # (N, V)
    terms,  # KernelTerms; with entries those M, without all (row, listed column)
    gathered,  # (N, K) or (M,) logits of these alone, None where dlogits do not lie over them
    M,
    K,
    BLOCK: tl.constexpr,
):
    """Single elements written again with more terms."""
    if terms.entry_grad is None:
        row = tl.program_id(0).to(tl.int64) + tl.zeros((BLOCK,), tl.int64)
        k = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (k < K) & (tl.load(terms.valid + row) != 0)
    else:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < M
        row = tl.load(terms.entry_row + at, mask=inside, other=0)
        k = tl.load(terms.entry_class + at, mask=inside, other=0)
        if terms.entry_rest is not None:
            inside = inside & (k >= 0) & (tl.load(terms.valid + row, mask=inside, other=0) != 0)
    column = k if terms.columns is None else tl.load(terms.columns + k, mask=inside, other=0)
    if gathered is None:
        pointers = rows.logits + row_offset(rows, row) + column * rows.stride_v
    elif terms.entry_grad is None:
        pointers = gathered + row * K + k
    else:
        pointers = gathered + at
    z = load_logits(rows, pointers, inside)
    y = tl.load(terms.target + row, mask=inside, other=-1)
    of_row = load_row_terms(terms, row, inside)
    extra = tl.zeros((BLOCK,), rows.dtype)
    rest = 0.0
    if terms.entry_grad is not None:
        extra += tl.load(terms.entry_grad + at, mask=inside, other=0.0)
        if terms.entry_rest is not None:
            rest = tl.load(terms.entry_rest + at, mask=inside, other=0.0)
    if terms.class_grad is not None:
        b = tl.load(terms.sample + row, mask=inside, other=0)
        a = tl.load(terms.class_grad + b * K + k, mask=inside, other=0.0)
        if terms.row_weight is not None:
            a *= tl.load(terms.row_weight + row, mask=inside, other=0.0)
        extra += a
    w = load_column_weight(rows, terms, column, inside)
    dz = grad_tile(rows, terms, of_row, z, column == y, extra, w, rest)
    tl.store(dlogits + row * rows.V + column, dz.to(dlogits.dtype.element_ty), mask=inside)


@launcher
def logit_grad_triton(rows: Rows, terms: GradTerms, dlogits: Tensor) -> None:
    n, num_classes = rows.num_rows, rows.num_classes
    covers_all = terms.class_grad is not None and terms.columns is None
    listed = terms.class_grad is not None and not covers_all and terms.class_grad.numel() > 0
    single = terms.entry_grad is not None and terms.entry_grad.numel() > 0
    # the later passes read logits again: where dlogits lie over them, a copy of those few
    in_place = dlogits.data_ptr() == rows.data.data_ptr()
    panel = rows.data[:, :, terms.columns].contiguous() if listed and in_place else None
    few = raw_entries(rows, terms) if single and in_place else None
    kernel_rows, kernel_terms = rows.for_kernel(), terms.for_kernel()
    no_entries = kernel_terms._replace(
        entry_row=None, entry_class=None, entry_grad=None, entry_rest=None
    )
    no_classes = no_entries._replace(sample=None, class_grad=None, row_weight=None, columns=None)
    grad_rows_kernel[(n,)](
        kernel_rows,
        dlogits,
        no_entries if covers_all else no_classes,
        # both terms beside a softcap take the registers
        **row_tile(rows, halved=terms.entropy_grad is not None and terms.sum_grad is not None),
    )
    num_columns = num_classes if terms.class_grad is None else terms.class_grad.shape[1]
    if listed:
        grid = (n, cdiv(num_columns, 256))
        grad_entries_kernel[grid](
            kernel_rows, dlogits, no_entries, panel, 0, num_columns, BLOCK=256, num_warps=4
        )
    if single:
        num_entries = terms.entry_grad.numel()
        grad_entries_kernel[(cdiv(num_entries, 256),)](
            kernel_rows,
            dlogits,
            kernel_terms,
            few,
            num_entries,
            num_columns,
            BLOCK=256,
            num_warps=4,
        )


def raw_entries(rows: Rows, terms: GradTerms) -> Tensor:
    """The logits of the entries (M,) as they are stored."""
    column = terms.entry_class if terms.columns is None else terms.columns[terms.entry_class]
    time = rows.data.shape[1]
    return rows.data[terms.entry_row // time, terms.entry_row % time, column]


@dataclass
class RowVectors:
    """What a row block reads of the terms, worked out for all rows at once."""

    scale: Tensor  # (N, 1) prob_coef / sum_j exp(z_j - max)
    class_scale: Tensor  # (N, 1) row_weight / the same sum
    target_place: Tensor  # (N',) row * V + target, rows without one left out
    target_value: Tensor  # (N',) dz there, before the transform's slope
    target_before: dict[int, int]  # how many of them lie before a block's edge
    valid_before: dict[int, int]
    # plain cross-entropy's `p * coefficient` is one exponential: the shift (N, 1) of its exponent,
    # and signs where some coefficient is negative
    shift: Tensor | None = None
    # nothing is added to the target's element, nor is it multiplied: the caller writes it, once
    target_last: bool = False
    sign: Tensor | None = None
    entry_place: Tensor | None = None  # (M,)
    entry_value: Tensor | None = None  # (M,)
    entry_before: dict[int, int] | None = None

    @classmethod
    def of(cls, rows: Rows, terms: GradTerms, groups: list[list[Block]]) -> RowVectors:
        num_classes = rows.num_classes
        inverse_sum = torch.exp(-terms.log_sum)
        known = terms.valid & (terms.target >= 0) & (terms.target < num_classes)
        row = known.nonzero()[:, 0]
        column = terms.target[row]
        log_p = rows.at(row, column) - terms.row_max[row] - terms.log_sum[row]
        coef = terms.prob_coef[row] + terms.target_coef[row]
        if terms.entropy_grad is not None:
            coef = coef - terms.entropy_grad[row] * (log_p.clamp(min=-1e4) + terms.entropy[row])
        weight = 1.0 if terms.row_weight is None else terms.row_weight
        vectors = cls(
            (terms.prob_coef * inverse_sum)[:, None],
            (inverse_sum * weight)[:, None],
            row * num_classes + column,
            log_p.exp() * coef + terms.target_rest[row],
            bounds(row, groups),
            bounds(terms.valid.nonzero()[:, 0], groups),
        )
        plain = terms.entropy_grad is None and terms.class_grad is None
        if plain and rows.dtype == torch.float32 and rounds_once():
            log_size = terms.prob_coef.abs().log()
            lse = terms.row_max + terms.log_sum
            vectors.shift = ((log_size - lse) * EXPONENT_UNIT)[:, None]
            if bool((terms.prob_coef < 0).any()):
                vectors.sign = terms.prob_coef.sign()[:, None]
        if terms.entry_row is not None:
            row, column = terms.entry_row, terms.entry_class
            column = column if terms.columns is None else terms.columns[column]
            z = rows.at(row, column)
            p = torch.exp(z - terms.row_max[row] - terms.log_sum[row])
            vectors.entry_place = row * num_classes + column
            grad = p * terms.entry_grad
            if terms.entry_rest is not None:
                grad = grad + terms.entry_rest
            vectors.entry_value = grad * rows.slope(z)
            vectors.entry_before = bounds(row, groups)
        return vectors


def logit_grad_torch(rows: Rows, terms: GradTerms, dlogits: Tensor) -> None:
    """The twin adds the three passes up in one float32 row block, then rounds it once."""
    groups = rows.blocks()
    vectors = RowVectors.of(rows, terms, groups)
    untransformed = rows.softcap is None and rows.scale == 1.0
    nothing_more = terms.sum_grad is None and terms.entry_grad is None
    vectors.target_last = vectors.shift is not None and untransformed and nothing_more
    # where z is read again after p has been formed, it needs a buffer of its own
    z_again = terms.sum_grad is not None or rows.softcap is not None

    def work(group: list[Block]) -> None:
        size = max(last - first for first, last, _ in group)
        grad_buffer = rows.new(size, rows.num_classes)
        load_buffer = rows.new(size, rows.num_classes) if z_again else grad_buffer
        for first, last, raw in group:
            out = dlogits[first:last]
            num_valid = vectors.valid_before[last] - vectors.valid_before[first]
            if num_valid == 0:
                out.zero_()
                continue
            z = rows.load(raw, load_buffer)
            # dlogits may lie over the logits, which a later term still reads
            direct = out.dtype == rows.dtype and out.data_ptr() != raw.data_ptr()
            dz = out if direct else grad_buffer[: last - first]
            block_grad(rows, z, terms, vectors, first, last, dz)
            if num_valid < last - first:
                dz.masked_fill_(~terms.valid[first:last, None], 0)
            if dz is not out:
                out.copy_(dz)

    parallel(work, groups)
    if vectors.target_last:
        target_value = vectors.target_value.to(dlogits.dtype)
        dlogits.view(-1).index_copy_(0, vectors.target_place, target_value)


def block_grad(
    rows: Rows, z: Tensor, terms: GradTerms, vectors: RowVectors, first: int, last: int, dz: Tensor
) -> None:
    """All terms of one block into dz (R, V); z is (R, V), possibly the same memory."""
    here = slice(first, last)
    log_p = None
    if vectors.shift is not None:
        exponentials(z, vectors.shift[here], dz)
        if vectors.sign is not None:
            dz.mul_(vectors.sign[here])
        return block_rest(rows, z, terms, vectors, first, last, dz, None)
    torch.sub(z, terms.row_max[here, None], out=dz)
    if terms.entropy_grad is not None:
        log_p = (dz - terms.log_sum[here, None]).clamp_(min=-1e4)
    exp_(dz)
    class_part = None
    if terms.class_grad is not None:
        # a (1, K) row where there is one sample: it broadcasts
        grads = terms.class_grad
        grads = grads if grads.shape[0] == 1 else grads[terms.sample[here]]
        columns = slice(None) if terms.columns is None else terms.columns
        class_part = (dz[:, columns] * grads).mul_(vectors.class_scale[here])
    if log_p is None:
        dz.mul_(vectors.scale[here])
    else:
        log_p.add_(terms.entropy[here, None]).mul_(-terms.entropy_grad[here, None])
        log_p.add_(terms.prob_coef[here, None])
        dz.mul_(log_p).mul_(torch.exp(-terms.log_sum[here, None]))
    block_rest(rows, z, terms, vectors, first, last, dz, class_part)


def block_rest(
    rows: Rows, z: Tensor, terms, vectors, first: int, last: int, dz, class_part
) -> None:
    """What is added to `p * coefficient` (R, V)."""
    here = slice(first, last)
    if vectors.target_last:
        return
    flat = dz.view(-1)
    start = first * rows.num_classes
    part = slice(vectors.target_before[first], vectors.target_before[last])
    flat.index_copy_(0, vectors.target_place[part] - start, vectors.target_value[part])
    if class_part is not None:
        if terms.columns is None:
            dz.add_(class_part)
        else:
            dz.index_add_(1, terms.columns, class_part)
    if terms.sum_grad is not None:
        w = 1.0 if terms.column_weight is None else terms.column_weight.to(dz.dtype)
        dz.add_(torch.where(z > -torch.inf, terms.sum_grad[here, None] * w, 0.0))
    if rows.softcap is not None:
        dz.mul_(rows.slope(z))
    elif rows.scale != 1.0:
        dz.mul_(rows.scale)
    if vectors.entry_before is not None:
        part = slice(vectors.entry_before[first], vectors.entry_before[last])
        flat.index_add_(0, vectors.entry_place[part] - start, vectors.entry_value[part])


def logit_grad(rows: Rows, terms: GradTerms, dlogits: Tensor) -> Tensor:
    """Fills dlogits (N, V), contiguous, with the gradient of the logits; returns it.

    dlogits may be the memory of the logits. On a GPU, listed columns and entries then cost a copy
    of their own logits.
    """
    if rows.num_rows and rows.num_classes:
        run = logit_grad_triton if use_triton(rows.data) else logit_grad_torch
        run(rows, terms, dlogits)
    return dlogits
