"""Matrix products of blocks of dlogits: nothing overflows, and what is small may be merged.

R rows, C columns (classes) of a block, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common import parallel

# rows whose largest |dlogits| decides whether a column is multiplied by itself
FILTER_ROWS = 256
# columns of dlogits that a thread of a CPU contracts at a time: their product stays in its cache
CONTRACT_COLUMNS = 512
# columns of FILTER_ROWS rows that a thread of a CPU looks through at a time
SPLIT_COLUMNS = 1024


def widens(factor: Tensor) -> bool:
    """Whether half-precision factors can be multiplied into float32: on NVIDIA's GPUs alone."""
    return factor.is_cuda and torch.version.hip is None


def product(
    a: Tensor, b: Tensor, scale: Tensor | float = 1.0, *, rounded: bool = False, out=None
) -> Tensor:
    """`a @ b * scale` (m, n), accumulated in float32, in a dtype with the range of float32.

    float32 on NVIDIA's GPUs, unless `rounded`, where bfloat16 is what is wanted. Elsewhere there is
    no such product: bfloat16 stays (it has the range) and float16 is multiplied as float32, since
    unscaled sums over tokens overflow its range. `out`: where it is put, in the dtype of that.
    """
    if a.dtype == torch.float16:
        full = torch.mm(a, b, out_dtype=torch.float32) if widens(a) else a.float() @ b.float()
        full = times(full, scale)
        return full if out is None else out.copy_(full)
    if not unscaled(scale):
        b = (b * scale).to(b.dtype)  # smaller than the result
    rounded = rounded if out is None else out.dtype == a.dtype
    if rounded or a.dtype != torch.bfloat16 or not (widens(a) or out is not None):
        return torch.mm(a, b, out=out)
    if widens(a):
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(a @ b)


def unscaled(scale: Tensor | float) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def times(values: Tensor, scale: Tensor | float) -> Tensor:
    """`values * scale` without a pass where it is the number 1."""
    return values if unscaled(scale) else values * scale


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the CPU has AMX, on which a transposed first factor makes a product twice as slow."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


def contract_rows(
    dlogits: Tensor,  # (R, C)
    hidden: Tensor,  # (R, D)
    scale: Tensor | float = 1.0,
    plus: Tensor | None = None,  # (C, D)
    out: Tensor | None = None,  # (C, D)
    *,
    rounded: bool = False,
) -> Tensor:
    """`dlogits.T @ hidden * scale` (C, D), as `product`; or that and `plus`, added up in float32.

    The sum lies in `out`, maybe `plus` itself, whose memory is spent. In bfloat16 on a CPU each
    thread takes columns of dlogits, so that what it adds is still in its cache.
    """
    if plus is not None and plus.dtype == dlogits.dtype and dlogits.dtype.itemsize >= 4:
        return torch.addmm(plus, dlogits.T, times(hidden, scale), out=out)
    if plus is not None and dlogits.is_cuda and dlogits.dtype == torch.bfloat16 and out is plus:
        # the product's own end adds what it reads, without another pass
        hidden = times(hidden, scale).to(dlogits.dtype)
        if plus.dtype == dlogits.dtype:
            return torch.addmm(plus, dlogits.T, hidden, out=plus)
        if widens(dlogits):
            return torch.addmm(plus, dlogits.T, hidden, out_dtype=torch.float32, out=plus)
    num_columns = dlogits.shape[1]
    if dlogits.is_cuda or dlogits.dtype != torch.bfloat16 or num_columns <= CONTRACT_COLUMNS:
        if plus is None:
            return product(dlogits.T, hidden, scale, rounded=rounded, out=out)
        return added(plus, product(dlogits.T, hidden, scale), out)
    hidden = times(hidden, scale).to(dlogits.dtype)
    turned = hidden.T.contiguous() if multiplies_tiles() else None
    result = hidden.new_empty(num_columns, hidden.shape[1]) if out is None else out

    def work(first: int) -> None:
        columns = slice(first, first + CONTRACT_COLUMNS)
        block = dlogits[:, columns]
        part = block.T @ hidden if turned is None else (turned @ block).T
        if plus is None:
            result[columns] = part
        else:
            added(plus[columns], part, result[columns])

    parallel(work, range(0, num_columns, CONTRACT_COLUMNS))
    return result


def added(plus: Tensor, part: Tensor, out: Tensor) -> Tensor:
    """`plus + part`, rounded to the dtype of `out` once; may spend `plus`."""
    if plus.dtype == out.dtype:
        return torch.add(plus, part, out=out)
    if plus.dtype.itemsize < out.dtype.itemsize:
        return out.copy_(plus).add_(part)
    return out.copy_(plus.add_(part))


@dataclass
class GradBlock:
    """dlogits (R, C) of a block as `row_scale * values + onehot(target) * target_grad`.

    The plain form has `values` alone. The factored one leaves the exponentials of a forward pass as
    they are and scales the R x D side of a product instead of the R x C side: a pass over the
    logits less. The target's column of `values` is 0 then, since there p and 1 nearly cancel.
    """

    values: Tensor  # (R, C)
    row_scale: Tensor | None = None  # (R, 1)
    target: Tensor | None = None  # (M,), None where no target has a part of its own
    target_grad: Tensor | None = None  # (M,)
    target_row: Tensor | None = None  # (M,) the rows that have a target here, None for all

    def times(
        self,
        matrix: Tensor,  # (C, d)
        plus: Tensor | None = None,  # (R, d) float32 at least, spent
        *,
        rounded: bool = False,
    ) -> Tensor:
        """`dlogits @ matrix` (R, d), as `product`; or that and `plus`, in its memory."""
        if self.row_scale is None and plus is not None:
            if self.values.dtype == plus.dtype:
                return torch.addmm(plus, self.values, matrix, out=plus)
            if widens(self.values):
                wide = {"out_dtype": torch.float32, "out": plus}
                return torch.addmm(plus, self.values, matrix, **wide)
        if self.row_scale is None:
            result = product(self.values, matrix, rounded=rounded)
        else:
            result = product(self.values, matrix) * self.row_scale
            if self.target_row is not None:
                result[self.target_row] += matrix[self.target] * self.target_grad[:, None]
            elif self.target is not None:
                result.addcmul_(matrix[self.target], self.target_grad[:, None])
        return result if plus is None else plus.add_(result)

    def contract(
        self,
        matrix: Tensor,  # (R, d)
        scale: Tensor | float = 1.0,
        plus: Tensor | None = None,  # (C, d)
        out: Tensor | None = None,  # (C, d)
        *,
        rounded: bool = False,
    ) -> Tensor:
        """`dlogits.T @ matrix * scale + plus` (C, d), as `contract_rows`."""
        if self.row_scale is None:
            return contract_rows(self.values, matrix, scale, plus, out, rounded=rounded)
        scaled = (matrix * self.row_scale).to(matrix.dtype)
        result = contract_rows(self.values, scaled, scale, plus, out)
        if self.target is None:
            return result
        # added up before they are rounded: a frequent target stands in many rows
        classes, index = torch.unique(self.target, return_inverse=True)
        own = self.row_scale.new_zeros(classes.numel(), matrix.shape[1])
        rows = matrix if self.target_row is None else matrix[self.target_row]
        own.index_add_(0, index, rows * self.target_grad[:, None])
        result[classes] = (result[classes] + times(own, scale)).to(result.dtype)
        return result

    def column_sums(self) -> Tensor:
        """`dlogits.sum(0)` (C,), in float32 at least."""
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        if self.row_scale is None:
            return self.values.sum(0, dtype=dtype)
        return self.contract(torch.ones_like(self.values[:, :1])).to(dtype)[:, 0]


class Columns(NamedTuple):
    """What the columns of a block of rows are like; r rows, c columns of which k are large."""

    kept: Tensor  # (k,) which are large
    large: Tensor  # (r, k) those
    rest: Tensor  # (r,) sum of the others
    mass: Tensor  # () sum of absolute values
    kept_mass: Tensor  # () the large ones' part


def split_columns(block: Tensor, first: int, threshold: Tensor | float, dtype) -> Columns:
    """Columns of a block (r, c) whose largest absolute value reaches the threshold, and the rest.

    `first` is the number of the block's first column.
    """
    values = block.to(dtype)
    size = values.abs()
    keep = size.amax(0) >= threshold
    rest = values @ (~keep).to(dtype)
    # by columns first: one float32 sum over the whole block was 2 % off where it was tried
    mass = size.sum(0)
    kept = keep.nonzero()[:, 0]
    return Columns(
        kept + first, block[:, kept], rest, mass.sum(dtype=torch.float64),
        mass[kept].sum(dtype=torch.float64),
    )  # fmt: skip


def split_block(block: Tensor, threshold: Tensor | float, dtype) -> Columns:
    """`split_columns` of a whole block; on a CPU a few columns at a time, while in cache."""
    width = block.shape[1] if block.is_cuda else SPLIT_COLUMNS

    def work(first: int) -> Columns:
        return split_columns(block[:, first : first + width], first, threshold, dtype)

    parts = parallel(work, range(0, block.shape[1], width))
    kept, large, rest, mass, kept_mass = zip(*parts, strict=True)
    return Columns(torch.cat(kept), torch.cat(large, 1), sum(rest), sum(mass), sum(kept_mass))


class Filtered(NamedTuple):
    """What `filtered_products` makes beside dweight; F blocks of FILTER_ROWS rows."""

    hidden_grad: Tensor  # (R, D)
    share: Tensor  # (F, C) q of each block
    moment: Tensor  # (F, D) r @ hidden of each block, scaled
    mass: Tensor  # () sum |dlogits|
    merged: Tensor  # () its part in the rank-1 terms


def filtered_products(
    dlogits: Tensor,  # (R, C)
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (C, D)
    scale: Tensor | float,  # ()
    threshold: Tensor | float,
    into: Tensor | None,  # (C, D)
) -> Filtered:
    """`dlogits @ weight * scale` and `dlogits.T @ hidden * scale`, small columns as one term.

    In every FILTER_ROWS rows, columns whose largest |dlogits| is below the threshold are not
    multiplied: with r_i their sum in row i and q_j column j's share of sum |r|, rows counted with
    the sign of their r, they add `r_i (q @ weight)` to the first product and `q_j (r @ hidden)` to
    the second. Real embeddings share a large common direction, so that the sum matters where no
    single column does; rows of both signs, as upstream gradients give them, do not cancel in q.

    The large columns' part of the second product is added to `into`, float32, unless it is None.
    The small ones' part is `share.T @ moment`, left to the caller: it touches every class, so that
    it is better added once for many blocks.
    """
    dtype = torch.float64 if dlogits.dtype == torch.float64 else torch.float32
    blocks = [slice(i, i + FILTER_ROWS) for i in range(0, dlogits.shape[0], FILTER_ROWS)]
    hidden_grad = dlogits.new_empty(hidden.shape, dtype=dtype)
    share = dlogits.new_empty(len(blocks), dlogits.shape[1], dtype=dtype)
    moment = dlogits.new_empty(len(blocks), hidden.shape[1], dtype=dtype)

    def multiply(number: int, here: slice) -> tuple[Tensor, Tensor, Tensor]:
        block = dlogits[here]
        columns = split_block(block, threshold, dtype)
        signed = product(columns.rest.sign()[None].to(block.dtype), block)[0].to(dtype)
        q = signed.index_fill_(0, columns.kept, 0)
        total = q.sum()
        share[number] = q / torch.where(total == 0, 1, total)
        moment[number] = times(columns.rest, scale) @ hidden[here].to(dtype)
        hidden_grad[here] = product(columns.large, weight[columns.kept]).to(dtype)
        if into is not None:
            part = product(columns.large.T, hidden[here], scale).to(dtype)
            into.index_add_(0, columns.kept, part)
        return columns.rest, columns.mass, columns.kept_mass

    # the large columns of one block are gone before the next one's are copied
    found = [multiply(number, here) for number, here in enumerate(blocks)]
    common = product(share.to(weight.dtype), weight).to(dtype)
    for here, (rest, _, _), direction in zip(blocks, found, common, strict=True):
        hidden_grad[here].addr_(rest, direction)
    nothing = dlogits.new_zeros((), dtype=torch.float64)
    mass = sum((m for _, m, _ in found), nothing)
    kept_mass = sum((k for _, _, k in found), nothing)
    return Filtered(times(hidden_grad, scale), share, moment, mass, mass - kept_mass)
