"""Two matrices of logits in step: the divergence of their rows, and its gradient in one of them.

    p = softmax(student)    q = softmax(teacher)    m = beta q + (1 - beta) p
    forward sum_j q_j log(q_j / p_j)                 dz_j = p_j - q_j
    reverse sum_j p_j log(p_j / q_j)                 dz_j = p_j (log(p_j / q_j) - value)
    jsd     beta KL(q || m) + (1 - beta) KL(p || m)  dz_j = (1 - beta) p_j (log(p_j / m_j) - center)
    targets -sum_j w_j y_j log p_j                   dz_j = p_j sum_k w_k y_k - w_j y_j
    lse     log sum_j exp(z_j)                       dz_j = p_j

`center` is KL(p || m). For "targets" the teacher's matrix holds the probabilities y themselves; for
"lse" it is not read. A temperature is part of the rows: their softcap and scale divided by it.

N rows, V columns, R rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    LOG2E,
    Block,
    KernelRows,
    Rows,
    bounds,
    exp_,
    jit,
    launcher,
    load_logits,
    parallel,
    row_offset,
    row_tile,
    tile_columns,
    tl,
    use_triton,
)
from .logit_grad import GradTerms, RowVectors, block_grad, logit_grad
from .row_stats import LOWEST

# what a block of rows is worked through with, as `Rows.blocks` counts it (measured: bench/NOTES.md)
MATRICES = 2
KINDS = ("forward", "reverse", "jsd", "targets", "lse")
# below any logit, and finite: a difference of two of them is a number
FLOOR = -1e30 if tl is None else tl.constexpr(-1e30)


class PairNumbers(NamedTuple):
    """What is known of every row of two matrices (N,); 0 at ignored rows."""

    value: Tensor
    student_max: Tensor
    student_sum: Tensor  # log of the sum of exponentials relative to the maximum
    teacher_max: Tensor
    teacher_sum: Tensor  # as above; of "targets" the sum of w y itself
    center: Tensor


@dataclass
class Pair:
    """Rows of a student and of a teacher, and which number is made of them.

    The sources' vocabularies differ by padding at most: the columns that both have are read.
    """

    student: Rows
    teacher: Rows | None
    valid: Tensor  # (N,) bool
    kind: str
    beta: float = 0.5
    column_weight: Tensor | None = None  # (V,) w of "targets", None for ones
    numbers: PairNumbers | None = None  # what came of them
    grad: Tensor | None = None  # (N,) of the value, set for the backward

    def __post_init__(self):
        width = self.student.num_classes
        if self.teacher is not None:
            width = min(width, self.teacher.num_classes)
            self.teacher = cut(self.teacher, width)
        self.student = cut(self.student, width)
        if self.column_weight is not None:
            self.column_weight = self.column_weight[:width].to(self.student.dtype)

    @property
    def width(self) -> int:
        return self.student.num_classes

    def matrices(self) -> tuple[KernelRows, KernelRows | None]:
        """Both as a Triton kernel takes them, the arithmetic in the student's dtype."""
        student = self.student.for_kernel()
        if self.teacher is None:
            return student, None
        number = tl.constexpr if self.student.dtype == torch.float64 else float
        softcap, scale = self.teacher.softcap, self.teacher.scale
        teacher = self.teacher.for_kernel()._replace(
            softcap=None if softcap is None else number(softcap),
            scale=None if scale == 1.0 else number(scale),
            dtype=student.dtype,
        )
        return student, teacher


def cut(rows: Rows, width: int) -> Rows:
    """The first `width` columns, without a copy."""
    return rows if rows.num_classes == width else replace(rows, data=rows.data[:, :, :width])


@jit
def held(maximum):
    """A maximum to subtract: 0 where there is none yet."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@jit
def moved(z, old_max):
    """(z less its running maximum, that, the factor and the shift from the old maximum to it)."""
    new_max = tl.maximum(old_max, tl.max(z, axis=1))
    base = tl.maximum(new_max, LOWEST)
    rescale = tl.exp2((old_max - base) * LOG2E)
    return z - base[:, None], new_max, rescale, held(old_max - base)


@jit
def load_targets(teacher, column_weight, pointers, columns, mask):
    """A tile of w y, of probabilities that are taken as they are."""
    y = tl.load(pointers, mask=mask, other=None if mask is None else 0.0).to(teacher.dtype)
    if column_weight is not None:
        y *= tl.load(column_weight + columns, mask=mask, other=None if mask is None else 0.0)
    return y


@jit
def divergence_kernel(
    rows,  # KernelRows of the student
    teacher,  # KernelRows; None of "lse", which reads none
    column_weight,  # (V,) or None
    valid,  # (N,)
    out,  # PairNumbers; center is left alone, and of "jsd" the value
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: both normalisers and the value, in one online sweep.

    Every line of a tile keeps sums of its own, relative to maxima of its own.
    """
    row = tl.program_id(0)
    V = rows.V
    zero = tl.zeros((), rows.dtype)
    if tl.load(valid + row) == 0:
        tl.store(out.value + row, zero)
        tl.store(out.student_max + row, zero)
        tl.store(out.student_sum + row, zero)
        tl.store(out.teacher_max + row, zero)
        tl.store(out.teacher_sum + row, zero)
        return

    u_start = rows.logits + row_offset(rows, row)
    w_start = u_start
    if KIND != "lse":
        w_start = teacher.logits + row_offset(teacher, row)
    if ALIGNED:
        u_start = tl.multiple_of(u_start, 16)
        w_start = tl.multiple_of(w_start, 16)
    LINES: tl.constexpr = BLOCK_V // GROUP
    u_max = tl.full((LINES,), float("-inf"), rows.dtype)
    w_max = tl.full((LINES,), float("-inf"), rows.dtype)
    u_sum = tl.zeros((LINES,), rows.dtype)
    w_sum = tl.zeros((LINES,), rows.dtype)
    # sum_j e_j (difference of the shifted logits), e of the one the mean is taken over
    mixed = tl.zeros((LINES,), rows.dtype)
    tile = tile_columns(ALIGNED, GROUP, BLOCK_V)
    ONE_LOOP: tl.constexpr = 1 if rows.dtype == tl.float64 else 0
    whole = 0 if ONE_LOOP else V // BLOCK_V * BLOCK_V
    for REST in tl.static_range(ONE_LOOP, 2):
        for first in range(whole if REST else 0, V if REST else whole, BLOCK_V):
            columns = first + tile
            inside = columns < V if REST else None
            offsets = columns.to(tl.int64)
            z = load_logits(rows, u_start + offsets * rows.stride_v, inside)
            u, u_max, u_rescale, u_shift = moved(z, u_max)
            e = tl.exp2(u * LOG2E)
            if KIND == "targets":
                pointers = w_start + offsets * teacher.stride_v
                y = load_targets(teacher, column_weight, pointers, columns, inside)
                # relative to the maximum, which the sum of y moves with
                mixed += w_sum * u_shift + tl.sum(tl.where(y == 0, 0.0, y * u), axis=1)
                w_sum += tl.sum(y, axis=1)
            elif KIND != "lse":
                z = load_logits(teacher, w_start + offsets * teacher.stride_v, inside)
                w, w_max, w_rescale, w_shift = moved(z, w_max)
                f = tl.exp2(w * LOG2E)
                if KIND == "forward":
                    terms = tl.where(f == 0, 0.0, f * (w - u))
                    mixed = (mixed + w_sum * (w_shift - u_shift)) * w_rescale
                    mixed += tl.sum(terms, axis=1)
                if KIND == "reverse":
                    terms = tl.where(e == 0, 0.0, e * (u - w))
                    mixed = (mixed + u_sum * (u_shift - w_shift)) * u_rescale
                    mixed += tl.sum(terms, axis=1)
                w_sum = w_sum * w_rescale + tl.sum(f, axis=1)
            u_sum = u_sum * u_rescale + tl.sum(e, axis=1)

    u_base = held(tl.max(u_max, axis=0))
    u_rescale = tl.exp2((u_max - u_base) * LOG2E)
    u_shift = held(u_max - u_base)
    u_total = tl.sum(u_sum * u_rescale, axis=0)
    u_log = tl.log(u_total)
    w_base = held(tl.max(w_max, axis=0))
    w_rescale = tl.exp2((w_max - w_base) * LOG2E)
    w_shift = held(w_max - w_base)
    w_total = tl.sum(w_sum * w_rescale, axis=0)
    w_log = zero if KIND == "lse" or KIND == "targets" else tl.log(w_total)
    if KIND == "forward":
        mixed = (mixed + w_sum * (w_shift - u_shift)) * w_rescale
        tl.store(out.value + row, tl.sum(mixed, axis=0) / w_total + u_log - w_log)
    if KIND == "reverse":
        mixed = (mixed + u_sum * (u_shift - w_shift)) * u_rescale
        tl.store(out.value + row, tl.sum(mixed, axis=0) / u_total + w_log - u_log)
    if KIND == "targets":
        w_log = tl.sum(w_sum, axis=0)
        mixed += tl.where(w_sum == 0, 0.0, w_sum * (tl.maximum(u_max, LOWEST) - u_base))
        tl.store(out.value + row, w_log * u_log - tl.sum(mixed, axis=0))
    if KIND == "lse":
        tl.store(out.value + row, u_base + u_log)
    tl.store(out.student_max + row, u_base)
    tl.store(out.student_sum + row, u_log)
    tl.store(out.teacher_max + row, w_base)
    tl.store(out.teacher_sum + row, w_log)


@jit
def log_mixture(u, w, beta):
    """(p, q, log p, log q, log m), logarithms no less than FLOOR."""
    log_p = tl.maximum(u, FLOOR)
    log_q = tl.maximum(w, FLOOR)
    p = tl.exp2(u * LOG2E)
    q = tl.exp2(w * LOG2E)
    # the floor of m keeps log2 from 0; a smaller number is a float64 to some releases of Triton
    m = tl.maximum(beta * q + (1 - beta) * p, 1.2e-38)
    return p, q, log_p, log_q, tl.log2(m) * (1 / LOG2E)


@jit
def jsd_kernel(
    rows,  # KernelRows of the student
    teacher,  # KernelRows
    valid,  # (N,)
    numbers,  # PairNumbers: both normalisers, and room for value and center
    beta: tl.float64,
    BLOCK_V: tl.constexpr,
):
    """One program per row: both divergences from the mixture, given both normalisers."""
    row = tl.program_id(0)
    if tl.load(valid + row) == 0:
        tl.store(numbers.value + row, tl.zeros((), rows.dtype))
        tl.store(numbers.center + row, tl.zeros((), rows.dtype))
        return
    u_start = rows.logits + row_offset(rows, row)
    w_start = teacher.logits + row_offset(teacher, row)
    u_less = tl.load(numbers.student_max + row), tl.load(numbers.student_sum + row)
    w_less = tl.load(numbers.teacher_max + row), tl.load(numbers.teacher_sum + row)
    share = tl.full((), beta, rows.dtype)
    of_p = tl.zeros((BLOCK_V,), rows.dtype)
    of_q = tl.zeros((BLOCK_V,), rows.dtype)
    for first in range(0, rows.V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < rows.V
        offsets = columns.to(tl.int64)
        u = load_logits(rows, u_start + offsets * rows.stride_v, inside)
        w = load_logits(teacher, w_start + offsets * teacher.stride_v, inside)
        u = u - u_less[0] - u_less[1]
        w = w - w_less[0] - w_less[1]
        p, q, log_p, log_q, log_m = log_mixture(u, w, share)
        of_p += tl.where(p == 0, 0.0, p * (log_p - log_m))
        of_q += tl.where(q == 0, 0.0, q * (log_q - log_m))
    center = tl.sum(of_p, axis=0)
    tl.store(numbers.center + row, center)
    tl.store(numbers.value + row, share * tl.sum(of_q, axis=0) + (1 - share) * center)


@jit
def divergence_grad_kernel(
    rows,  # KernelRows of the student
    teacher,  # KernelRows; None of "lse", which reads none
    column_weight,  # (V,) or None
    valid,  # (N,)
    numbers,  # PairNumbers
    grad,  # (N,)
    out,  # (N, V), rows out_stride apart
    out_stride,
    beta: tl.float64,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: the formulas at the head of this file, written or added to `out`."""
    row = tl.program_id(0)
    V = rows.V
    out += row.to(tl.int64) * out_stride
    if tl.load(valid + row) == 0:
        if not ADD:
            for first in range(0, V, BLOCK_V):
                columns = first + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), out.dtype.element_ty)
                tl.store(out + columns, zeros, mask=columns < V)
        return
    u_start = rows.logits + row_offset(rows, row)
    w_start = u_start
    if KIND != "lse":
        w_start = teacher.logits + row_offset(teacher, row)
    u_max, u_log = tl.load(numbers.student_max + row), tl.load(numbers.student_sum + row)
    w_max, w_log = tl.load(numbers.teacher_max + row), tl.load(numbers.teacher_sum + row)
    center, upstream = tl.load(numbers.center + row), tl.load(grad + row)
    share = tl.full((), beta, rows.dtype)
    # the divisions by the sums are one multiplication per row, outside the exponents and the loop
    of_p = upstream * tl.exp2(-u_log * LOG2E)
    of_q = upstream * tl.exp2(-w_log * LOG2E)
    if KIND == "targets":
        of_p = of_p * w_log
    ONE_LOOP: tl.constexpr = 1 if rows.dtype == tl.float64 else 0
    whole = 0 if ONE_LOOP else V // BLOCK_V * BLOCK_V
    for REST in tl.static_range(ONE_LOOP, 2):
        for first in range(whole if REST else 0, V if REST else whole, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            inside = columns < V if REST else None
            offsets = columns.to(tl.int64)
            z = load_logits(rows, u_start + offsets * rows.stride_v, inside)
            u = z - u_max
            if KIND == "lse":
                dz = tl.exp2(u * LOG2E) * of_p
            elif KIND == "targets":
                pointers = w_start + offsets * teacher.stride_v
                y = load_targets(teacher, column_weight, pointers, columns, inside)
                dz = tl.exp2(u * LOG2E) * of_p - y * upstream
            else:
                w = load_logits(teacher, w_start + offsets * teacher.stride_v, inside) - w_max
                if KIND == "forward":
                    dz = tl.exp2(u * LOG2E) * of_p - tl.exp2(w * LOG2E) * of_q
                elif KIND == "reverse":
                    log_ratio = tl.maximum(u, FLOOR) - tl.maximum(w, FLOOR)
                    dz = tl.exp2(u * LOG2E) * (of_p * (log_ratio + (w_log - u_log - center)))
                else:
                    p, _, log_p, _, log_m = log_mixture(u - u_log, w - w_log, share)
                    dz = p * (upstream * (1 - share) * (log_p - log_m - center))
            if rows.softcap is not None:
                ratio = tl.maximum(z * (1 / tl.full((), rows.softcap, rows.dtype)), -1.0)
                dz = dz * (1.0 - ratio * ratio)
            if rows.scale is not None:
                dz = dz * tl.full((), rows.scale, rows.dtype)
            if ADD:
                dz += tl.load(out + columns, mask=inside).to(rows.dtype)
            tl.store(out + columns, dz.to(out.dtype.element_ty), mask=inside)


@launcher
def divergence_triton(student: Rows, pair: Pair) -> None:
    """Of "jsd" both normalisers alone."""
    teacher = pair.teacher or student
    itemsize = max(student.data.element_size(), teacher.data.element_size())
    # Triton 3.6 dies of sums over lines of a float64 tile that are read twice
    group = 1 if student.dtype == torch.float64 else 16 // itemsize
    divergence_kernel[(student.num_rows,)](
        *pair.matrices(),
        pair.column_weight,
        pair.valid.view(torch.uint8),
        pair.numbers,
        KIND=pair.kind,
        ALIGNED=student.aligned and teacher.aligned,
        GROUP=group,
        **row_tile(student),
    )
    if pair.kind == "reverse":
        pair.numbers.center.copy_(pair.numbers.value)


@launcher
def mixture_triton(student: Rows, pair: Pair) -> None:
    jsd_kernel[(student.num_rows,)](
        *pair.matrices(),
        pair.valid.view(torch.uint8),
        pair.numbers,
        pair.beta,
        **row_tile(student, halved=True),  # sm_100 spills a whole one
    )


@launcher
def divergence_grad_triton(dlogits: Tensor, pair: Pair, add: bool) -> None:
    divergence_grad_kernel[(pair.student.num_rows,)](
        *pair.matrices(),
        pair.column_weight,
        pair.valid.view(torch.uint8),
        pair.numbers,
        pair.grad,
        dlogits,
        dlogits.stride(0),
        pair.beta,
        KIND=pair.kind,
        ADD=add,
        **grad_tile(pair),
    )


def grad_tile(pair: Pair) -> dict[str, int]:
    """`row_tile`; half of it where class weights are read as a third matrix."""
    tile = row_tile(pair.student)
    if pair.column_weight is not None and tile["BLOCK_V"] > 32:
        tile["BLOCK_V"] //= 2
    return tile


# -------------------------------------------------------------------------------- the torch twins


def raw_rows(rows: Rows, here: slice) -> Tensor:
    """Raw logits (R, V) of some rows, copied only where no stride leads from one to the next."""
    time = rows.data.shape[1]
    if here.start == here.stop:
        return rows.data[:0].flatten(0, 1)
    parts = [
        rows.data[b, max(here.start - b * time, 0) : here.stop - b * time]
        for b in range(here.start // time, (here.stop - 1) // time + 1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def loaded(rows: Rows, raw: Tensor, buffer: Tensor) -> Tensor:
    """Transformed logits of a raw tile, in a buffer of the student's compute dtype."""
    here = buffer[: raw.shape[0]]
    z = rows.load(raw, here)
    return z if z.data_ptr() == here.data_ptr() else here.copy_(z)


def row_dot(weights: Tensor, values: Tensor) -> Tensor:
    """`sum_j weights_ij values_ij` (R,), 0 where a weight is 0; may spend the values."""
    found = torch.linalg.vecdot(weights, values)
    if not found.isfinite().all():  # 0 * inf, which a column of -inf in either matrix gives
        found = values.mul_(weights).masked_fill_(weights == 0, 0).sum(-1)
    return found


def subtract_max(z: Tensor, into: Tensor) -> None:
    """z (R, V) less its largest; that in `into` (R,), 0 for a row of -inf alone."""
    torch.amax(z, -1, out=into)
    into.masked_fill_(into == -torch.inf, 0)
    z.sub_(into[:, None])


def sum_of_exp(shifted: Tensor, into: Tensor, out: Tensor | None = None) -> Tensor:
    """Row sums (R,) of the exponentials, which replace `shifted` or are put in `out`; their
    logarithm in `into`."""
    total = exp_(shifted, out).sum(-1)
    torch.log(total, out=into)
    return total


def softmax(shifted: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """Probabilities in `out`, maybe the memory of `shifted`; `into` as above."""
    return out.mul_(sum_of_exp(shifted, into, out).reciprocal_()[:, None])


def log_mixture_torch(pair: Pair, p: Tensor, q: Tensor, out: Tensor) -> Tensor:
    """`log(beta q + (1 - beta) p)` in `out`, which may be q; finite where the least p and q have a
    mixture of 0."""
    return torch.lerp(p, q, pair.beta, out=out).log_().clamp_(min=-1e4)


def mean_of(p: Tensor, x: Tensor, room: Tensor | None) -> tuple[Tensor, bool]:
    """(sum_j p_ij x_ij (R,), whether `room`, if there is any, got `p (x - that)`): not where an x
    is infinite; may spend x then, or where there is no room."""
    if room is not None:
        mean = torch.mul(p, x, out=room).sum(-1)
        if mean.isfinite().all():
            room.addcmul_(p, mean[:, None], value=-1)
            return mean, True
    return row_dot(p, x), False


def mixed(
    pair: Pair,
    log_p: Tensor,
    log_q: Tensor,
    rest: list[Tensor],
    value: Tensor,
    center: Tensor,
    grads: bool = False,
) -> Tensor | None:
    """The two numbers of "jsd", of one block of rows, and with `grads` the value's gradient unless
    a logarithm is infinite; those are spent, of the rest are p, q and room for log m."""
    p, q, log_m = rest
    log_mixture_torch(pair, p, q, log_m)
    log_q.sub_(log_m)
    log_p.sub_(log_m)
    found, formed = mean_of(p, log_p, log_m if grads else None)
    center.copy_(found)
    value.copy_(pair.beta * row_dot(q, log_q) + (1 - pair.beta) * center)
    return log_m.mul_(1 - pair.beta) if formed else None


def block_mixture(pair: Pair, raw: Tensor, here: slice, buffers: list[Tensor]) -> None:
    """`mixed` of one block of rows, given both normalisers."""
    value, student_max, student_sum, teacher_max, teacher_sum, center = (
        v[here] for v in pair.numbers
    )
    u, w, *rest = (buffer[: raw.shape[0]] for buffer in buffers)
    loaded(pair.student, raw, u)
    loaded(pair.teacher, raw_rows(pair.teacher, here), w)
    log_p = u.sub_(student_max[:, None]).sub_(student_sum[:, None])
    log_q = w.sub_(teacher_max[:, None]).sub_(teacher_sum[:, None])
    exp_(log_p, rest[0])
    exp_(log_q, rest[1])
    mixed(pair, log_p, log_q, rest, value, center)


def block_divergence(
    pair: Pair,
    raw: Tensor,
    here: slice,
    buffers: list[Tensor],
    known: bool = False,
    both: bool = True,
    grads: bool = False,
) -> Tensor | None:
    """All numbers of one block of rows, and with `grads` the gradient (R, V) of each row's value.

    `known`: whether the student's normaliser is there, `both`: whether "jsd" goes on to its second
    pass.
    """
    value, student_max, student_sum, teacher_max, teacher_sum, center = (
        v[here] for v in pair.numbers
    )
    u, w, t, *rest = (buffer[: raw.shape[0]] for buffer in buffers)
    loaded(pair.student, raw, u)
    slope = pair.student.slope(u) if grads else 1.0
    if known:
        u.sub_(student_max[:, None])
    else:
        subtract_max(u, student_max)
    if pair.kind in ("forward", "reverse", "jsd"):
        loaded(pair.teacher, raw_rows(pair.teacher, here), w)
        subtract_max(w, teacher_max)
    dz: Tensor | None = None
    if pair.kind == "forward":
        q = softmax(w, teacher_sum, t)
        mean = row_dot(q, w.sub_(u))
        if grads:
            dz = softmax(u, student_sum, u).sub_(q)
        elif not known:
            sum_of_exp(u, student_sum)
        torch.add(mean, student_sum - teacher_sum, out=value)
    elif pair.kind == "reverse":
        p = softmax(u, student_sum, t)
        log_ratio = u.sub_(w)
        sum_of_exp(w, teacher_sum)
        mean, formed = mean_of(p, log_ratio, w if grads else None)
        torch.add(mean, teacher_sum - student_sum, out=value)
        center.copy_(value)
        dz = w if formed else None
    elif pair.kind == "jsd":
        p, q = softmax(u, student_sum, t), softmax(w, teacher_sum, rest[0])
        if both:
            log_p, log_q = u.sub_(student_sum[:, None]), w.sub_(teacher_sum[:, None])
            dz = mixed(pair, log_p, log_q, [p, q, rest[1]], value, center, grads)
    elif pair.kind == "targets":
        w.copy_(raw_rows(pair.teacher, here))
        if pair.column_weight is not None:
            w.mul_(pair.column_weight)
        torch.sum(w, -1, out=teacher_sum)
        dot = row_dot(w, t.copy_(u))
        if grads:
            dz = softmax(u, student_sum, u).mul_(teacher_sum[:, None]).sub_(w)
        elif not known:
            sum_of_exp(u, student_sum)
        torch.sub(teacher_sum * student_sum, dot, out=value)
    else:
        if grads:
            dz = softmax(u, student_sum, u)
        elif not known:
            sum_of_exp(u, student_sum)
        torch.add(student_max, student_sum, out=value)
    if not grads:
        return None
    if dz is None:  # some number was infinite
        return block_divergence_grad(pair, raw, here, buffers, torch.ones_like(value))
    return dz if isinstance(slope, float) and slope == 1 else dz.mul_(slope)


def over_blocks(pair: Pair, block: Callable, out: Tensor | None = None) -> None:
    """Fill the pair's numbers by `block(pair, raw rows, their slice, buffers)`, and `out` (N, V)
    with what it returns, 0 at ignored rows."""
    student, count = pair.student, 5 if pair.kind == "jsd" else 3
    groups = student.blocks(matrices=MATRICES)
    valid_before = bounds(pair.valid.nonzero()[:, 0], groups)

    def work(group: list[Block]) -> None:
        size = max(last - first for first, last, _ in group)
        buffers = [student.new(size, pair.width) for _ in range(count)]
        for first, last, raw in group:
            here = slice(first, last)
            num_valid = valid_before[last] - valid_before[first]
            found = block(pair, raw, here, buffers) if num_valid else None
            if out is not None:
                put(found, pair.valid[here], num_valid == last - first, out[here])

    parallel(work, groups)
    for vector in pair.numbers:
        vector.masked_fill_(~pair.valid, 0)


def put(dz: Tensor | None, valid: Tensor, every: bool, out: Tensor) -> None:
    """A gradient (R, W) in the first columns of `out` (R, V), the rest and ignored rows 0."""
    if dz is None:
        out.zero_()
        return
    if not every:
        dz.masked_fill_(~valid[:, None], 0)
    out[:, : dz.shape[1]].copy_(dz)
    if dz.shape[1] < out.shape[1]:
        out[:, dz.shape[1] :].zero_()


def block_divergence_grad(
    pair: Pair, raw: Tensor, here: slice, buffers: list[Tensor], grad: Tensor
) -> Tensor:
    """The gradient (R, V) of one block of rows, whose values have the gradient `grad` (R,), in one
    of the buffers."""
    _, student_max, student_sum, teacher_max, teacher_sum, center = (
        v[here, None] for v in pair.numbers
    )
    upstream = grad[:, None]
    u, w, t = (buffer[: raw.shape[0]] for buffer in buffers[:3])
    loaded(pair.student, raw, u)
    slope = pair.student.slope(u)
    u.sub_(student_max)
    of_p = upstream * torch.exp(-student_sum)
    if pair.kind in ("forward", "reverse", "jsd"):
        loaded(pair.teacher, raw_rows(pair.teacher, here), w)
        w.sub_(teacher_max)
    if pair.kind == "forward":
        exp_(w).mul_(upstream * torch.exp(-teacher_sum))
        exp_(u).mul_(of_p).sub_(w)
    elif pair.kind == "reverse":
        torch.sub(u.clamp_(min=-1e30), w.clamp_(min=-1e30), out=t)
        t.add_(teacher_sum - student_sum - center).mul_(of_p)
        exp_(u).mul_(t)
    elif pair.kind == "jsd":
        log_p, q = u.clamp_(min=-1e30).sub_(student_sum), exp_(w.sub_(teacher_sum))
        p = exp_(log_p, t)
        log_m = log_mixture_torch(pair, p, q, out=q)
        log_p.sub_(log_m).sub_(center).mul_(upstream * (1 - pair.beta)).mul_(p)
    elif pair.kind == "targets":
        w.copy_(raw_rows(pair.teacher, here))
        w.mul_(upstream if pair.column_weight is None else upstream * pair.column_weight)
        exp_(u).mul_(of_p * teacher_sum).sub_(w)
    else:
        exp_(u).mul_(of_p)
    return u if isinstance(slope, float) and slope == 1 else u.mul_(slope)


def divergence_grad_torch(
    student: Rows, pairs: list[Pair], dlogits: Tensor, plain: GradTerms | None
) -> None:
    """The twin adds all terms of a row block up before it rounds them, once."""
    groups, valid = student.blocks(matrices=MATRICES), pairs[0].valid
    valid_before = bounds(valid.nonzero()[:, 0], groups)
    vectors = None if plain is None else RowVectors.of(student, plain, groups)
    num_classes = student.num_classes
    alone = plain is None and len(pairs) == 1

    def work(group: list[Block]) -> None:
        size = max(last - first for first, last, _ in group)
        buffers = [student.new(size, num_classes) for _ in range(3)]
        total = None if alone else student.new(size, num_classes)
        for first, last, raw in group:
            here, out = slice(first, last), dlogits[first:last]
            num_valid = valid_before[last] - valid_before[first]
            if num_valid == 0:
                out.zero_()
                continue
            if plain is not None:
                z = student.load(raw, buffers[0])
                block_grad(student, z, plain, vectors, first, last, total[: last - first])
            elif not alone:
                total.zero_()
            for pair in pairs:
                scratch = [b.view(-1)[: size * pair.width].view(size, -1) for b in buffers]
                grad = pair.grad[here]
                part = block_divergence_grad(pair, raw[:, : pair.width], here, scratch, grad)
                if not alone:
                    total[: last - first, : pair.width].add_(part)
            dz = part if alone else total[: last - first]
            put(dz, valid[here], num_valid == last - first, out)

    parallel(work, groups)


# ------------------------------------------------------------------------------------- launchers


def divergence(
    pair: Pair, known: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None
) -> Pair:
    """Fills the pair's numbers: one value per row, of the kind named at the head of this file.

    `known` may be the student's (row_max, log_sum) over these very columns, which spares the twin
    an exponential. `out` (N, V), maybe the memory of the logits, gets the gradient of each row's
    value, while the exponentials are there; not on a GPU. Numbers have the student's compute dtype.
    """
    student = pair.student
    if not fresh(pair):
        return pair
    if use_triton(student.data) and out is None:
        divergence_triton(student, pair)
        if pair.kind == "jsd":
            mixture_triton(student, pair)
        return pair
    known = known if out is None and pair.kind in ("forward", "targets", "lse") else None
    if known is not None:
        pair.numbers.student_max.copy_(known[0])
        pair.numbers.student_sum.copy_(known[1])
    block = functools.partial(block_divergence, known=known is not None, grads=out is not None)
    over_blocks(pair, block, out)
    return pair


def fresh(pair: Pair) -> bool:
    """Numbers to be filled, as they are where there is no column; whether there is anything."""
    student = pair.student
    n = student.num_rows
    pair.numbers = PairNumbers(*(student.new(n).zero_() for _ in PairNumbers._fields))
    if student.num_classes == 0:
        pair.numbers.student_sum.fill_(-torch.inf)
        pair.numbers.teacher_sum.fill_(0 if pair.kind == "targets" else -torch.inf)
    return n > 0 and student.num_classes > 0


# Where more columns lie elsewhere, the two passes of "jsd" are apart: between them the normalisers
# become those of all columns.


def normalisers(pair: Pair) -> Pair:
    """Fills both normalisers of the numbers of "jsd"."""
    if not fresh(pair):
        return pair
    if use_triton(pair.student.data):
        divergence_triton(pair.student, pair)
    else:
        over_blocks(pair, functools.partial(block_divergence, both=False))
    return pair


def mixture(pair: Pair) -> Pair:
    """Fills value and center of the numbers of "jsd" with these columns' part, given normalisers;
    both must be 0."""
    if pair.student.num_rows == 0 or pair.student.num_classes == 0:
        return pair
    if use_triton(pair.student.data):
        mixture_triton(pair.student, pair)
    else:
        over_blocks(pair, block_mixture)
    return pair


def divergence_grad(
    student: Rows,
    pairs: list[Pair],
    dlogits: Tensor,  # (N, V)
    plain: GradTerms | None = None,
) -> Tensor:
    """Fills dlogits (N, V), contiguous, with what every pair's `grad` gives the student's logits.

    `plain`: terms of the student's own statistics, which are added. dlogits may be the memory of
    the logits; on a GPU, several terms then cost a copy of them.
    """
    if student.num_rows == 0 or student.num_classes == 0:
        return dlogits
    pairs = [pair for pair in pairs if pair.width]
    if not pairs:  # all of the teacher's columns are elsewhere
        return dlogits.zero_() if plain is None else logit_grad(student, plain, dlogits)
    if not use_triton(student.data):
        divergence_grad_torch(student, pairs, dlogits, plain)
        return dlogits
    padded = any(pair.width < student.num_classes for pair in pairs)
    several = plain is not None or len(pairs) > 1 or padded
    if several and dlogits.data_ptr() == student.data.data_ptr():
        copy = student.data.clone()
        student = replace(student, data=copy)
        pairs = [replace(p, student=replace(p.student, data=copy[:, :, : p.width])) for p in pairs]
    if plain is not None:
        logit_grad(student, plain, dlogits)
    elif padded:
        dlogits.zero_()
    for number, pair in enumerate(pairs):
        divergence_grad_triton(dlogits, pair, add=plain is not None or padded or number > 0)
    return dlogits
