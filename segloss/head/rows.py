"""Which tokens a head multiplies, and in which chunks.

N tokens, V classes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.sweep.batch import Batch
from segloss.sweep.request import Request

LINE = 128  # columns that a block of the vocabulary is a multiple of


def kept_rows(inputs: Inputs, batch: Batch) -> Tensor | None:
    """Tokens whose logits are made at all (N,), None for every one."""
    if not inputs.options.compact or (not batch.target.is_cuda and bool(batch.valid.all())):
        return None
    return batch.valid.nonzero()[:, 0]


def compact_batch(batch: Batch, rows: Tensor | None) -> Batch:
    if rows is None:
        return batch
    weight = batch.token_weight
    return replace(
        batch,
        shape=torch.Size([rows.numel()]),
        target=batch.target[rows],
        valid=batch.valid[rows],
        token_weight=None if weight is None else weight[rows],
        beside=batch.beside.take(rows),
    )


def beside_others(inputs: Inputs, batch: Batch, request: Request) -> Inputs:
    """The same, if a chunk of a teacher's logits is made beside each of its own."""
    if not request.divergences:
        return inputs
    return replace(inputs, other_classes=batch.beside.made_classes)


def spread(values: Tensor | None, rows: Tensor | None, size: int, fill: int = 0) -> Tensor | None:
    """Values of the kept rows back at their tokens, `fill` elsewhere."""
    if values is None or rows is None:
        return values
    full = values.new_full((size, *values.shape[1:]), fill)
    return full.index_copy_(0, rows, values)


def chunk_slices(
    inputs: Inputs, num_rows: int, trained: bool, row_sum: bool = False
) -> list[slice]:
    """Row slices of the chunks; an empty one where there are no rows.

    Where a backward pass may keep the last chunk, it is a whole one and no larger than the block of
    the vocabulary that would be made in its place.
    """
    step = inputs.chunk_rows(num_rows, trained=trained, row_sum=row_sum)
    if row_sum or step >= num_rows:
        return even_slices(num_rows, step)
    widest = inputs.sharding.widest  # ranks that share the classes cut the same chunks
    width = block_width(step * widest // num_rows, widest)
    if width >= LINE:
        step = min(step, num_rows * width // widest)
    cuts = [0, *range(num_rows % step or step, num_rows, step), num_rows]
    return [slice(*ends) for ends in itertools.pairwise(cuts)]


def block_width(most: int, num_classes: int) -> int:
    """Classes of a block of the vocabulary, of at most so many: whole lines of memory, and no
    narrow block last."""
    if most >= num_classes:
        return num_classes
    most = max(1, most // LINE * LINE or most)
    even = -(-num_classes // -(-num_classes // most))
    return min(most, -(-even // LINE) * LINE)


def even_slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, max(1, size), step)]


def rows_to_keep(inputs: Inputs, slices: list[slice]) -> int:
    """Rows of the last chunks, as many as fit `memory_budget` together; by default the last one,
    which lies where every chunk's logits lay. With a filter none: its blocks are of all rows."""
    options, num_rows = inputs.options, slices[-1].stop
    if options.memory_budget is None:
        return 0 if options.grad_filter else num_rows - slices[-1].start
    row_bytes = inputs.num_classes * options.product_dtype.itemsize
    fitting = (num_rows - s.start for s in slices)
    return max((rows for rows in fitting if rows * row_bytes <= options.memory_budget), default=0)


def renumbered(index: Tensor | None, table: Tensor | None) -> Tensor | None:
    """`table[index]`, -1 where index is -1."""
    if index is None or table is None or table.numel() == 0:
        return index
    return torch.where(index < 0, -1, table[index.clamp(min=0)])


def compacted(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return values if values is None or rows is None else values[rows]


def chunk_buffer(head: Head, slices: list[slice]) -> Tensor:
    """One flat buffer for every chunk's logits: fresh pages cost more than the products spare."""
    size = max((s.stop - s.start for s in slices), default=0) * head.weight.shape[0]
    return head.hidden.new_empty(size)


def panel_slices(inputs: Inputs, num_rows: int, width: int) -> list[slice]:
    """Row slices of a panel of `width` columns, under the bytes of a chunk."""
    rows = inputs.chunk_rows(num_rows, trained=False, row_sum=False)
    return even_slices(num_rows, max(1, rows * inputs.num_classes // max(1, width)))
