"""A gradient times a number that only the device knows, in the dtype that it is returned in.

E elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import cdiv, jit, launcher, tl, use_triton


@jit
def scale_kernel(
    values,  # (E,)
    factor,  # ()
    out,  # (E,)
    E,
    IN_PLACE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Nothing is moved where the factor is 1 and the values lie where they belong."""
    number = tl.load(factor)
    if IN_PLACE and number == 1:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E
    x = tl.load(values + at, mask=inside)
    x = x.to(tl.float64 if DOUBLE else tl.float32) * number
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@launcher
def scale_triton(values: Tensor, factor: Tensor, out: Tensor) -> None:
    double = factor.dtype == torch.float64
    block = 2048 if double else 8192
    scale_kernel[(cdiv(values.numel(), block),)](
        values,
        factor,
        out,
        values.numel(),
        IN_PLACE=values.data_ptr() == out.data_ptr(),
        DOUBLE=double,
        BLOCK=block,
        num_warps=8,
    )


def scale_torch(values: Tensor, factor: Tensor, out: Tensor) -> None:
    if values.is_cuda:  # a look at the factor would wait, and it would be rounded to the values
        out.copy_(values.to(factor.dtype) * factor)
    elif factor != 1:
        torch.mul(values, factor, out=out)
    elif values.data_ptr() != out.data_ptr():
        out.copy_(values)


def scaled(
    values: Tensor,  # contiguous
    factor: Tensor,  # (), of any float dtype
    out: Tensor,  # contiguous, of the values' size; maybe the values
) -> Tensor:
    """`values * factor` in `out`, multiplied in float32 (float64) and rounded once."""
    if values.numel():
        double = values.dtype == torch.float64
        factor = factor.detach().to(torch.float64 if double else torch.float32)
        run = scale_triton if use_triton(values) else scale_torch
        run(values, factor, out)
    return out
