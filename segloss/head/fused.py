"""A sum over rows: gradients are formed while a chunk's logits are there, by three products.

N tokens, R rows of a chunk, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segloss.head.gradients import Gradients, factored_block
from segloss.head.inplace import InPlace, fits_in_place, rows_read
from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import (
    beside_others,
    chunk_buffer,
    chunk_slices,
    compact_batch,
    even_slices,
    kept_rows,
    spread,
)
from segloss.kernels.common import Rows
from segloss.kernels.products import GradBlock
from segloss.sweep.attach import only_once
from segloss.sweep.batch import Batch
from segloss.sweep.beside import DIVERGENCES, Reading, has_plain, logits_gradient
from segloss.sweep.request import RowSum, TokenStats
from segloss.sweep.row_sum import chunk_gradients, finished
from segloss.sweep.rows import read_spent, request_stats


def row_sum(inputs: Inputs, batch: Batch, plan: RowSum) -> tuple[Tensor, TokenStats]:
    """(value (), detached per-token statistics (N,))."""
    with torch.autocast(inputs.device.type, enabled=False):
        names, options = tuple(inputs.tensors), inputs.options
        value, *stats = _RowSum.apply(names, options, batch, plan, *inputs.tensors.values())
    found = TokenStats(*stats[:4])
    found.listed = stats[4]
    return value, found


def forward(inputs: Inputs, batch: Batch, plan: RowSum, needed: dict):
    """The value, the row statistics, the gradients of the tensors and what they are still to be
    multiplied by, beside the upstream gradient."""
    rows = kept_rows(inputs, batch)
    inner = compact_batch(batch, rows)
    head = Head.of(inputs, rows, inner.valid)
    weights = inner.weights()
    # only float16 has too small a range for dlogits that hold 1 / N
    half = head.hidden.dtype == torch.float16
    scale: Tensor | float = power_of_two(plan, weights) if half else 1.0
    num_rows = head.hidden.shape[0]
    request = plan.request
    inputs = beside_others(inputs, inner, request)
    in_place = fits_in_place(inputs, num_rows, needed["weight"])
    if in_place:
        slices = even_slices(num_rows, rows_read(inputs, num_rows))
    else:
        slices = chunk_slices(inputs, num_rows, needed["weight"], row_sum=True)
    total = Gradients(inputs, head, needed, groups=1 if in_place else len(slices), held=True)
    total.threshold = inputs.filter_limit / (plan.denominator * scale)
    loss = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
    collected = []
    out = chunk_buffer(head, slices)
    whole = slice(0, head.weight.shape[0])
    # smoothing adds to every column and a filter reads dlogits itself; on a GPU the exponentials
    # would take a second read anyway, and the target's part a synchronisation
    listed, count = inner.beside.listed is not None, len(request.divergences)
    sharding = inputs.sharding
    plain = total.filtering or request.column_sums or listed or out.is_cuda
    factored = not (plain or count)
    # what comes of a single divergence is a number of the row times the gradient of its value
    spent = count == 1 and not (plain or plan.plain) and sharding.is_whole

    def gradient(z: Rows, here: slice) -> GradBlock:
        """dlogits of some rows over their logits z."""
        nonlocal loss, spent
        target, valid = inner.target[here], inner.valid[here]
        asked, beside = (z, target, batch.ignore_index, request, sharding), inner.beside.take(here)
        if spent:
            stats, reading = read_spent(*asked, beside, valid)
        else:
            stats = request_stats(*asked, exp_out=z.data[0] if factored else None)
            reading = Reading.of(z, beside, valid, request.divergences, sharding, stats)
        value, lse, named, terms = chunk_gradients(
            plan, stats, reading, target, weights[here], scale
        )
        loss += value
        log_prob = stats.log_prob.detach()
        listed = None if reading.listed is None else reading.listed.detach()
        collected.append((log_prob, lse, stats.entropy, stats.argmax, listed))
        if spent and set(named) != {DIVERGENCES}:  # a formula that reads more than its loss says
            spent, z = False, head.take(here).logits(z.data.view(-1))
        if factored:
            return factored_block(z, terms, log_prob, stats.exp_scale)
        if spent:
            (pair,) = reading.upstream(named[DIVERGENCES])
            return GradBlock(z.data[0], pair.grad[:, None])
        pairs = reading.upstream(named.get(DIVERGENCES))
        return GradBlock(logits_gradient(z, terms, pairs, z.data[0], has_plain(named)))

    if in_place:
        there = InPlace(head, total.weight_memory())
        for here in slices:
            there.put(here, gradient(there.take(here, out), here))
        for classes, block in there.blocks():
            total.block(block, slice(0, num_rows), classes)
        del there, block
    else:
        for here in slices:
            total.block(gradient(head.take(here).logits(out), here), here, whole)
    del out  # the logits
    grads = total.result(rows)
    num_tokens = batch.target.numel()
    columns = [
        None if column[0] is None else torch.cat(column) for column in zip(*collected, strict=True)
    ]
    fills = (0, 0, 0, -1, 0)
    per_token = [spread(c, rows, num_tokens, f) for c, f in zip(columns, fills, strict=True)]
    return loss, per_token, grads, scale


def power_of_two(plan: RowSum, weights: Tensor) -> Tensor:
    """About the largest factor of a token's gradient, as a power of two (exact to divide by)."""
    largest = sum((factor.abs() for factor, _ in plan.terms), start=weights.new_zeros(()))
    if weights.numel():
        largest = largest * weights.amax()
    usable = (largest > 0) & (largest < torch.inf)
    return torch.exp2(torch.ceil(torch.log2(torch.where(usable, largest, 1))))


class _RowSum(torch.autograd.Function):
    """Gradients are formed in forward and handed over, not copied, by the first backward; a second
    backward through the same graph makes them again."""

    @staticmethod
    def forward(ctx, names, options, batch, plan, *tensors):
        inputs = Inputs(dict(zip(names, tensors, strict=True)), options)
        needed = dict(zip(names, ctx.needs_input_grad[4:], strict=True))
        loss, stats, *ctx.grads = forward(inputs, batch, plan, needed)
        ctx.again = names, options, batch, plan, needed
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return (loss, *stats)

    @staticmethod
    def backward(ctx, grad, *_):
        tensors = ctx.saved_tensors
        found, ctx.grads = ctx.grads, None
        if found is None:
            names, options, batch, plan, needed = ctx.again
            inputs = Inputs(dict(zip(names, tensors, strict=True)), options)
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                _, _, *found = forward(inputs, batch, plan, needed)
        grads, scale = found
        with torch.no_grad():
            pairs = zip(grads, tensors, strict=True)
            grads = tuple(None if g is None else finished(g, grad * scale, t) for g, t in pairs)
        return (None, None, None, None, *only_once(grads))
