"""A sum over rows whose gradient is formed with it, while a chunk's logits are at hand.

N tokens, R rows of a chunk, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.divergence import Pair
from segloss.kernels.logit_grad import GradTerms, scaled_rows
from segloss.kernels.row_stats import row_stats
from segloss.kernels.scale import scaled
from segloss.sweep.attach import only_once
from segloss.sweep.batch import Batch
from segloss.sweep.beside import (
    DIVERGENCES,
    LISTED,
    Reading,
    Readings,
    has_plain,
    logits_gradient,
)
from segloss.sweep.classes import class_index
from segloss.sweep.request import RowSum, TokenStats
from segloss.sweep.terms import grad_terms

# Exponentials of a chunk of logits, which wait in a CPU's last cache for their rows' gradients
# (measured: bench/NOTES.md)
WAITING_BYTES = 16 << 20


class ChunkGradients(NamedTuple):
    """What a chunk's statistics come to, its gradients divided by a scale."""

    value: Tensor  # ()
    lse: Tensor  # (R,)
    terms: GradTerms  # of dlogits
    pairs: list[Pair]  # what else has a part in them
    plain: bool  # whether the terms have one


def chunk_gradients(
    plan: RowSum,
    stats,
    target: Tensor,
    valid: Tensor,
    weights: Tensor,
    num_classes: int,
    reading: Reading,
    scale: Tensor | float = 1.0,
) -> ChunkGradients:
    leaves: dict[str, Any] = {
        "log_prob": stats.log_prob,
        "lse": stats.row_max + stats.log_sum,
        "logit_sum": stats.logit_sum,
        LISTED: reading.listed,
        DIVERGENCES: reading.values,
    }
    leaves = {n: v.requires_grad_() for n, v in leaves.items() if v is not None}
    rest = {n: getattr(stats, n) for n in ("weight_sum", "num_finite")}
    index = class_index(target, valid, num_classes)
    given = TokenStats(**leaves, **rest, target=index)
    with torch.enable_grad():
        given.named(reading.beside, reading.divergences)
        value = chunk_value(plan, given, target, valid, weights)
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    named = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
    if isinstance(scale, Tensor):
        named = {n: g / scale for n, g in named.items()}
    saved = {
        "valid": valid,
        "target": target,
        "row_max": stats.row_max,
        "log_sum": stats.log_sum,
        "log_prob": stats.log_prob.detach(),
        "column_weight": plan.request.column_weight,
        "ids": reading.beside.listed,
    }
    pairs = reading.upstream(named.get(DIVERGENCES))
    terms = grad_terms(saved, named)
    return ChunkGradients(value.detach(), leaves["lse"].detach(), terms, pairs, has_plain(named))


def token_stats(columns: Sequence[Tensor | None]) -> TokenStats:
    """Of log_prob, lse, entropy, argmax and listed log-probabilities, as a sum collects them."""
    stats = TokenStats(*columns[:4])  # type: ignore[arg-type]  # no more than these
    stats.listed = columns[4]
    return stats


def chunk_value(plan: RowSum, stats: TokenStats, target, valid, weights) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for factor, values in plan.terms:
        value = torch.where(valid, values(stats, target, valid), 0)
        total = total + factor * (value * weights).sum()
    return total


def target_gradient(rows: Rows, terms: GradTerms, log_prob: Tensor) -> Tensor:
    """dL/dlogit at the targets (R,), 0 if ignored, without class sums' and entries' part."""
    slope = rows.slope(log_prob + terms.row_max + terms.log_sum)
    p_y = log_prob.exp()
    dz_y = (p_y * (terms.prob_coef + terms.target_coef) + terms.target_rest) * slope
    return torch.where(terms.valid, dz_y, 0)


def row_scale(terms: GradTerms) -> Tensor:
    """(R, 1): what `exp(z - row_max)` is multiplied by in dlogits."""
    return torch.where(terms.valid, terms.prob_coef * torch.exp(-terms.log_sum), 0)[:, None]


def finished(grad: Tensor, factor: Tensor, tensor: Tensor) -> Tensor:
    """A gradient times what was known last, in its tensor's dtype: rounded here, and once."""
    same = grad.dtype == tensor.dtype
    return scaled(grad, factor, grad if same else torch.empty_like(grad, dtype=tensor.dtype))


# ------------------------------------------------------------------------------- a tensor of logits


def row_sum_dense(
    logits: Tensor, softcap: float | None, scale: float, batch: Batch, plan: RowSum
) -> tuple[Tensor, TokenStats]:
    """(value (), detached per-token statistics (N,)) of a tensor on a CPU: one exponential of each
    logit serves the value and the gradient, and the logits are read once."""
    with torch.autocast(logits.device.type, enabled=False):
        value, *stats = _RowSumDense.apply(logits, softcap, scale, batch, plan)
    return value, token_stats(stats)


def forward(logits: Tensor, softcap, scale, batch: Batch, plan: RowSum):
    """(value, per-token statistics, dlogits: of float16 in float32, since a factor is to come)."""
    every = Rows.of(logits, softcap, scale)
    num_classes, request, weights = every.num_classes, plan.request, batch.weights()
    held = torch.promote_types(logits.dtype, torch.bfloat16)
    dlogits = torch.empty(logits.shape, dtype=held, device=logits.device)
    flat = dlogits.view(-1, num_classes)
    readings = Readings(batch.beside, batch.valid, request.divergences)
    # smoothing adds to every column
    factored = not (request.column_sums or readings.any)
    most = max(1, WAITING_BYTES // (every.dtype.itemsize * num_classes))
    waiting = every.new(min(most, max(1, every.num_rows)) if factored else 0, num_classes)
    total = torch.zeros((), dtype=batch.dtype, device=logits.device)
    collected = []
    most = batch.beside.block_rows(every.num_rows) if readings.any else most
    for first, rows in every.chunks(most):
        here = slice(first, first + rows.num_rows)
        target, valid = batch.target[here], batch.valid[here]
        exp_out = waiting[: rows.num_rows] if factored else None
        stats = row_stats(
            rows,
            target,
            batch.ignore_index,
            entropy=request.entropy,
            argmax=request.argmax,
            column_sums=request.column_sums,
            column_weight=request.column_weight,
            exp_out=exp_out,
        )
        reading = readings.read(rows, here, stats)
        value, lse, terms, pairs, plain = chunk_gradients(
            plan, stats, target, valid, weights[here], num_classes, reading
        )
        log_prob = stats.log_prob.detach()
        if factored:
            own = target_gradient(rows, terms, log_prob)
            scaled_rows(exp_out, row_scale(terms), target, own, flat[here])
        else:
            logits_gradient(rows, terms, pairs, flat[here], plain)
        total += value
        collected.append((log_prob, lse, stats.entropy, stats.argmax))
    columns = [None if c[0] is None else torch.cat(c) for c in zip(*collected, strict=True)]
    return total, [*columns, readings.outputs()[LISTED]], dlogits


class _RowSumDense(torch.autograd.Function):
    """The gradient is formed in forward and handed over by the first backward; a second one makes
    it again."""

    @staticmethod
    def forward(ctx, logits, softcap, scale, batch, plan):
        total, stats, ctx.grad = forward(logits, softcap, scale, batch, plan)
        ctx.again = softcap, scale, batch, plan
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return (total, *stats)

    @staticmethod
    def backward(ctx, grad, *_):
        (logits,) = ctx.saved_tensors
        found, ctx.grad = ctx.grad, None
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if found is None:
                found = forward(logits, *ctx.again)[-1]
            found = finished(found, grad, logits)
        return only_once((found,)) + (None,) * 4
