"""Statistics and gradients of logits (..., V) that lie in memory.

N tokens, V classes, K classes looked at, B samples.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows
from segloss.kernels.row_stats import RowStats
from segloss.sharding import Sharding
from segloss.sweep.attach import attach
from segloss.sweep.batch import Batch
from segloss.sweep.beside import (
    DIVERGENCES,
    LISTED,
    Backward,
    Divergence,
    Readings,
    has_plain,
    logits_gradient,
    pack,
)
from segloss.sweep.classes import class_ids, class_index, store_totals, thresholds
from segloss.sweep.request import Request, Sweep
from segloss.sweep.rows import request_stats
from segloss.sweep.terms import grad_terms, own_terms, row_slices, whole_dots


def sweep_dense(
    logits: Tensor, softcap: float | None, scale: float, batch: Batch, request: Request
) -> Sweep:
    """One read of the logits, then of the K columns that class statistics ask for."""
    sharding = batch.sharding
    with torch.no_grad():
        rows = Rows.of(logits, softcap, scale)
        stats = request_stats(rows, batch.target, batch.ignore_index, request, sharding)
        sweep = Sweep(
            stats.log_prob,
            stats.row_max + stats.log_sum,
            stats.entropy,
            stats.argmax,
            stats.logit_sum,
            stats.weight_sum,
            stats.num_finite,
            target=class_index(batch.target, batch.valid, batch.num_classes),
            **class_ids(request, batch),
        )
        readings = read_beside(rows, batch, request, stats)
        beside = readings.outputs()
        sweep.listed, sweep.divergences = beside[LISTED], beside[DIVERGENCES]
        peak_row = None
        at = (rows, stats.row_max, stats.log_sum)
        prob_sum = peak = None
        if request.prob_sums:
            columns = sharding.columns(sweep.classes)
            prob_sum = class_sums(*at, columns, sweep.sample, sweep.num_samples, batch.token_weight)
        if request.peaks:
            peak, peak_row = class_peaks(*at, sweep.sample, sweep.num_samples)
            peak_row = sharding.spread(peak_row, -1)
        store_totals(sweep, batch, prob_sum, peak)
        if request.rankings:
            tau = thresholds(request, batch, sweep)
            here = sharding.place(sweep.present)
            columns, own = sharding.columns(sweep.present), sharding.within(sweep.own, here)
            found = candidates(*at, columns, sweep.sample, own, tau[:, here])
            sweep.candidate_row, sweep.candidate_prob = found.row, found.prob
            sweep.candidate_class = found.class_index + here.start
    names = ("log_prob", "lse", "entropy", "logit_sum", "prob_sum", "candidate_prob", "peak_prob",
             LISTED, DIVERGENCES)  # fmt: skip
    outputs = {name: getattr(sweep, name) for name in names}
    packed, seconds = pack(batch.beside, request.divergences)
    saved = {
        "target": batch.target,
        "valid": batch.valid,
        "row_max": stats.row_max,
        "log_sum": stats.log_sum,
        "column_weight": request.column_weight,
        "row_weight": batch.token_weight,
        "sample": sweep.sample,
        "classes": sweep.classes,
        "present": sweep.present,
        "candidate_row": sweep.candidate_row,
        "candidate_class": sweep.candidate_class,
        "peak_row": peak_row,
        **readings.saved(),
        **packed,
    }
    rule = functools.partial(
        grad_dense,
        softcap=softcap,
        scale=scale,
        sharding=sharding,
        divergences=request.divergences,
        seconds=seconds,
    )
    sweep = replace(sweep, **attach(rule, outputs, saved, (logits,)))
    sweep.named(batch.beside, request.divergences)
    return sweep


def read_beside(rows: Rows, batch: Batch, request: Request, stats: RowStats) -> Readings:
    """Listed classes and divergences, as many rows at a time as the second matrix makes."""
    sharding = batch.sharding
    readings = Readings(batch.beside, batch.valid, request.divergences, sharding)
    if readings.any:
        step = batch.beside.block_rows(rows.num_rows)
        if not sharding.is_whole and step < rows.num_rows:
            # other ranks' chunks must be the same, and cannot follow the strides of these logits
            rows = replace(rows, data=rows.data.reshape(1, rows.num_rows, rows.num_classes))
        for here, part in row_chunks(rows, step):
            some = stats._replace(row_max=stats.row_max[here], log_sum=stats.log_sum[here])
            readings.read(part, here, some)
    return readings


def row_chunks(rows: Rows, step: int) -> list[tuple[slice, Rows]]:
    """All rows, at most `step` at a time, without copies; one empty chunk where there are none."""
    if step >= rows.num_rows:
        return [(slice(0, rows.num_rows), rows)]
    try:
        data = rows.data.view(1, rows.num_rows, rows.num_classes)
    except RuntimeError:
        data = rows.data
    chunks = []
    for b, sample in enumerate(data):
        for first in range(0, len(sample), step):
            part = sample[None, first : first + step]
            start = b * len(sample) + first
            chunks.append((slice(start, start + part.shape[1]), replace(rows, data=part)))
    return chunks


def grad_dense(
    tensors: tuple,
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
    needed: tuple,
    *,
    softcap: float | None,
    scale: float,
    sharding: Sharding,
    divergences: tuple[Divergence, ...],
    seconds: dict,
) -> tuple:
    """dlogits, from the gradients of the statistics."""
    (logits,) = tensors
    rows = Rows.of(logits, softcap, scale)
    terms = own_terms(grad_terms(saved, grads, sharding), sharding)
    if terms.class_grad is not None:
        dots = row_dots(
            rows, terms.row_max, terms.log_sum, terms.columns, terms.sample, terms.class_grad
        )
        if terms.row_weight is not None:
            dots = dots * terms.row_weight
        terms.prob_coef = terms.prob_coef - dots
    whole_dots(terms, saved, grads, sharding)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out = dlogits.flatten(0, -2)
    back = Backward.of(saved, grads.get(DIVERGENCES), divergences, sharding, seconds)
    chunks = row_chunks(rows, back.beside.block_rows(rows.num_rows))
    several = row_slices(terms, [here for here, _ in chunks]) if len(chunks) > 1 else [terms]
    for (here, part), some in zip(chunks, several, strict=True):
        logits_gradient(part, some, back.pairs(part, here), out[here], has_plain(grads))
    return (dlogits,)
