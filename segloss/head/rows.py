"""Which tokens a head multiplies, and in which chunks.

N tokens, V classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.sweep.batch import Batch


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


def spread(values: Tensor | None, rows: Tensor | None, size: int, fill: int = 0) -> Tensor | None:
    """Values of the kept rows back at their tokens, `fill` elsewhere."""
    if values is None or rows is None:
        return values
    full = values.new_full((size, *values.shape[1:]), fill)
    return full.index_copy_(0, rows, values)


def chunk_slices(inputs: Inputs, num_rows: int) -> list[slice]:
    """Row slices of the chunks; an empty one where there are no rows."""
    step = inputs.chunk_rows(num_rows)
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(1, num_rows), step)]


def rows_within_budget(inputs: Inputs, slices: list[slice]) -> int:
    """Rows of the first chunks, as many as fit `memory_budget` together."""
    row_bytes = inputs.num_classes * inputs.options.product_dtype.itemsize
    budget = inputs.options.memory_budget
    return max((s.stop for s in slices if s.stop * row_bytes <= budget), default=0)


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
    step = max(1, inputs.chunk_rows(num_rows) * inputs.num_classes // max(1, width))
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(1, num_rows), step)]
