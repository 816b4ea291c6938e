"""The plan of a loss in words and bytes.

N tokens (the kept ones), V classes, D hidden size, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from segloss.head.inplace import WIDTH, fits_in_place, rows_read
from segloss.head.inputs import Inputs, is_frozen
from segloss.head.rows import beside_others, block_width, chunk_slices, kept_rows, rows_to_keep
from segloss.kernels.class_stats import PARTIAL_SUMS
from segloss.kernels.common import BLOCK_BYTES, cdiv
from segloss.kernels.products import FILTER_ROWS, SPLIT_COLUMNS
from segloss.sweep.batch import Batch
from segloss.sweep.cost import Asked, Seconds, megabytes, seconds_of

NOTHING = Seconds()

# of each class, where the largest of its probabilities is looked for: value and row, those of a
# chunk and of a panel of it, and what they are compared by
PEAK_BYTES = 68


@dataclass
class Plan:
    """What a step does: `held` are bytes by name, of one moment each; gradients are in none."""

    mode: str
    products: float  # of N V D multiplications
    rows: int  # of a chunk
    chunks: int
    held: dict[str, int]
    peak: int  # above inputs and gradients
    readings: int = 1  # of the matrices beside, whose heads' products are made as often

    @property
    def most(self) -> str:
        """Said before the peak where it is a bound: what a filter takes, the gradient decides."""
        return "at most " if self.held.get("merged") else ""

    def __str__(self) -> str:
        """For a list of alternatives."""
        return f"{self.chunks} of {self.rows} rows, peak {self.most}{megabytes(self.peak)}"


def explain(inputs: Inputs, batch: Batch, asked: Asked) -> str:
    rows = kept_rows(inputs, batch)
    num_rows = batch.target.numel() if rows is None else rows.numel()
    copied = rows is not None or not inputs.options.compact
    at = inputs.num_classes, rows is not None, inputs.device, inputs.dtype.itemsize
    second = seconds_of(batch.beside, asked, *at)
    inputs, row_sum = beside_others(inputs, batch, asked.request), asked.row_sum
    every, peaks = asked.all_classes, asked.request.peaks
    asks: dict[str, Any] = {"second": second, "column_sums": asked.request.column_sums}
    plan = plan_of(inputs, row_sum, num_rows, copied, all_classes=every, peaks=peaks, **asks)
    num_classes, width = inputs.weight.shape
    itemsize = inputs.options.product_dtype.itemsize
    one = 2 * num_rows * width * num_classes
    lines = [
        f"tokens     {num_rows} of {batch.target.numel()} (ignored ones left out)",
        f"mode       {plan.mode}",
        f"products   {plan.products:.3g} x 2NDV = {plan.products * one:.3g} FLOP",
        *second.lines(num_rows, plan.rows, plan.readings),
        f"chunks     {plan.chunks} of {plan.rows} rows, "
        f"{megabytes(plan.rows * num_classes * itemsize)} of logits",
        *(f"{name:<10} {megabytes(size)}" for name, size in plan.held.items() if size),
        f"peak       {plan.most}{megabytes(plan.peak)} above inputs and gradients "
        f"(all logits would take {megabytes(num_rows * num_classes * itemsize)})",
    ]
    others = alternatives(inputs, row_sum, num_rows, copied, plan, asks)
    if others:
        lines.append("instead    " + "; ".join(map(str, others)))
    return "\n".join(lines)


def alternatives(
    inputs: Inputs, row_sum, num_rows: int, copied: bool, chosen: Plan, asks: dict[str, Any]
) -> list[Plan]:
    """What one, two and four chunks would come to, where the accumulator of dweight decides."""
    trained = inputs.needed()["weight"]
    if (
        not (row_sum and trained and inputs.sums_apart)
        or inputs.options.chunk_bytes
        or not num_rows
    ):
        return []
    counts = [c for c in (1, 2, 4) if c != chosen.chunks and c <= num_rows]
    each = [cdiv(num_rows, c) for c in counts]
    return [plan_of(inputs, row_sum, num_rows, copied, rows, **asks) for rows in each]


def plan_of(
    inputs: Inputs,
    row_sum: bool,
    num_rows: int,
    copied: bool = False,
    rows: int | None = None,
    all_classes: bool = False,
    second: Seconds = NOTHING,
    peaks: bool = False,
    column_sums: bool = False,
) -> Plan:
    """`row_sum`: whether the loss is one, so that gradients are formed in forward; `rows` of a
    chunk, None for those that are chosen; `copied`: whether hidden states are; the last two: what
    a loss asks for."""
    needed, options = inputs.needed(), inputs.options
    num_classes, width = inputs.weight.shape
    row_bytes = num_classes * options.product_dtype.itemsize
    in_place = row_sum and rows is None and fits_in_place(inputs, num_rows, needed["weight"])
    slices = chunk_slices(inputs, num_rows, needed["weight"], row_sum)
    if in_place:
        rows = rows_read(inputs, num_rows)
    rows = max(s.stop - s.start for s in slices) if rows is None else rows
    chunks = cdiv(num_rows, rows) if num_rows else 0
    states = num_rows * width
    held = {"copies": copies(inputs, num_rows, copied) + second.copied}
    beside = second.chunk(rows, rows * row_bytes)
    grad = {"hidden": states, "weight": inputs.weight.numel()}
    grad = {n: size * inputs.tensors[n].element_size() for n, size in grad.items() if needed[n]}

    # a CPU multiplies float16 as float32, and the factored gradient's small side in it
    on_gpu, half = inputs.weight.is_cuda, options.product_dtype == torch.float16
    filtering = options.grad_filter > 0
    scaled = second.spent or not (second.count or filtering or column_sums)
    small = 6 * scaled if row_sum else 2 * is_frozen(needed)
    work = 0 if on_gpu else rows * width * small
    if half and not on_gpu:
        work += 4 * (rows * num_classes + inputs.weight.numel())

    def plan(mode: str, products: float, moments: Iterable[int], readings: int = 1) -> Plan:
        peak = held["copies"] + max(max(moments) - sum(grad.values()), 0)
        return Plan(mode, products, rows, chunks, held, peak, readings)

    tiles = sums = 0
    if all_classes and not on_gpu:
        # float32 row blocks of threads, p and the sums' part; what class sums are added up from,
        # with the largest p of each class, its row and the last of both
        tiles = 2 * torch.get_num_threads() * min(BLOCK_BYTES, 4 * rows * num_classes)
        sums = 4 * num_classes * (PARTIAL_SUMS + 6)
    largest = PEAK_BYTES * num_classes * peaks
    sums = max(sums, largest)
    logits = rows * row_bytes
    chunk = logits + max(work, beside)
    if not any(needed.values()):
        return plan("no gradient: statistics only", 1, [chunk + sums])
    if row_sum:
        held["sum"] = sum_bytes(inputs, chunks) if needed["weight"] else 0
        held["merged"] = merged_bytes(inputs, num_rows, rows, num_classes)
        mode = "fused: gradients formed in forward"
        if in_place:
            # beside a block of classes: its part of dweight, dhidden, and what they are made of
            mode += ", logits in dweight's memory"
            block = min(WIDTH, num_classes) * width * options.product_dtype.itemsize
            held["sum"] = 0
            held["dhidden"] = inputs.dtype.itemsize * states * needed["hidden"]
            begun = grad["weight"] + held["dhidden"]
            made = max(block + small * states, work, beside)
            return plan(mode, 2 + needed["hidden"], [logits + begun + made])
        # a GPU and a filter leave the sum until backward, and only then is the gradient beside it
        late = held["sum"] > 0 and (on_gpu or filtering)
        extra = held["sum"] + held["merged"] + grad.get("hidden", 0)
        begun = extra + (0 if late else grad.get("weight", 0))
        # one chunk is read before there is a gradient
        moments = [logits + work + begun, logits + beside + (begun if chunks > 1 else 0), extra]
        moments.append(held["sum"] + sum(grad.values()))
        return plan(mode, 1 + needed["hidden"] + needed["weight"], moments)
    # of each divergence the gradient of a chunk, and its product with the weight
    num_pairs = second.count * is_frozen(needed)
    pair_bytes = rows * row_bytes * (num_pairs > 0)
    if is_frozen(needed) and not all_classes:
        wide = inputs.dtype.itemsize * states
        held["p @ weight"] = wide * (1 + num_pairs)
        mode = "frozen head: p @ weight stored in forward"
        stored = held["p @ weight"] + wide * num_pairs
        moments = [chunk + sums + held["p @ weight"] + pair_bytes, logits + stored]
        moments.append(held["p @ weight"] + wide + grad["hidden"])
        if peaks:  # each class has an entry: the head once more, and a chunk of its logits
            block = 0 if on_gpu else min(BLOCK_BYTES, 4 * rows * num_classes)
            moments.append(logits + inputs.weight.nbytes + block + sums + 3 * wide + grad["hidden"])
        return plan(mode, 2 + num_pairs, moments)
    frozen = inputs.dtype.itemsize * states if is_frozen(needed) else 0
    held["p @ weight"] = frozen
    num_kept = 0 if all_classes else rows_to_keep(inputs, slices)
    rest = num_rows - num_kept
    held["kept"] = num_kept * row_bytes
    # rows whose gradient is a sum over blocks of the vocabulary, and then once more, rounded
    held["dhidden"] = inputs.dtype.itemsize * rest * width if needed["hidden"] and chunks > 1 else 0
    block = block_width(num_classes * rows // max(1, num_rows), num_classes)
    held["merged"] = merged_bytes(inputs, num_rows, num_rows, block)
    if filtering and needed["weight"]:
        held["merged"] += 4 * block * width  # the block's part of dweight
    logits = max(logits, held["kept"])
    again = second.chunk(logits // row_bytes, logits)
    products = 1 + rest / max(1, num_rows) + needed["hidden"] + needed["weight"]
    products += all_classes + is_frozen(needed)  # the sums' part of each row's gradient; p @ weight
    own = sum(grad.values())
    extra = held["dhidden"] + held["merged"] + frozen
    begun = own - grad.get("hidden", 0) * rest // max(1, num_rows) if chunks > 1 else own
    if filtering and block == num_classes:
        begun = 0  # that part is all of it, and there is nothing else until it is rounded
    moments = [logits + frozen + max(work, sums, tiles, beside + pair_bytes)]
    work = max(0 if frozen else work, tiles if chunks > 1 else 0, again)
    moments.append(logits + extra + begun + work + largest)
    return plan("recompute: logits made again in backward", products, moments, 2)


def copies(inputs: Inputs, num_rows: int, copied: bool) -> int:
    """The head in the products' dtype, and its hidden states without the ignored ones."""
    product = inputs.options.product_dtype
    size = 0
    for name, tensor in inputs.tensors.items():
        if name == "hidden":
            here = num_rows * tensor.shape[-1]
            size += here * tensor.element_size() * copied
            size += here * product.itemsize * (tensor.dtype != product)
        elif tensor.dtype != product:
            size += tensor.numel() * product.itemsize
    return size


def sum_bytes(inputs: Inputs, chunks: int) -> int:
    """What adding up dweight over chunks takes beside the gradient itself."""
    if inputs.options.grad_filter:
        apart = inputs.weight.element_size() < max(4, inputs.options.product_dtype.itemsize)
        return apart * 4 * inputs.weight.numel()
    return 4 * inputs.weight.numel() if inputs.sums_apart and chunks > 2 else 0


def merged_bytes(inputs: Inputs, num_rows: int, rows: int, columns: int) -> int:
    """What `grad_filter` takes at most, on blocks of so many rows and columns: where no column is
    small enough to be merged.

    Of FILTER_ROWS rows the large columns, twice while they are put together, then what they are
    multiplied by and into; of each such block a row of numbers, and dhidden in float32.
    """
    if not inputs.options.grad_filter:
        return 0
    needed, width = inputs.needed(), inputs.weight.shape[1]
    itemsize = inputs.options.product_dtype.itemsize
    rows = min(FILTER_ROWS, rows)
    large = rows * columns * itemsize
    # float32 values, their sizes, and either once more
    split = torch.get_num_threads() * 16 * rows * min(SPLIT_COLUMNS, columns)
    factor = columns * width * (itemsize + 4 * (needed["weight"] and itemsize < 4))
    numbers = 3 * 4 * cdiv(num_rows, FILTER_ROWS) * (inputs.num_classes + width)
    return large + max(large + split, factor) + numbers + 4 * num_rows * width
