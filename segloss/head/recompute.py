"""Any loss of a head that is trained: backward makes the logits again, less those that were kept.

N tokens, C classes of a block of the vocabulary, V in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segloss.head.gradients import Gradients
from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import chunk_buffer, rows_within_budget
from segloss.kernels.common import Rows
from segloss.kernels.divergence import Pair
from segloss.kernels.logit_grad import GradTerms
from segloss.kernels.products import GradBlock
from segloss.sweep.batch import Batch
from segloss.sweep.beside import Reading, logits_gradient
from segloss.sweep.terms import column_slice


class Recompute:
    """What forward keeps for backward: logits of the first rows, as many as the budget takes."""

    def __init__(self, inputs: Inputs, head: Head, slices: list[slice], keeps: bool):
        self.num_kept = rows_within_budget(inputs, slices) if keeps else 0
        self.kept = head.hidden.new_empty(self.num_kept, inputs.num_classes)
        self.out = chunk_buffer(head, [s for s in slices if s.stop > self.num_kept])

    def logits(self, head: Head, here: slice) -> Rows:
        keep = here.stop <= self.num_kept
        return head.take(here).logits(self.kept[here].view(-1) if keep else self.out)

    def exp_out(self, z: Rows, panel: Rows | None) -> Tensor | None:
        return None

    def keep(self, head: Head, z: Rows, stats, batch: Batch, here: slice) -> None:
        pass

    def keep_pairs(self, head: Head, z: Rows, reading: Reading) -> None:
        pass

    def saved(self) -> dict[str, Any]:
        return {"logits": self.kept if self.num_kept else None}


def add_gradients(
    inputs: Inputs,
    head: Head,
    terms: GradTerms,
    total: Gradients,
    kept: Tensor | None,
    pairs: Callable[[Rows, slice], list[Pair]],
    plain: bool,
) -> None:
    """A block of the vocabulary at a time, all rows at once: each slice of dweight is contracted
    over every row by one product and needs no float32 copy of the whole.

    `pairs` of a block's logits and classes have gradients beside the terms, if `plain` says that
    these have any."""
    num_rows, num_classes = head.hidden.shape[0], head.weight.shape[0]
    width = max(1, inputs.chunk_rows(num_rows) * num_classes // max(1, num_rows))
    width = num_classes if width >= num_classes else max(1, width // 128 * 128 or width)
    out = head.hidden.new_empty(num_rows * min(width, num_classes))
    every = slice(0, num_rows)
    rewrites = terms.class_grad is not None or terms.entry_grad is not None
    for first in range(0, num_classes, width):
        classes = slice(first, min(first + width, num_classes))
        z = recomputed_logits(head.columns(classes), kept, classes, out)
        part = column_slice(terms, classes.start, classes.stop)
        # the later passes of a Triton kernel read the logits again
        dlogits = torch.empty_like(z.data[0]) if rewrites and z.data.is_cuda else z.data[0]
        logits_gradient(z, part, pairs(z, classes), dlogits, plain)
        total.block(GradBlock(dlogits), every, classes, inputs.options.grad_filter > 0)


def recomputed_logits(head: Head, kept: Tensor | None, classes: slice, out: Tensor) -> Rows:
    """Logits (N, C) of a vocabulary block, the rows kept from forward copied."""
    if kept is None:
        return head.logits(out)
    width = classes.stop - classes.start
    z = out[: head.hidden.shape[0] * width].view(-1, width)
    z[: kept.shape[0]] = kept[:, classes]
    if kept.shape[0] < z.shape[0]:
        head.take(slice(kept.shape[0], None)).logits(z[kept.shape[0] :].view(-1))
    return Rows.of(z, head.softcap, head.scale)
