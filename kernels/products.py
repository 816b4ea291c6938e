"""Matrix products of blocks of dlogits: nothing overflows, and what is small may be merged.

R rows, C columns (classes) of a block, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import parallel

# rows whose largest |dlogits| decides whether a column is multiplied by itself
FILTER_ROWS = 256
# columns of dlogits that a thread of a CPU contracts at a time: their product stays in its cache
CONTRACT_COLUMNS = 512


def product(a: Tensor, b: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """`a @ b * scale` (m, n), accumulated in float32, in a dtype with the range of float32.

    float32 on a GPU. On a CPU, which has no such product, bfloat16 stays (it has the range) and
    float16 is multiplied as float32: unscaled sums over tokens overflow its range.
    """
    if a.dtype == torch.float16:
        full = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
        return full * scale
    if isinstance(scale, Tensor) or scale != 1.0:
        b = (b * scale).to(b.dtype)  # exact for a power of two, and smaller than the result
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the CPU has AMX, on which a transposed first factor makes a product twice as slow."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


def contract_rows(
    dlogits: Tensor,  # (R, C)
    hidden: Tensor,  # (R, D)
    scale: Tensor | float = 1.0,
    into: Tensor | None = None,  # (C, D)
) -> Tensor:
    """`dlogits.T @ hidden * scale` (C, D), as `product`; or `into`, float32, with that added.

    In bfloat16 on a CPU each thread takes columns of dlogits, so that what it adds to `into` is
    still in its cache.
    """
    if into is not None and into.dtype == dlogits.dtype:
        return torch.addmm(into, dlogits.T, hidden * scale, out=into)
    num_columns = dlogits.shape[1]
    if dlogits.is_cuda or dlogits.dtype != torch.bfloat16 or num_columns <= CONTRACT_COLUMNS:
        result = product(dlogits.T, hidden, scale)
        return result if into is None else into.add_(result)
    hidden = (hidden * scale).to(dlogits.dtype)
    turned = hidden.T.contiguous() if multiplies_tiles() else None
    result = hidden.new_empty(num_columns, hidden.shape[1]) if into is None else into

    def work(first: int) -> None:
        columns = slice(first, first + CONTRACT_COLUMNS)
        block = dlogits[:, columns]
        part = block.T @ hidden if turned is None else (turned @ block).T
        if into is None:
            result[columns] = part
        else:
            result[columns] += part

    parallel(work, range(0, num_columns, CONTRACT_COLUMNS))
    return result


@dataclass
class GradBlock:
    """dlogits (R, C) of a block as `row_scale * values + onehot(target) * target_grad`.

    The plain form has `values` alone. The factored one leaves the exponentials of a forward pass as
    they are and scales the R x D side of a product instead of the R x C side: a pass over the
    logits less. The target's column of `values` is 0 then, since there p and 1 nearly cancel.
    """

    values: Tensor  # (R, C)
    row_scale: Tensor | None = None  # (R, 1)
    target: Tensor | None = None  # (R,)
    target_grad: Tensor | None = None  # (R,)

    def times(self, matrix: Tensor) -> Tensor:
        """`dlogits @ matrix` (R, d) for a matrix (C, d)."""
        result = product(self.values, matrix)
        if self.row_scale is None:
            return result
        own = matrix[self.target].to(self.row_scale.dtype)
        return torch.addcmul(result * self.row_scale, own, self.target_grad[:, None])

    def contract(
        self, matrix: Tensor, scale: Tensor | float = 1.0, into: Tensor | None = None
    ) -> Tensor:
        """`dlogits.T @ matrix * scale` (C, d) for a matrix (R, d); or `into` with that added."""
        if self.row_scale is None:
            return contract_rows(self.values, matrix, scale, into)
        scaled = matrix * self.row_scale
        result = contract_rows(self.values, scaled.to(matrix.dtype), scale, into)
        # added up before they are rounded: a frequent target stands in many rows
        classes, index = torch.unique(self.target, return_inverse=True)
        own = scaled.new_zeros(classes.numel(), matrix.shape[1])
        own.index_add_(0, index, matrix * self.target_grad[:, None])
        result[classes] = (result[classes] + own * scale).to(result.dtype)
        return result

    def column_sums(self) -> Tensor:
        """`dlogits.sum(0)` (C,), in float32 at least."""
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        if self.row_scale is None:
            return self.values.sum(0, dtype=dtype)
        return self.contract(torch.ones_like(self.values[:, :1])).to(dtype)[:, 0]


def filtered_products(
    dlogits: Tensor,  # (R, C)
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (C, D)
    scale: Tensor,  # ()
    threshold: Tensor | float,
    weight_needed: bool,
) -> tuple[Tensor, Tensor | None, float, float]:
    """`dlogits @ weight * scale` and `dlogits.T @ hidden * scale`, small columns as one term.

    In every FILTER_ROWS rows, columns whose largest |dlogits| is below the threshold are not
    multiplied: with r_i their sum in row i and q_j column j's share of sum |r|, rows counted with
    the sign of their r, they add `r_i (q @ weight)` to the first product and `q_j (r @ hidden)` to
    the second. Real embeddings share a large common direction, so that the sum matters where no
    single column does; rows of both signs, as upstream gradients give them, do not cancel in q.

    Returns the products (the second None if not needed), sum |dlogits|, and its merged part.
    """
    dtype = torch.float64 if dlogits.dtype == torch.float64 else torch.float32
    hidden_grad = dlogits.new_empty(hidden.shape, dtype=dtype)
    weight_grad = dlogits.new_zeros(weight.shape, dtype=dtype) if weight_needed else None
    mass = merged = 0.0
    for first in range(0, dlogits.shape[0], FILTER_ROWS):
        here = slice(first, first + FILTER_ROWS)
        block = dlogits[here]
        size = torch.maximum(block.amax(0), -block.amin(0))
        keep = size >= threshold
        kept = keep.nonzero()[:, 0]
        large = block[:, kept]
        row_rest = block.sum(1, dtype=dtype) - large.sum(1, dtype=dtype)  # r
        signed = product(row_rest.sign()[None].to(block.dtype), block)[0]
        share = torch.where(keep, 0, signed.to(dtype))
        total = share.sum()
        share = share / torch.where(total == 0, 1, total)  # q
        common = product(share[None].to(weight.dtype), weight).to(dtype)
        hidden_grad[here] = product(large, weight[kept]).to(dtype) + row_rest[:, None] * common
        if weight_grad is not None:
            weight_grad.index_add_(0, kept, product(large.T, hidden[here], scale).to(dtype))
            weight_grad.addr_(share, (row_rest * scale) @ hidden[here].to(dtype))
        # by rows: a norm of the whole block adds up in one float32, 2 % off where it was tried
        block_mass, large_mass = (
            float(torch.linalg.vector_norm(part, 1, dim=1, dtype=dtype).sum(dtype=torch.float64))
            for part in (block, large)
        )
        mass += block_mass
        merged += block_mass - large_mass
    return hidden_grad * scale, weight_grad, mass, merged
