"""The plan of a loss in words and bytes."""

from __future__ import annotations

import torch

from segloss.head.inputs import Inputs, is_frozen
from segloss.head.rows import chunk_slices, kept_rows, rows_to_keep
from segloss.sweep.batch import Batch


def explain(inputs: Inputs, batch: Batch, row_sum: bool) -> str:
    """`row_sum`: whether the loss is one, so that gradients are formed in forward."""
    rows = kept_rows(inputs, batch)
    num_rows = batch.target.numel() if rows is None else rows.numel()
    num_classes, width = inputs.weight.shape
    itemsize = inputs.options.product_dtype.itemsize
    needed = inputs.needed()
    slices = chunk_slices(inputs, num_rows, needed["weight"], row_sum)
    chunk = slices[0].stop
    chunks = len(slices) if num_rows else 0
    one = 2 * num_rows * width * num_classes
    mode, products, extra = plan_of(inputs, row_sum, num_rows, chunks)
    peak = chunk * num_classes * itemsize + sum(size for _, size in extra)
    lines = [
        f"tokens     {num_rows} of {batch.target.numel()} (ignored ones left out)",
        f"mode       {mode}",
        f"products   {products:.3g} x 2NDV = {products * one:.3g} FLOP",
        f"chunks     {chunks} of {chunk} rows, "
        f"{megabytes(chunk * num_classes * itemsize)} of logits",
        *(f"{name:<10} {megabytes(size)}" for name, size in extra),
        f"peak       {megabytes(peak)} above inputs and gradients "
        f"(all logits would take {megabytes(num_rows * num_classes * itemsize)})",
    ]
    return "\n".join(lines)


def plan_of(inputs: Inputs, row_sum: bool, num_rows: int, chunks: int) -> tuple[str, float, list]:
    """(mode, products of the head, [(what, bytes)] beyond a chunk's logits)."""
    needed = inputs.needed()
    num_classes, width = inputs.weight.shape
    itemsize = inputs.options.product_dtype.itemsize
    extra: list[tuple[str, int]] = []
    if not any(needed.values()):
        return "no gradient: statistics only", 1, extra
    if row_sum:
        if needed["weight"] and (size := dweight_bytes(inputs, chunks)):
            extra.append(("dweight", size))
        return "fused: gradients formed in forward", 1 + needed["hidden"] + needed["weight"], extra
    if is_frozen(needed):
        extra.append(("p @ weight", num_rows * width * itemsize))
        return "frozen head: p @ weight stored in forward", 2, extra
    extra.append(("dhidden", 4 * num_rows * width))
    num_kept = rows_to_keep(inputs, chunk_slices(inputs, num_rows, needed["weight"]))
    if num_kept:
        extra.append(("kept", num_kept * num_classes * itemsize))
    products = 2 + needed["hidden"] + needed["weight"] - num_kept / max(1, num_rows)
    return "recompute: logits made again in backward", products, extra


def dweight_bytes(inputs: Inputs, chunks: int) -> int:
    """What adding up dweight over chunks takes beside the gradient itself."""
    on_gpu, own = inputs.weight.is_cuda, inputs.weight.dtype
    product = inputs.options.product_dtype
    two_fit = not on_gpu and product == own == torch.bfloat16
    if not inputs.options.grad_filter and chunks <= (2 if two_fit else 1):
        return 0
    wide = max(4, product.itemsize)
    # the sum, unless it is the gradient; a GPU makes what a chunk adds to it as large again
    return ((own.itemsize < wide) + on_gpu) * wide * inputs.weight.numel()


def megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
