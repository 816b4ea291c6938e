"""Statistics of a head a chunk at a time: one product, its chunks read while they are there.

N tokens (the valid ones, with `compact`), V classes, R rows of a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from segloss.head import frozen, recompute
from segloss.head.gradients import Gradients
from segloss.head.inputs import Inputs, Options, is_frozen
from segloss.head.matrices import Head
from segloss.head.panels import ClassTotals, panel_candidates, subtract_dots
from segloss.head.rows import (
    beside_others,
    chunk_slices,
    compact_batch,
    compacted,
    kept_rows,
    renumbered,
    spread,
)
from segloss.sweep.attach import attach
from segloss.sweep.batch import Batch
from segloss.sweep.beside import (
    DIVERGENCES,
    LISTED,
    Backward,
    Divergence,
    Readings,
    has_plain,
    pack,
)
from segloss.sweep.classes import class_ids, class_index, thresholds
from segloss.sweep.request import Request, Sweep
from segloss.sweep.rows import request_stats
from segloss.sweep.terms import grad_terms, listed_rest, own_terms, rescale, whole_dots

Mode = frozen.Frozen | recompute.Recompute
ROW_OUTPUTS = ("log_prob", "lse", "entropy", "logit_sum", LISTED, DIVERGENCES)
ROW_STATS = ("log_prob", "lse", "entropy", "logit_sum", "argmax", "weight_sum", "num_finite")


def sweep(inputs: Inputs, batch: Batch, request: Request) -> Sweep:
    """Every statistic of the request; gradients come later."""
    needed = inputs.needed()
    num_tokens = batch.target.numel()
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        rows = kept_rows(inputs, batch)
        inner = compact_batch(batch, rows)
        head = Head.of(inputs, rows, inner.valid)
        ids = class_ids(request, batch)
        row_ids = {n: compacted(ids.get(n), rows) for n in ("sample", "own")}
        collected: list = []
        per_class = ClassTotals(inputs, request, ids, row_ids["sample"], inner)
        inputs = beside_others(inputs, inner, request)
        slices = chunk_slices(inputs, head.hidden.shape[0], needed["weight"])
        readings = Readings(inner.beside, inner.valid, request.divergences, inputs.sharding)
        whole = request.prob_sums and ids["classes"] is None
        mode = mode_of(inputs, head, slices, needed, whole)
        for here in slices:
            z = mode.logits(head, here)
            panel = per_class.panel(z)
            stats = request_stats(
                z,
                inner.target[here],
                batch.ignore_index,
                request,
                inputs.sharding,
                exp_out=mode.exp_out(z, z if readings.any else panel),
            )
            collected.append(stats)
            mode.keep_pairs(head, z, readings.read(z, here, stats))
            per_class.add(panel, stats, here)
            mode.keep(head, z, stats, inner, here)
        stacked: dict[str, Tensor] = {
            name: torch.cat([getattr(c, name) for c in collected])
            for name in (*ROW_STATS, "row_max", "log_sum")
            if name != "lse" and getattr(collected[0], name) is not None
        }
        stacked["lse"] = stacked["row_max"] + stacked["log_sum"]
        stacked |= readings.outputs()
        values: dict[str, Any] = {
            name: spread(stacked.get(name), rows, num_tokens, -1 if name == "argmax" else 0)
            for name in (*ROW_STATS, LISTED, DIVERGENCES)
        }
        target = class_index(batch.target, batch.valid, batch.num_classes)
        found = Sweep(**values, target=target, **ids)
        per_class.store(found)
        if request.rankings:
            tau = thresholds(request, batch, found)
            entries = panel_candidates(inputs, head, stacked, found.present, row_ids, tau)
            found.candidate_row, found.candidate_class, found.candidate_prob = entries
            if rows is not None:
                found.candidate_row = rows[found.candidate_row]
    names = (*ROW_OUTPUTS, "prob_sum", "candidate_prob", "peak_prob")
    outputs = {name: getattr(found, name) for name in names}
    packed, seconds = pack(batch.beside, request.divergences)
    saved = {
        **kept_statistics(found, inner, stacked, row_ids["sample"], rows, request),
        "peak_row": renumbered(per_class.peak_row, rows),
        **readings.saved(),
        **packed,
        **mode.saved(),
    }
    # of tensors the rule keeps what it may spend alone: all others live in the saved ones
    rule = functools.partial(
        gradients,
        names=tuple(inputs.tensors),
        options=inputs.options,
        kept=mode.left(),
        divergences=request.divergences,
        seconds=seconds,
    )
    found = replace(found, **attach(rule, outputs, saved, tuple(inputs.tensors.values())))
    found.named(batch.beside, request.divergences)
    return found


def kept_statistics(
    found: Sweep,
    batch: Batch,
    stacked: dict[str, Tensor],
    sample: Tensor | None,
    rows: Tensor | None,
    request: Request,
) -> dict[str, Any]:
    """What every backward needs of a sweep over chunks; `batch` holds the kept `rows` alone."""
    return {
        "rows": rows,
        "target": batch.target,
        "valid": batch.valid,
        "row_max": stacked["row_max"],
        "log_sum": stacked["log_sum"],
        "column_weight": request.column_weight,
        "row_weight": batch.token_weight,
        "sample": sample,
        "classes": found.classes,
        "present": found.present,
        "candidate_row": found.candidate_row,
        "candidate_class": found.candidate_class,
    }


def mode_of(
    inputs: Inputs, head: Head, slices: list[slice], needed: dict[str, bool], whole: bool
) -> Mode:
    """What forward leaves for backward: nothing without gradients, nor where sums over all classes
    (`whole`) make backward read all logits before it begins, in as much memory."""
    if is_frozen(needed):
        return frozen.Frozen(inputs, head, slices)
    return recompute.Recompute(inputs, head, slices, keeps=any(needed.values()) and not whole)


def gradients(
    tensors,
    saved,
    grads,
    needed,
    *,
    names: tuple,
    options: Options,
    kept: recompute.Kept | None,
    divergences: tuple[Divergence, ...],
    seconds: dict,
) -> tuple:
    """Gradients of the head's tensors, from those of the statistics."""
    inputs = Inputs(dict(zip(names, tensors, strict=True)), options)
    rows = saved.get("rows")
    head = Head.of(inputs, rows, saved["valid"])
    if rows is not None:
        grads = {name: grad[rows] if name in ROW_OUTPUTS else grad for name, grad in grads.items()}
        saved = kept_rows_only(saved, rows)
    # float16 has too small a range for dlogits that hold 1 / N; a filter's limit is of large ones
    rescaled = head.hidden.dtype == torch.float16 or options.grad_filter > 0
    wanted = dict(zip(names, needed, strict=True))
    upstream = grads.get(DIVERGENCES)
    scale: Tensor | float
    covers_all = "prob_sum" in grads and saved.get("classes") is None
    if "qw" in saved and not (covers_all or {"entropy", "logit_sum"} & set(grads)):
        rest = listed_rest(saved, grads) if LISTED in grads else None
        plain = {name: grad for name, grad in grads.items() if name != LISTED}
        terms = own_terms(grad_terms(saved, plain, inputs.sharding), inputs.sharding)
        subtract_dots(inputs, head, terms)
        whole_dots(terms, saved, plain, inputs.sharding)
        if rest is not None:
            terms.prob_coef = terms.prob_coef - rest.sum(-1)
        scale = rescale(terms) if rescaled else 1.0
        total = Gradients(inputs, head, wanted, groups=1, scale=scale)
        hidden = total.hidden[0] = frozen.hidden_grad(inputs, head, terms, saved)
        if rest is not None:
            frozen.add_listed(inputs, head, saved, rest / scale, hidden)
        if upstream is not None:
            frozen.add_pairs(saved, upstream / scale, hidden)
        return total.result(rows)
    terms = own_terms(grad_terms(saved, grads, inputs.sharding), inputs.sharding)
    subtract_dots(inputs, head, terms)
    whole_dots(terms, saved, grads, inputs.sharding)
    others = () if upstream is None else (upstream,)
    scale = rescale(terms, *others) if rescaled else 1.0
    total = Gradients(inputs, head, wanted, groups=1 + (kept is not None), scale=scale)
    total.threshold = inputs.filter_limit
    at_scale = None if upstream is None else upstream / scale
    back = Backward.of(saved, at_scale, divergences, inputs.sharding, seconds)
    # as in forward, a teacher's logits are made beside each block of these
    inputs = replace(inputs, other_classes=back.beside.made_classes)
    recompute.add_gradients(inputs, head, terms, total, kept, back, has_plain(grads))
    return total.result(rows)


def kept_rows_only(saved: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Per-token values at the kept rows, and rows by their number among those."""
    saved = saved | {name: saved[name][rows] for name in ROW_OUTPUTS if name in saved}
    size = int(rows[-1]) + 1 if rows.numel() else 0
    place = torch.zeros(size, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(rows.numel(), device=rows.device)
    for name in ("candidate_row", "peak_row"):
        if name in saved:
            saved[name] = renumbered(saved[name], place)
    return saved
