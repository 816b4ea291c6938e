"""Logits in the memory of dweight, which is written over them at last.

R rows, at most D; a block of W classes takes R x W logits, and W x D numbers of dweight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import even_slices
from segloss.kernels.common import Rows
from segloss.kernels.products import GradBlock

# classes of a block: its part of dweight is made beside it, and dhidden added up once for each
WIDTH = 8192
# logits of the rows that are read at a time, which lie in order then
READ_BYTES = 32 << 20


def fits_in_place(inputs: Inputs, num_rows: int, trained: bool) -> bool:
    """Whether the logits of a sum over rows lie there: where they would take several chunks, and
    all rows fit. Part of them gains little, and costs another product for dweight."""
    options, weight = inputs.options, inputs.weight
    # a gradient in float16 waits in float32
    exact = weight.dtype == options.product_dtype != torch.float16
    chosen = options.chunk_bytes is not None or options.grad_filter > 0
    beside = inputs.other_classes > 0 or not inputs.sharding.is_whole
    if not (trained and exact) or chosen or beside or weight.is_cuda:
        return False
    step = inputs.chunk_rows(num_rows, trained=False, row_sum=False)
    return step < num_rows <= weight.shape[1]


def rows_read(inputs: Inputs, num_rows: int) -> int:
    """How many of them are read at a time."""
    row_bytes = inputs.num_classes * inputs.options.product_dtype.itemsize
    return min(num_rows, max(1, READ_BYTES // row_bytes))


class InPlace:
    """The logits (R, V) of a head's rows in `memory` (V, D), and then their gradient."""

    def __init__(self, head: Head, memory: Tensor):
        self.head, num_rows = head, head.hidden.shape[0]
        self.done: list[GradBlock] = []
        self.parts: list[tuple[slice, Tensor]] = []
        for classes in even_slices(memory.shape[0], WIDTH):
            place = memory[classes].view(-1)
            z = head.columns(classes).logits(place).data[0]
            self.parts.append((classes, place[: z.numel()].view(num_rows, -1)))

    def take(self, here: slice, out: Tensor) -> Rows:
        """Some rows of all classes, in `out`."""
        shape = here.stop - here.start, self.head.weight.shape[0]
        z = out[: shape[0] * shape[1]].view(shape)
        torch.cat([part[here] for _, part in self.parts], 1, out=z)
        return Rows.of(z, self.head.softcap, self.head.scale)

    def put(self, here: slice, block: GradBlock) -> None:
        """The gradient of the same rows, each in its turn, back in their places."""
        for classes, part in self.parts:
            part[here] = block.values[:, classes]
        block.values = part[:0]
        self.done.append(block)

    def blocks(self) -> Iterator[tuple[slice, GradBlock]]:
        """The gradient of all rows, a block of classes at a time."""
        names = "row_scale", "target", "target_grad"
        parts = ([getattr(block, name) for block in self.done] for name in names)
        row_scale, target, own = (None if p[0] is None else torch.cat(p) for p in parts)
        for classes, part in self.parts:
            if target is None or own is None:
                yield classes, GradBlock(part, row_scale)
                continue
            here = ((target >= classes.start) & (target < classes.stop)).nonzero()[:, 0]
            yield classes, GradBlock(part, row_scale, target[here] - classes.start, own[here], here)
