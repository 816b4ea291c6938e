"""What every kernel family shares: the rows of logits, the tile transform, the choice of backend.

N rows (tokens), V columns (classes), B x T the two leading strides a row index is split into.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the torch twins serve everything
    triton = None
    tl = None


def jit(function):
    """`triton.jit`, or the plain function where triton is missing and it is never launched."""
    return function if triton is None else triton.jit(function)


LOG2E = 1.4426950408889634 if tl is None else tl.constexpr(1.4426950408889634)
EXPONENT_UNIT = math.log2(math.e)  # the same number where LOG2E is a constant of Triton

# float32 bytes of one row block of the torch twins: about a core's L2; fewer calls weigh more than
# what spills into the L3 (measured: bench/NOTES.md)
BLOCK_BYTES = 1 << 20
# below this many elements a second thread costs more than it gains
PARALLEL_ELEMENTS = 1 << 20


# (first row, last row + 1, their raw logits (R, V))
Block = tuple[int, int, Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_alone() -> None:
    """From now on this thread's torch operations are not split over others."""
    torch.get_num_threads()  # a thread's first look takes the process's number over, later no more
    torch.set_num_threads(1)


@functools.cache
def workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that run torch on one thread each; of this process, since a fork keeps none."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=run_alone)
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(before)  # what threads started later by others begin with
    return pool


def parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[work(item) for item in items]` on as many threads as torch uses, without autograd.

    Each thread runs its torch operations alone on a block that stays in its cache. Letting torch
    split every small operation instead costs a barrier each, ruinous as soon as the machine has
    anything else to do.
    """

    def run(item: Item) -> Result:
        with torch.no_grad():  # grad mode belongs to a thread
            return work(item)

    threads = torch.get_num_threads()
    if threads < 2 or len(items) < 2:
        return [run(item) for item in items]
    return list(workers(threads, os.getpid()).map(run, items))


def exp_(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`exp(x)` for x <= 0 in the place of x, or in `out`; in float32 by `exp2`.

    Rounding x * log2(e) costs as much as rounding x did. `exp` takes two thirds of its time where
    it is MKL's and more than twice of it elsewhere; where the result is 0 or subnormal, as that of
    a masked class, MKL's takes 10 to 50 times as long (measured: bench/NOTES.md, rows 16 and 77).
    """
    out = x if out is None else out
    if x.dtype != torch.float32:
        return torch.exp(x, out=out)
    return torch.mul(x, EXPONENT_UNIT, out=out).exp2_()


@functools.cache
def rounds_once() -> bool:
    """Whether `exponentials` round their exponent once, in whole vectors and in what is left of
    them: `torch.add(a, b, alpha=c)` is a fused multiply-add."""
    b, c = torch.linspace(1.1, 9.9, 67), torch.tensor(EXPONENT_UNIT)
    exact = b.double() * c.double() - b * c  # the rounding of the product, which a double holds
    return torch.equal(torch.add(-(b * c), b, alpha=c.item()), exact.float())


def exponentials(z: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """`exp2(z * EXPONENT_UNIT + shift)` in two passes, for z (R, V) and shift (R, 1)."""
    return torch.add(shift, z, alpha=EXPONENT_UNIT, out=out).exp2_()


def bounds(row: Tensor, groups: list[list[Block]]) -> dict[int, int]:
    """For the edge of every block, how many of the ascending rows (M,) lie before it."""
    edges = [first for group in groups for first, _, _ in group] + [groups[-1][-1][1]]
    found = torch.searchsorted(row, torch.tensor(edges, device=row.device))
    return dict(zip(edges, found.tolist(), strict=True))


# ----------------------------------------------------------------------------- the rows of logits


class KernelRows(NamedTuple):
    """`Rows` as a Triton kernel takes them: one argument, `rows.stride_t` and so on inside.

    softcap and scale are None where there is none. To Triton a float in a tuple is a float32, so
    for float64 logits they are constants that the kernel is compiled with.
    """

    logits: Tensor  # (B, T, V)
    T: int
    V: int
    stride_b: int
    stride_t: int
    stride_v: int
    softcap: float | None
    scale: float | None
    dtype: object  # what the arithmetic is done in, a constant


@dataclass(frozen=True)
class Rows:
    """`softcap * tanh(scale * data / softcap)` seen as N rows; -inf stays -inf."""

    data: Tensor  # (B, T, V), any strides
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, logits: Tensor, softcap: float | None = None, scale: float = 1.0) -> Rows:
        """View logits (..., V) as (B, T, V); copies only where no such view exists."""
        num_classes = logits.shape[-1]
        if logits.dim() == 3:
            return cls(logits, softcap, scale)
        try:
            rows = logits.view(-1, num_classes) if logits.numel() else logits.flatten(0, -2)
        except RuntimeError:
            rows = logits.reshape(-1, num_classes)
        return cls(rows.unsqueeze(0), softcap, scale)

    @property
    def num_rows(self) -> int:
        return self.data.shape[0] * self.data.shape[1]

    @property
    def num_classes(self) -> int:
        return self.data.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic is done in."""
        return torch.float64 if self.data.dtype == torch.float64 else torch.float32

    @property
    def aligned(self) -> bool:
        """Whether every row is contiguous and starts at a multiple of 16 bytes.

        A lone row counts by where the next would start: more rows must not change its sums' order.
        """
        stride_b, stride_t, stride_v = self.data.stride()
        steps = stride_t if self.data.shape[0] == 1 else math.gcd(stride_b, stride_t)
        common = math.gcd(self.data.data_ptr(), steps * self.data.element_size())
        return stride_v == 1 and common % 16 == 0

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.data.device)

    # The twins read logits in one of two ways: whole rows block by block, or a panel of columns.

    def blocks(self, matrices: int = 1) -> list[list[Block]]:
        """All rows as row blocks without copies, in groups that one thread works through.

        `matrices`: how many of so many columns a block is worked through with.
        """
        try:
            data = self.data.view(1, self.num_rows, self.num_classes)
        except RuntimeError:
            data = self.data
        batch, time, num_classes = data.shape
        step = max(1, BLOCK_BYTES // (4 * num_classes * matrices))
        blocks = []
        for b in range(batch):
            first = b * time
            for raw in data[b].split(step):
                blocks.append((first, first + len(raw), raw))
                first += len(raw)
        threads = torch.get_num_threads()
        several = threads > 1 and self.data.numel() > PARALLEL_ELEMENTS
        groups = 4 * threads if several else 1
        size = max(1, cdiv(len(blocks), groups))
        return [blocks[i : i + size] for i in range(0, len(blocks), size)]

    def load(self, raw: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Transformed logits of a raw tile in the compute dtype; `raw` itself where that is it."""
        if self.softcap is None and self.scale == 1.0 and raw.dtype == self.dtype:
            return raw
        z = torch.empty_like(raw, dtype=self.dtype) if buffer is None else buffer[: raw.shape[0]]
        # looked at first: z may be the memory of the logits themselves
        absent = None if self.softcap is None else raw == -torch.inf
        z.copy_(raw)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if absent is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap).masked_fill_(absent, -torch.inf)
        return z

    def panel(self, rows: Tensor, columns: Tensor | None) -> Tensor:
        """Transformed logits (R, K) at rows (R,) and columns (K,), None for all of them."""
        time = self.data.shape[1]
        b, t = rows // time, rows % time
        if columns is None:
            return self.load(self.data[b, t])
        return self.load(self.data[b[:, None], t[:, None], columns])

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Transformed logits (M,) at the pairs (rows, columns), both (M,)."""
        time = self.data.shape[1]
        return self.load(self.data[rows // time, rows % time, columns])

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of the transform, from its value z (0 where z is -inf)."""
        if self.softcap is None:
            return self.scale
        return (1 - (z / self.softcap).clamp(min=-1).square()) * self.scale

    def for_kernel(self) -> KernelRows:
        double = self.dtype == torch.float64
        number = tl.constexpr if double else float
        return KernelRows(
            self.data,
            *self.data.shape[1:],
            *self.data.stride(),
            softcap=None if self.softcap is None else number(self.softcap),
            scale=None if self.scale == 1.0 else number(self.scale),
            dtype=tl.constexpr(tl.float64 if double else tl.float32),
        )


def row_tile(rows: Rows, halved: bool = False) -> dict[str, int]:
    """How a program that owns a row takes it: what fits 8 warps without a register spilled.

    `halved`: for as many warps half of it. float64 takes an eighth of the elements: they are pairs
    of registers, and its exponential and its division need many.
    """
    per_thread = 2 if rows.dtype == torch.float64 else 16
    block = min(256 * per_thread, max(16, next_power_of_2(rows.num_classes)))
    num_warps = max(1, block // (32 * per_thread))
    return {"BLOCK_V": max(16, block // 2) if halved else block, "num_warps": num_warps}


@jit
def tile_columns(ALIGNED: tl.constexpr, GROUP: tl.constexpr, BLOCK_V: tl.constexpr):
    """The columns of a tile (BLOCK_V / GROUP, GROUP), each line of it held by one thread.

    Neighbours where a thread can load a line at once (16 bytes); else as far apart as the tile is
    long, so that neighbouring threads load neighbours.
    """
    LINES: tl.constexpr = BLOCK_V // GROUP
    line = tl.arange(0, LINES)[:, None]
    item = tl.arange(0, GROUP)[None, :]
    return line * GROUP + item if ALIGNED else line + item * LINES


@jit
def row_offset(rows, row):
    """Offset of a row's first logit, in int64 whatever the size.

    Divided in int32: a 64-bit division is a subroutine, and a tile of rows would spill around it.
    """
    row = row.to(tl.int32)
    b, t = (row // rows.T).to(tl.int64), (row % rows.T).to(tl.int64)
    return b * rows.stride_b + t * rows.stride_t


@jit
def load_logits(rows, pointers, mask):
    """A tile of transformed logits; -inf outside the mask, if there is one."""
    raw = tl.load(pointers, mask=mask, other=None if mask is None else float("-inf"))
    z = raw.to(rows.dtype)
    if rows.scale is not None:
        z = z * tl.full((), rows.scale, rows.dtype)
    if rows.softcap is not None:
        cap = tl.full((), rows.softcap, rows.dtype)
        # tanh(x) = 1 - 2 / (exp(2x) + 1): exact at both ends, no libdevice; -inf is put back
        e = tl.exp2(z * (2 * LOG2E / cap))
        z = tl.where(z == float("-inf"), z, cap * (1 - 2 / (e + 1)))
    return z


# ------------------------------------------------------------------------------------- dispatch


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def backend(device: torch.device) -> tuple[str, str]:
    """("triton" or "torch", the reason) for tensors on this device.

    `SEGLOSS_BACKEND` forces one; otherwise a GPU runs Triton and anything else the torch twin,
    except under `TRITON_INTERPRET=1`, where the Triton kernels run on CPU tensors.
    """
    forced = os.environ.get("SEGLOSS_BACKEND", "")
    if forced not in ("", "triton", "torch"):
        raise ValueError(f"SEGLOSS_BACKEND is {forced!r}; it takes 'triton' or 'torch'")
    runs_triton = triton is not None and (device.type == "cuda" or interpreting())
    if forced == "triton" and not runs_triton:
        why = "triton is not installed" if triton is None else f"tensors are on {device}"
        raise ValueError(
            f"SEGLOSS_BACKEND=triton, but {why}; it takes a GPU, or TRITON_INTERPRET=1 on a CPU"
        )
    if forced:
        return forced, f"SEGLOSS_BACKEND={forced}"
    if runs_triton:
        return "triton", "GPU tensor" if device.type == "cuda" else "TRITON_INTERPRET=1"
    if triton is None:
        return "torch", "triton is not installed"
    return "torch", f"{device.type} tensor"


def launcher(launch: Callable) -> Callable:
    """A launcher whose kernels run where its first tensor (or rows) is.

    Triton takes the current device, which need not be a tensor's where a process has several.
    """

    @functools.wraps(launch)
    def on_its_device(*args, **options):
        first = next(data for a in args if isinstance(data := getattr(a, "data", a), Tensor))
        with torch.cuda.device_of(first):
            return launch(*args, **options)

    return on_its_device


def use_triton(tensor: Tensor) -> bool:
    return backend(tensor.device)[0] == "triton"


def widest(device: torch.device) -> torch.dtype:
    """What sums over small vectors are taken in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
