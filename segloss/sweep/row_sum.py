"""A sum over rows whose gradient is formed with it, while a chunk's logits are at hand.

N tokens, R rows of a chunk, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import GradTerms
from segloss.kernels.row_stats import RowStats
from segloss.kernels.scale import scaled
from segloss.sweep.beside import DIVERGENCES, LISTED, Reading
from segloss.sweep.classes import class_index
from segloss.sweep.request import RowSum, TokenStats
from segloss.sweep.terms import grad_terms, own_terms


def chunk_gradients(
    plan: RowSum,
    stats: RowStats,
    reading: Reading,
    target: Tensor,
    weights: Tensor,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor], GradTerms]:
    """(value (), lse (R,), the statistics' gradients and the terms of dlogits, both divided by
    `scale`) of a chunk's statistics and what else was read of it."""
    valid, beside, divergences = reading.valid, reading.beside, plan.request.divergences
    sharding = reading.sharding
    leaves: dict[str, Any] = {
        "log_prob": stats.log_prob,
        "lse": stats.row_max + stats.log_sum,
        "logit_sum": stats.logit_sum,
        LISTED: reading.listed,
        DIVERGENCES: reading.values,
    }
    leaves = {n: v.requires_grad_() for n, v in leaves.items() if v is not None}
    rest = {n: getattr(stats, n) for n in ("weight_sum", "num_finite")}
    index = class_index(target, valid, sharding.num_classes)
    token_stats = TokenStats(**leaves, **rest, target=index)
    with torch.enable_grad():
        token_stats.named(beside, divergences)
        value = chunk_value(plan, token_stats, target, valid, weights)
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
        "ids": beside.listed,
    }
    terms = own_terms(grad_terms(saved, named, sharding), sharding)
    return value.detach(), leaves["lse"].detach(), named, terms


def chunk_value(plan: RowSum, stats: TokenStats, target, valid, weights) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for factor, values in plan.terms:
        value = torch.where(valid, values(stats, target, valid), 0)
        total = total + factor * (value * weights).sum()
    return total


def target_gradient(rows: Rows, terms: GradTerms, log_prob: Tensor) -> Tensor:
    """dL/dlogit at the targets (R,), 0 if ignored or elsewhere, without class sums' and entries'
    part."""
    slope = rows.slope(log_prob + terms.row_max + terms.log_sum)
    p_y = log_prob.exp()
    dz_y = (p_y * (terms.prob_coef + terms.target_coef) + terms.target_rest) * slope
    return torch.where(terms.valid & (terms.target >= 0), dz_y, 0)


def row_scale(terms: GradTerms, exp_scale: Tensor) -> Tensor:
    """(R, 1): what `exp(z - row_max)` is multiplied by in dlogits, `exp_scale` (R,) in p."""
    return torch.where(terms.valid, terms.prob_coef * exp_scale, 0)[:, None]


def finished(grad: Tensor, factor: Tensor, tensor: Tensor) -> Tensor:
    """A gradient times what was known last, in its tensor's dtype: rounded here, and once."""
    same = grad.dtype == tensor.dtype
    return scaled(grad, factor, grad if same else torch.empty_like(grad, dtype=tensor.dtype))
