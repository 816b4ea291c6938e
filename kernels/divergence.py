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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .common import (
    LOG2E,
    Block,
    Rows,
    exp_,
    jit,
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

KINDS = ("forward", "reverse", "jsd", "targets", "lse")
FORWARD = 0 if tl is None else tl.constexpr(0)
REVERSE = 1 if tl is None else tl.constexpr(1)
JSD = 2 if tl is None else tl.constexpr(2)
TARGETS = 3 if tl is None else tl.constexpr(3)
LSE = 4 if tl is None else tl.constexpr(4)
# below any logit, and finite: a difference of two of them is a number
FLOOR = -1e30 if tl is None else tl.constexpr(-1e30)


@dataclass
class Pair:
    """Rows of a student and of a teacher, which number is made of them, and what it came to.

    The sources' vocabularies differ by padding at most: the columns that both have are read.
    """

    student: Rows
    teacher: Rows | None
    valid: Tensor  # (N,) bool
    kind: str
    beta: float = 0.5
    column_weight: Tensor | None = None  # (V,) w of "targets", None for ones
    value: Tensor | None = None  # (N,) 0 at ignored rows; this and all below
    student_max: Tensor | None = None
    student_sum: Tensor | None = None  # log of the sum of exponentials relative to the maximum
    teacher_max: Tensor | None = None
    teacher_sum: Tensor | None = None  # as above; of "targets" the sum of w y itself
    center: Tensor | None = None
    grad: Tensor | None = None  # of the value, set for the backward

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

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        return (self.student_max, self.student_sum, self.teacher_max, self.teacher_sum, self.center)


def cut(rows: Rows, width: int) -> Rows:
    """The first `width` columns, without a copy."""
    return rows if rows.num_classes == width else replace(rows, data=rows.data[:, :, :width])


@jit
def held(maximum):
    """A maximum to subtract: 0 where there is none yet."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@jit
def divergence_kernel(
    student,  # (B, T, V)
    teacher,  # (B', T', V)
    column_weight,  # (V,)
    valid,  # (N,)
    value_out,  # (N,) this and the next four
    student_max_out,
    student_sum_out,
    teacher_max_out,
    teacher_sum_out,
    V,
    T,
    stride_b,
    stride_t,
    stride_v,
    softcap: tl.float64,
    scale: tl.float64,
    teacher_T,
    teacher_stride_b,
    teacher_stride_t,
    teacher_stride_v,
    teacher_softcap: tl.float64,
    teacher_scale: tl.float64,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    DOUBLE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    TEACHER_DOUBLE: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: both normalisers, and but for "jsd" the value, in one online sweep.

    Every line of a tile keeps sums of its own, relative to maxima of its own.
    """
    row = tl.program_id(0)
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if tl.load(valid + row) == 0:
        tl.store(value_out + row, tl.zeros((), DTYPE))
        tl.store(student_max_out + row, tl.zeros((), DTYPE))
        tl.store(student_sum_out + row, tl.zeros((), DTYPE))
        tl.store(teacher_max_out + row, tl.zeros((), DTYPE))
        tl.store(teacher_sum_out + row, tl.zeros((), DTYPE))
        return

    u_start = student + row_offset(row, T, stride_b, stride_t)
    w_start = teacher + row_offset(row, teacher_T, teacher_stride_b, teacher_stride_t)
    if ALIGNED:
        u_start = tl.multiple_of(u_start, 16)
        w_start = tl.multiple_of(w_start, 16)
    LINES: tl.constexpr = BLOCK_V // GROUP
    u_max = tl.full((LINES,), float("-inf"), DTYPE)
    w_max = tl.full((LINES,), float("-inf"), DTYPE)
    u_sum = tl.zeros((LINES,), DTYPE)
    w_sum = tl.zeros((LINES,), DTYPE)
    # sum_j e_j (difference of the shifted logits), e of the one the mean is taken over
    mixed = tl.zeros((LINES,), DTYPE)
    tile = tile_columns(ALIGNED, GROUP, BLOCK_V)
    ONE_LOOP: tl.constexpr = 1 if DOUBLE else 0
    whole = 0 if DOUBLE else V // BLOCK_V * BLOCK_V
    for REST in tl.static_range(ONE_LOOP, 2):
        for first in range(whole if REST else 0, V if REST else whole, BLOCK_V):
            columns = first + tile
            inside = columns < V if REST else None
            offsets = columns.to(tl.int64)
            u = load_logits(
                u_start + offsets * stride_v, inside, softcap, scale, SOFTCAP, SCALED, DOUBLE
            )
            new_max = tl.maximum(u_max, tl.max(u, axis=1))
            u_base = tl.maximum(new_max, LOWEST)
            u_rescale = tl.exp2((u_max - u_base) * LOG2E)
            u_shift = tl.where(u_max == float("-inf"), 0.0, u_max - u_base)
            u_max = new_max
            u = u - u_base[:, None]
            e = tl.exp2(u * LOG2E)
            if KIND == TARGETS:
                y = tl.load(w_start + offsets * teacher_stride_v, mask=inside, other=0.0).to(DTYPE)
                if WEIGHTED:
                    y = y * tl.load(column_weight + columns, mask=inside, other=0.0).to(DTYPE)
                # relative to the maximum, which the sum of y moves with
                terms = tl.where(y == 0, 0.0, y * u)
                mixed = mixed + w_sum * u_shift + tl.sum(terms, axis=1)
                w_sum = w_sum + tl.sum(y, axis=1)
            elif KIND != LSE:
                w = load_logits(
                    w_start + offsets * teacher_stride_v, inside, teacher_softcap, teacher_scale,
                    TEACHER_SOFTCAP, TEACHER_SCALED, TEACHER_DOUBLE,
                ).to(DTYPE)  # fmt: skip
                new_max = tl.maximum(w_max, tl.max(w, axis=1))
                w_base = tl.maximum(new_max, LOWEST)
                w_rescale = tl.exp2((w_max - w_base) * LOG2E)
                w_shift = tl.where(w_max == float("-inf"), 0.0, w_max - w_base)
                w_max = new_max
                w = w - w_base[:, None]
                f = tl.exp2(w * LOG2E)
                if KIND == FORWARD:
                    terms = tl.where(f == 0, 0.0, f * (w - u))
                    mixed = (mixed + w_sum * (w_shift - u_shift)) * w_rescale
                    mixed += tl.sum(terms, axis=1)
                if KIND == REVERSE:
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
    tl.store(student_max_out + row, u_base)
    tl.store(student_sum_out + row, u_log)
    if KIND == TARGETS:
        y_total = tl.sum(w_sum, axis=0)
        moved = tl.where(w_sum == 0, 0.0, w_sum * (tl.maximum(u_max, LOWEST) - u_base))
        tl.store(value_out + row, y_total * u_log - tl.sum(mixed + moved, axis=0))
        tl.store(teacher_max_out + row, tl.zeros((), DTYPE))
        tl.store(teacher_sum_out + row, y_total)
    elif KIND == LSE:
        tl.store(value_out + row, u_base + u_log)
        tl.store(teacher_max_out + row, tl.zeros((), DTYPE))
        tl.store(teacher_sum_out + row, tl.zeros((), DTYPE))
    else:
        w_base = held(tl.max(w_max, axis=0))
        w_rescale = tl.exp2((w_max - w_base) * LOG2E)
        w_shift = held(w_max - w_base)
        w_total = tl.sum(w_sum * w_rescale, axis=0)
        w_log = tl.log(w_total)
        tl.store(teacher_max_out + row, w_base)
        tl.store(teacher_sum_out + row, w_log)
        if KIND == FORWARD:
            mean = tl.sum((mixed + w_sum * (w_shift - u_shift)) * w_rescale, axis=0) / w_total
            tl.store(value_out + row, mean + u_log - w_log)
        if KIND == REVERSE:
            mean = tl.sum((mixed + u_sum * (u_shift - w_shift)) * u_rescale, axis=0) / u_total
            tl.store(value_out + row, mean + w_log - u_log)


@jit
def log_mixture(u, w, beta):
    """(p, q, log p, log q, log m), logarithms no less than FLOOR."""
    log_p = tl.maximum(u, FLOOR)
    log_q = tl.maximum(w, FLOOR)
    p = tl.exp2(u * LOG2E)
    q = tl.exp2(w * LOG2E)
    m = beta * q + (1 - beta) * p
    return p, q, log_p, log_q, tl.maximum(tl.log2(m) / LOG2E, FLOOR)


@jit
def jsd_kernel(
    student,  # (B, T, V)
    teacher,  # (B', T', V)
    valid,  # (N,)
    student_max,  # (N,) this and all below
    student_sum,
    teacher_max,
    teacher_sum,
    value_out,
    center_out,
    beta: tl.float64,
    V,
    T,
    stride_b,
    stride_t,
    stride_v,
    softcap: tl.float64,
    scale: tl.float64,
    teacher_T,
    teacher_stride_b,
    teacher_stride_t,
    teacher_stride_v,
    teacher_softcap: tl.float64,
    teacher_scale: tl.float64,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    DOUBLE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    TEACHER_DOUBLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: both divergences from the mixture, given both normalisers."""
    row = tl.program_id(0)
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if tl.load(valid + row) == 0:
        tl.store(value_out + row, tl.zeros((), DTYPE))
        tl.store(center_out + row, tl.zeros((), DTYPE))
        return
    u_start = student + row_offset(row, T, stride_b, stride_t)
    w_start = teacher + row_offset(row, teacher_T, teacher_stride_b, teacher_stride_t)
    u_max, u_log = tl.load(student_max + row), tl.load(student_sum + row)
    w_max, w_log = tl.load(teacher_max + row), tl.load(teacher_sum + row)
    share = tl.full((), beta, DTYPE)
    of_p = tl.zeros((BLOCK_V,), DTYPE)
    of_q = tl.zeros((BLOCK_V,), DTYPE)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < V
        offsets = columns.to(tl.int64)
        u = load_logits(
            u_start + offsets * stride_v, inside, softcap, scale, SOFTCAP, SCALED, DOUBLE
        )
        w = load_logits(
            w_start + offsets * teacher_stride_v, inside, teacher_softcap, teacher_scale,
            TEACHER_SOFTCAP, TEACHER_SCALED, TEACHER_DOUBLE,
        ).to(DTYPE)  # fmt: skip
        p, q, log_p, log_q, log_m = log_mixture(u - u_max - u_log, w - w_max - w_log, share)
        of_p += tl.where(p == 0, 0.0, p * (log_p - log_m))
        of_q += tl.where(q == 0, 0.0, q * (log_q - log_m))
    center = tl.sum(of_p, axis=0)
    tl.store(center_out + row, center)
    tl.store(value_out + row, share * tl.sum(of_q, axis=0) + (1 - share) * center)


@jit
def divergence_grad_kernel(
    student,  # (B, T, V)
    teacher,  # (B', T', V)
    out,  # (N, V), rows out_stride apart
    column_weight,  # (V,)
    valid,  # (N,)
    student_max,  # (N,) this and the next five
    student_sum,
    teacher_max,
    teacher_sum,
    center,
    grad,
    beta: tl.float64,
    out_stride,
    V,
    T,
    stride_b,
    stride_t,
    stride_v,
    softcap: tl.float64,
    scale: tl.float64,
    teacher_T,
    teacher_stride_b,
    teacher_stride_t,
    teacher_stride_v,
    teacher_softcap: tl.float64,
    teacher_scale: tl.float64,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    DOUBLE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    TEACHER_DOUBLE: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: the formulas at the head of this file, written or added to `out`."""
    row = tl.program_id(0)
    DTYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    out += row.to(tl.int64) * out_stride
    if tl.load(valid + row) == 0:
        if not ADD:
            for first in range(0, V, BLOCK_V):
                columns = first + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), out.dtype.element_ty)
                tl.store(out + columns, zeros, mask=columns < V)
        return
    u_start = student + row_offset(row, T, stride_b, stride_t)
    w_start = teacher + row_offset(row, teacher_T, teacher_stride_b, teacher_stride_t)
    u_max, u_log = tl.load(student_max + row), tl.load(student_sum + row)
    w_max, w_log = tl.load(teacher_max + row), tl.load(teacher_sum + row)
    middle, upstream = tl.load(center + row), tl.load(grad + row)
    share = tl.full((), beta, DTYPE)
    inverse_cap = 1 / tl.full((), softcap, DTYPE)
    factor = tl.full((), scale, DTYPE)
    # the divisions by the sums are one multiplication per row, outside the exponents and the loop
    of_p = upstream * tl.exp2(-u_log * LOG2E)
    of_q = upstream * tl.exp2(-w_log * LOG2E)
    if KIND == TARGETS:
        of_p = of_p * w_log
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < V
        offsets = columns.to(tl.int64)
        z = load_logits(
            u_start + offsets * stride_v, inside, softcap, scale, SOFTCAP, SCALED, DOUBLE
        )
        u = z - u_max
        if KIND == LSE:
            dz = tl.exp2(u * LOG2E) * of_p
        elif KIND == TARGETS:
            y = tl.load(w_start + offsets * teacher_stride_v, mask=inside, other=0.0).to(DTYPE)
            if WEIGHTED:
                y = y * tl.load(column_weight + columns, mask=inside, other=0.0).to(DTYPE)
            dz = tl.exp2(u * LOG2E) * of_p - y * upstream
        else:
            w = load_logits(
                w_start + offsets * teacher_stride_v, inside, teacher_softcap, teacher_scale,
                TEACHER_SOFTCAP, TEACHER_SCALED, TEACHER_DOUBLE,
            ).to(DTYPE) - w_max  # fmt: skip
            if KIND == FORWARD:
                dz = tl.exp2(u * LOG2E) * of_p - tl.exp2(w * LOG2E) * of_q
            elif KIND == REVERSE:
                log_ratio = tl.maximum(u, FLOOR) - tl.maximum(w, FLOOR)
                dz = tl.exp2(u * LOG2E) * (of_p * (log_ratio - u_log + w_log - middle))
            else:
                p, _, log_p, _, log_m = log_mixture(u - u_log, w - w_log, share)
                dz = p * (upstream * (1 - share) * (log_p - log_m - middle))
        if SOFTCAP:
            ratio = tl.maximum(z * inverse_cap, -1.0)
            dz = dz * (1.0 - ratio * ratio)
        if SCALED:
            dz = dz * factor
        if ADD:
            dz += tl.load(out + columns, mask=inside, other=0.0).to(DTYPE)
        tl.store(out + columns, dz.to(out.dtype.element_ty), mask=inside)


def both_arguments(pair: Pair) -> dict:
    """How a kernel addresses and transforms both; a teacher that is not read is the student."""
    arguments = pair.student.kernel_arguments()
    for name, value in (pair.teacher or pair.student).kernel_arguments().items():
        upper = name.isupper() and name != "T"
        arguments[f"TEACHER_{name}" if upper else f"teacher_{name}"] = value
    return arguments


def divergence_triton(pair: Pair) -> None:
    student, teacher, weight = pair.student, pair.teacher or pair.student, pair.column_weight
    data = (student.data, teacher.data)
    valid = pair.valid.view(torch.uint8)
    divergence_kernel[(student.num_rows,)](
        *data,
        pair.value if weight is None else weight,
        valid,
        pair.value,
        *pair.vectors[:4],
        pair.width,
        **both_arguments(pair),
        KIND=KINDS.index(pair.kind),
        WEIGHTED=weight is not None,
        ALIGNED=student.aligned and teacher.aligned,
        GROUP=16 // max(x.element_size() for x in data),
        **row_tile(student),
    )
    if pair.kind == "jsd":
        jsd_kernel[(student.num_rows,)](
            *data,
            valid,
            *pair.vectors[:4],
            pair.value,
            pair.center,
            pair.beta,
            pair.width,
            **both_arguments(pair),
            **row_tile(student),
        )
    elif pair.kind == "reverse":
        pair.center = pair.value


def divergence_grad_triton(pair: Pair, dlogits: Tensor, add: bool) -> None:
    weight = pair.column_weight
    divergence_grad_kernel[(pair.student.num_rows,)](
        pair.student.data,
        (pair.teacher or pair.student).data,
        dlogits,
        pair.grad if weight is None else weight,
        pair.valid.view(torch.uint8),
        *pair.vectors,
        pair.grad,
        pair.beta,
        dlogits.stride(0),
        pair.width,
        **both_arguments(pair),
        KIND=KINDS.index(pair.kind),
        WEIGHTED=weight is not None,
        ADD=add,
        **row_tile(pair.student),
    )


# -------------------------------------------------------------------------------- the torch twins


def raw_rows(rows: Rows, here: slice) -> Tensor:
    """Raw logits (R, V) of some rows, copied only where no stride leads from one to the next."""
    time = rows.data.shape[1]
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


def sum_of_exp(shifted: Tensor, into: Tensor) -> Tensor:
    """Row sums (R,) of the exponentials, which replace `shifted`; their logarithm in `into`."""
    total = exp_(shifted).sum(-1)
    torch.log(total, out=into)
    return total


def log_mixture_torch(log_p: Tensor, log_q: Tensor, beta: float, out: Tensor) -> Tensor:
    """`log(beta q + (1 - beta) p)` (R, V) in `out`."""
    exp_(out.copy_(log_q)).mul_(beta)
    return out.add_(exp_(log_p.clone()), alpha=1 - beta).log_()


def block_divergence(
    pair: Pair, raw: Tensor, here: slice, known: bool, buffers: list[Tensor]
) -> None:
    """All numbers of one block of rows; `known`: whether the student's normaliser is there."""
    student_max, student_sum, teacher_max, teacher_sum, center = (v[here] for v in pair.vectors)
    value = pair.value[here]
    u, w, t = (buffer[: raw.shape[0]] for buffer in buffers)
    loaded(pair.student, raw, u)
    if known:
        u.sub_(student_max[:, None])
    else:
        subtract_max(u, student_max)
    if pair.kind in ("forward", "reverse", "jsd"):
        loaded(pair.teacher, raw_rows(pair.teacher, here), w)
        subtract_max(w, teacher_max)
    if pair.kind == "forward":
        torch.sub(w, u, out=t)
        total = sum_of_exp(w, teacher_sum)
        mean = row_dot(w, t) / total
        if not known:
            sum_of_exp(u, student_sum)
        torch.add(mean, student_sum - teacher_sum, out=value)
    elif pair.kind == "reverse":
        torch.sub(u, w, out=t)
        total = sum_of_exp(u, student_sum)
        sum_of_exp(w, teacher_sum)
        torch.add(row_dot(u, t) / total, teacher_sum - student_sum, out=value)
        center.copy_(value)
    elif pair.kind == "jsd":
        sum_of_exp(t.copy_(u), student_sum)
        sum_of_exp(t.copy_(w), teacher_sum)
        log_p, log_q = u.sub_(student_sum[:, None]), w.sub_(teacher_sum[:, None])
        log_m = log_mixture_torch(log_p, log_q, pair.beta, t)
        p = exp_(log_p.clone())
        center.copy_(row_dot(p, log_p.sub_(log_m)))
        q = exp_(p.copy_(log_q))
        value.copy_(pair.beta * row_dot(q, log_q.sub_(log_m)) + (1 - pair.beta) * center)
    elif pair.kind == "targets":
        w.copy_(raw_rows(pair.teacher, here))
        if pair.column_weight is not None:
            w.mul_(pair.column_weight)
        torch.sum(w, -1, out=teacher_sum)
        dot = row_dot(w, t.copy_(u))
        if not known:
            sum_of_exp(u, student_sum)
        torch.sub(teacher_sum * student_sum, dot, out=value)
    else:
        if not known:
            sum_of_exp(u, student_sum)
        torch.add(student_max, student_sum, out=value)


def divergence_torch(pair: Pair, known: bool) -> None:
    student = pair.student

    def work(group: list[Block]) -> None:
        size = max(last - first for first, last, _ in group)
        buffers = [student.new(size, pair.width) for _ in range(3)]
        for first, last, raw in group:
            if pair.valid[first:last].any():
                block_divergence(pair, raw, slice(first, last), known, buffers)

    parallel(work, student.blocks())
    for vector in (pair.value, *pair.vectors):
        vector.masked_fill_(~pair.valid, 0)


def block_divergence_grad(pair: Pair, raw: Tensor, here: slice, buffers: list[Tensor]) -> Tensor:
    """The gradient (R, V) of one block of rows, in the first buffer."""
    student_max, student_sum, teacher_max, teacher_sum, center = (
        v[here, None] for v in pair.vectors
    )
    upstream = pair.grad[here, None]
    u, w, t = (buffer[: raw.shape[0]] for buffer in buffers)
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
        log_p = u.clamp_(min=-1e30).sub_(student_sum)
        log_m = log_mixture_torch(log_p, w.sub_(teacher_sum), pair.beta, t).clamp_(min=-1e30)
        torch.sub(log_p, log_m, out=w).sub_(center).mul_(upstream * (1 - pair.beta))
        exp_(log_p).mul_(w)
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
    groups, valid = student.blocks(), pairs[0].valid
    vectors = None if plain is None else RowVectors.of(student, plain, groups)
    num_classes = student.num_classes
    alone = plain is None and len(pairs) == 1

    def work(group: list[Block]) -> None:
        size = max(last - first for first, last, _ in group)
        buffers = [student.new(size, num_classes) for _ in range(3)]
        total = None if alone else student.new(size, num_classes)
        for first, last, raw in group:
            here, out = slice(first, last), dlogits[first:last]
            if not valid[here].any():
                out.zero_()
                continue
            if plain is not None:
                z = student.load(raw, buffers[0])
                block_grad(student, z, plain, vectors, first, last, total[: last - first])
            elif not alone:
                total.zero_()
            for pair in pairs:
                scratch = [b.view(-1)[: size * pair.width].view(size, -1) for b in buffers]
                part = block_divergence_grad(pair, raw[:, : pair.width], here, scratch)
                if not alone:
                    total[: last - first, : pair.width].add_(part)
            dz = part if alone else total[: last - first]
            dz.masked_fill_(~valid[here, None], 0)
            out[:, dz.shape[1] :].zero_()
            out[:, : dz.shape[1]].copy_(dz)

    parallel(work, groups)


# ------------------------------------------------------------------------------------- launchers


def divergence(pair: Pair, known: tuple[Tensor, Tensor] | None = None) -> Pair:
    """Fills the pair's numbers: one value per row, of the kind named at the head of this file.

    `known` may be the student's (row_max, log_sum) over these very columns, which spares the twin
    an exponential. Numbers have the student's compute dtype.
    """
    student = pair.student
    n = student.num_rows
    pair.value, pair.student_max, pair.student_sum, pair.teacher_max, pair.teacher_sum = (
        student.new(n).zero_() for _ in range(5)
    )
    pair.center = torch.zeros_like(pair.value)
    if n == 0:
        return pair
    if use_triton(student.data):
        divergence_triton(pair)
        return pair
    known = known if pair.kind in ("forward", "targets", "lse") else None
    if known is not None:
        pair.student_max.copy_(known[0])
        pair.student_sum.copy_(known[1])
    divergence_torch(pair, known is not None)
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
    if student.num_rows == 0:
        return dlogits
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
        divergence_grad_triton(pair, dlogits, add=plain is not None or padded or number > 0)
    return dlogits
