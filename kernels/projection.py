"""A seeded random-sign projection of gradients, `gradient @ P`, and its way back, `P @ w`.

P is never stored.

Entry (c, r) of P is +-1 / sqrt(D): minus where bit r % 64 of word r // 64 % 4 of
`numpy.random.Philox(key=seed)`'s block at counter (c, r // 256, 0, 0) is set. Nothing in that
depends on D, N, the device or the order in which entries are needed.

Nor do the results. Within a tile of 4,096 columns a row is rounded to 24-bit integers times a power
of two (the largest entry keeps its 24 bits), split into two 12-bit halves; sums of up to 4,096 of
those stay below 2^24, so float32 adds them without rounding *in any order*. Tiles are added up in
float64, in their order. Hence one result to the last bit for every chunking of rows and columns,
every number of threads, every BLAS and every GPU. On the way back w is rounded to integers whose
sums float64 holds exactly.

N rows (gradients), C columns (parameters), D dimensions, T tiles, R words of 32 signs.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .common import cdiv, jit, launcher, parallel, tl, use_triton

TILE = 4096  # columns: the most for which sums of 12-bit integers are exact in float32
GROUP = 256  # dimensions whose signs of one column are one Philox block
# float64 sums of tiles, and copies of columns, that exist at a time
CHUNK_BYTES = 64 << 20

# ------------------------------------------------------------------------------------ tile maths

# biased exponents below this count as this one: a subnormal number rounds to 0 either way
LEAST_EXPONENT = 25
# added and taken off again, it rounds a float32 of up to 2^22 to the nearest even integer
ROUNDER = 12582912.0 if tl is None else tl.constexpr(12582912.0)


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows (N, K) as integers (2N, K), high halves first, and what one is worth (N,)."""
    largest = torch.amax(rows.abs(), 1)
    exponent = (largest.view(torch.int32) >> 23).clamp(min=LEAST_EXPONENT)
    unit = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent - 149)
    scaled = rows * ((276 - exponent) << 23).view(torch.float32)[:, None]
    integers = rows.new_empty(2 * rows.shape[0], rows.shape[1])
    high, low = integers.chunk(2)
    torch.mul(scaled, 2**-12, out=high).round_()
    torch.sub(scaled, high, alpha=4096, out=low).round_()
    return integers, unit.masked_fill(~(largest < torch.inf), torch.nan)


# ---------------------------------------------------------------------------------- Triton kernel


@jit
def tile_halves(pointers, mask, exponent):
    """A block of the gradient as high and low halves; `exponent` is the tile's, per row."""
    g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    scaled = g * ((276 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    high = (scaled * 0.000244140625 + ROUNDER) - ROUNDER
    low = ((scaled - high * 4096) + ROUNDER) - ROUNDER
    return high.to(tl.float16), low.to(tl.float16)


@jit
def word_signs(word, bits):
    """+-1 in float16 (K, 64) from the words (K,)."""
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    half = tl.where(bits[None, :] < 32, low[:, None], high[:, None])
    bit = (half >> (bits[None, :] % 32).to(tl.uint32)) & 1
    return (bit << 15 | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)


@jit
def add_dots(high_sum, low_sum, high, low, word, bits):
    signs = word_signs(word, bits)
    return tl.dot(high, signs, high_sum), tl.dot(low, signs, low_sum)


@jit
def store_sums(out, high_sum, low_sum, unit, rows, dims, N, D):
    total = (high_sum.to(tl.float64) * 4096 + low_sum.to(tl.float64)) * unit[:, None]
    mask = (rows[:, None] < N) & (dims[None, :] < D)
    tl.store(out + rows[:, None].to(tl.int64) * D + dims[None, :], total, mask=mask)


@jit
def tile_sums_kernel(
    gradient,  # (N, C)
    out,  # (T, N, D) float64
    seed,
    first_column,
    N,
    C,
    D,
    stride_n,
    stride_c,
    TILE: tl.constexpr,
    LEAST_EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per tile, block of rows and group of 256 dimensions."""
    tile, group = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_start = gradient + rows[:, None].to(tl.int64) * stride_n
    offsets = tl.arange(0, BLOCK_C)
    width = tl.minimum(C - tile * TILE, TILE).to(tl.int32)

    largest = tl.zeros((BLOCK_N,), tl.float32)
    poison = tl.zeros((BLOCK_N,), tl.float32)  # NaN once the row holds a NaN or an infinity
    for first in range(0, width, BLOCK_C):
        columns = tile * TILE + first + offsets
        mask = (rows[:, None] < N) & (columns[None, :] < C)
        g = tl.load(row_start + columns[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(g), axis=1))
        poison += tl.sum(g * 0, axis=1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.maximum(exponent, LEAST_EXPONENT)
    # 2^(exponent - 149) by its bits
    unit = ((exponent.to(tl.int64) + 874) << 52).to(tl.float64, bitcast=True)
    unit += poison.to(tl.float64)
    exponent = tl.where(poison == 0, exponent, LEAST_EXPONENT)

    bits = tl.arange(0, 64)
    high0 = tl.zeros((BLOCK_N, 64), tl.float32)
    high1, high2, high3 = high0, high0, high0
    low0, low1, low2, low3 = high0, high0, high0, high0
    for first in range(0, width, BLOCK_C):
        columns = tile * TILE + first + offsets
        mask = (rows[:, None] < N) & (columns[None, :] < C)
        high, low = tile_halves(row_start + columns[None, :] * stride_c, mask, exponent)
        counter = (first_column + columns).to(tl.uint64)
        zero = counter * 0
        word0, word1, word2, word3 = tl.philox(seed, counter, zero + group, zero, zero)
        high0, low0 = add_dots(high0, low0, high, low, word0, bits)
        high1, low1 = add_dots(high1, low1, high, low, word1, bits)
        high2, low2 = add_dots(high2, low2, high, low, word2, bits)
        high3, low3 = add_dots(high3, low3, high, low, word3, bits)
    out += tile * N * D
    dims = group * 256 + bits
    store_sums(out, high0, low0, unit, rows, dims, N, D)
    store_sums(out, high1, low1, unit, rows, dims + 64, N, D)
    store_sums(out, high2, low2, unit, rows, dims + 128, N, D)
    store_sums(out, high3, low3, unit, rows, dims + 192, N, D)


@jit
def add_tiles_kernel(
    sums,  # (T, M)
    total,  # (M,) added to
    T,
    M,
    BLOCK: tl.constexpr,
):
    """The tiles' sums one after the other: float64 addition in one order only."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < M
    running = tl.load(total + entries, mask=mask, other=0.0)
    pointers = sums + entries
    for _ in range(T):
        running += tl.load(pointers, mask=mask, other=0.0)
        pointers += M
    tl.store(total + entries, running, mask=mask)


@jit
def signed_sum(word, w, first, D):
    """Sums (K,) of w from dimension `first` on, with the signs of a word for each of K columns."""
    total = (word * 0).to(tl.float64)
    for dim in range(first, tl.minimum(first + 64, D)):
        value = tl.load(w + dim)
        total += tl.where(word & 1 == 1, -value, value)
        word = word >> 1
    return total


@jit
def back_project_kernel(
    w,  # (D,) float64, whole numbers
    out,  # (C,) float32
    unit: tl.float64,
    seed,
    first_column,
    C,
    D,
    BLOCK_C: tl.constexpr,
):
    """One program per block of columns."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    counter = (first_column + columns).to(tl.uint64)
    zero = counter * 0
    total = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, D, 256):
        word0, word1, word2, word3 = tl.philox(seed, counter, zero + first // 256, zero, zero)
        total += signed_sum(word0, w, first, D)
        total += signed_sum(word1, w, first + 64, D)
        total += signed_sum(word2, w, first + 128, D)
        total += signed_sum(word3, w, first + 192, D)
    tl.store(out + columns, (total * unit).to(tl.float32), mask=columns < C)


@launcher
def back_project_triton(
    w: Tensor,  # (D,) float64, whole numbers
    unit: float,
    first_column: int,
    seed: int,
    out: Tensor,  # (C,) float32
) -> None:
    c, d = out.numel(), w.numel()
    back_project_kernel[(cdiv(c, 256),)](
        w, out, unit, seed, first_column, c, d, BLOCK_C=256, num_warps=4
    )


@launcher
def add_chunk_triton(
    chunk: Tensor,  # (N, C) whole tiles, but for the last of all
    first_column: int,
    seed: int,
    total: Tensor,  # (N, D) float64, added to
) -> None:
    chunk = chunk.float() if chunk.dtype == torch.float64 else chunk  # doubles would spill
    (n, c), d = chunk.shape, total.shape[1]
    tiles = cdiv(c, TILE)
    sums = torch.empty(tiles, n, d, dtype=torch.float64, device=chunk.device)
    tile_sums_kernel[(tiles, cdiv(n, 16), cdiv(d, GROUP))](
        chunk, sums, seed, first_column, n, c, d, *chunk.stride(),
        TILE=TILE, LEAST_EXPONENT=LEAST_EXPONENT, BLOCK_N=16, BLOCK_C=16, num_warps=8, num_stages=1,
    )  # fmt: skip
    add_tiles_kernel[(cdiv(n * d, 256),)](sums, total, tiles, n * d, BLOCK=256)


# ------------------------------------------------------------------------------------ torch twin


def sign_blocks(first_column: int, num_columns: int, dim: int, seed: int) -> list[np.ndarray]:
    """The signs' bits (K, 32) uint8 of each group: byte b holds its dimensions 8 b to 8 b + 7."""
    groups = []
    for group in range(cdiv(dim, GROUP)):
        # numpy counts up before it draws
        counter = ((group << 64) + first_column - 1) % (1 << 256)
        raw = np.random.Philox(key=seed, counter=counter).random_raw(4 * num_columns)
        groups.append(raw.astype("<u8", copy=False).view(np.uint8).reshape(num_columns, 32))
    return groups


def sign_words(first_column: int, num_columns: int, dim: int, seed: int) -> Tensor:
    """The signs' bits (R, K) int32, R = ceil(D / 32): word r holds dimensions 32 r to 32 r + 31."""
    blocks = sign_blocks(first_column, num_columns, dim, seed)
    words = np.concatenate([block.view("<i4").T for block in blocks])
    return torch.from_numpy(words[: cdiv(dim, 32)]).contiguous()


# What a bit of a word is worth as float32 once it stands in the exponent's field, from bit 23 up:
# one `and` makes a factor of a bit, where shifting it to the end and converting it takes three.
BIT_VALUES = tuple(2.0 ** (2**k - 127) for k in range(8))


def tile_sums_torch(
    rows: Tensor,  # (N, K)
    first_column: int,
    dim: int,
    seed: int,
    buffer: Tensor,  # (R, 4, 8, >= K) int32
) -> Tensor:
    """The projection (N, D) of one tile, times sqrt(D), in float64: exact but for `quantised`."""
    num_columns = rows.shape[1]
    words = sign_words(first_column, num_columns, dim, seed).to(rows.device)
    # each of a word's bytes moved to bits 23 to 30
    moved = torch.stack([words << 23, words << 15, words << 7, words >> 1], 1)
    masks = torch.tensor([1 << (23 + k) for k in range(8)], dtype=torch.int32, device=rows.device)
    minus = buffer[..., :num_columns]
    torch.bitwise_and(moved[:, :, None], masks[:, None], out=minus)
    minus = minus.view(torch.float32).flatten(0, 2)[:dim]

    integers, unit = quantised(rows)
    counts = torch.mm(integers, minus.T).double()
    worth = torch.tensor(BIT_VALUES, dtype=torch.float64, device=rows.device)
    counts /= worth.repeat(cdiv(dim, 8))[:dim]
    # sum_c s_c q_c with s = 1 - 2 minus
    signed = integers.sum(1, dtype=torch.float64)[:, None] - 2 * counts
    high, low = signed.chunk(2)
    return (high * 4096 + low) * unit[:, None]


def add_chunk_torch(
    chunk: Tensor,  # (N, C)
    first_column: int,
    seed: int,
    total: Tensor,  # (N, D) float64
) -> None:
    dim = total.shape[1]

    def work(starts: range) -> list[Tensor]:
        shape = cdiv(dim, 32), 4, 8, min(TILE, chunk.shape[1])
        # once for many tiles: fresh pages cost as much as the arithmetic on them
        buffer = torch.empty(shape, dtype=torch.int32, device=chunk.device)
        return [
            tile_sums_torch(
                chunk[:, start : start + TILE].float(), first_column + start, dim, seed, buffer
            )
            for start in starts
        ]

    starts = range(0, chunk.shape[1], TILE)
    size = cdiv(len(starts), torch.get_num_threads())
    for sums in parallel(work, [starts[i : i + size] for i in range(0, len(starts), size)]):
        for tile in sums:
            total += tile


def back_project_torch(
    w: Tensor,  # (D,) float64, whole numbers
    unit: float,
    first_column: int,
    seed: int,
    out: Tensor,  # (C,) float32
) -> None:
    """Eight signs at a time: a byte of them is an index into the 256 sums of eight weights."""
    dim, num_bytes = w.numel(), cdiv(w.numel(), 8)
    eights = F.pad(w.cpu(), (0, 8 * num_bytes - dim)).view(num_bytes, 8)
    signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1).double()
    sums = (eights @ signs.T).flatten()  # (256 for each byte)
    first_sum = 256 * torch.arange(num_bytes)

    def work(start: int) -> None:
        part = out[start : start + TILE]
        blocks = sign_blocks(first_column + start, part.numel(), dim, seed)
        index = torch.from_numpy(np.concatenate(blocks, 1))[:, :num_bytes] + first_sum
        part.copy_(sums[index].sum(1).mul_(unit))

    parallel(work, range(0, out.numel(), TILE))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32: lower settings, which users make, would round the integers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -------------------------------------------------------------------------------------- launcher


def chunks(pieces: Sequence[Tensor], columns: int) -> Iterator[Tensor]:
    """The pieces (N, C_i) side by side, `columns` of them at a time; a copy only across a seam."""
    ends = list(accumulate(piece.shape[1] for piece in pieces))
    for start in range(0, ends[-1], columns):
        stop, parts = min(start + columns, ends[-1]), []
        at = start
        while at < stop:
            index = bisect_right(ends, at)
            begin = ends[index] - pieces[index].shape[1]
            parts.append(pieces[index][:, at - begin : stop - begin])
            at = min(ends[index], stop)
        yield parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], 1)


def project(
    gradient: Tensor | Sequence[Tensor],
    dim: int,
    seed: int = 0,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`gradient.float() @ sign_matrix(C, dim, seed)`, the matrix never stored.

    Args:
        gradient: (N, C) of any float dtype and strides, or a list of (N, C_i), one per parameter,
            which stand side by side.
        dim: D, any number from 1 up; the first dimensions' signs do not depend on it.
        seed: 0 to 2^63 - 1.
        chunk_bytes: about what this may allocate beside the result; the result does not depend on
            it.

    Returns (N, D) float32, the same bits on every device and in every chunking. The error is that
    of rounding each entry to 2^-23 of the largest in its row and tile of 4,096 columns.
    """
    pieces = [gradient] if isinstance(gradient, Tensor) else list(gradient)
    n, device = pieces[0].shape[0], pieces[0].device
    if n == 0 or not any(piece.shape[1] for piece in pieces):
        return torch.zeros(n, dim, device=device)
    total = torch.zeros(n, dim, dtype=torch.float64, device=device)
    add_chunk = add_chunk_triton if use_triton(total) else add_chunk_torch
    # a tile's sums, and its copy where it crosses a seam
    columns = TILE * max(1, chunk_bytes // (n * (8 * dim + 4 * TILE)))
    first_column = 0
    with exact_products():
        for chunk in chunks(pieces, columns):
            add_chunk(chunk, first_column, seed, total)
            first_column += chunk.shape[1]
    return (total / dim**0.5).float()


def back_project(
    w: Tensor,
    num_columns: int,
    seed: int = 0,
    *,
    first_column: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """`sign_matrix(C, D, seed, first_column) @ w`, the matrix never stored.

    With `project(gradient, D, seed) = gradient @ P` this is `P @ w`, so that the product of a
    gradient with it is `project(gradient, D, seed) @ w`.

    Args:
        w: (D,) of any float dtype.
        num_columns: C, how many of P's rows there are from `first_column` on: one number for each
            parameter.
        seed: as for `project`.
        device: of the result; None for that of w.

    Returns (C,) float32, the same bits on every device and however the parameters are cut. The
    error is that of rounding w to 2^-40 of its largest entry (D up to 4,096), and the sum to
    float32.
    """
    out = torch.empty(num_columns, dtype=torch.float32, device=device or w.device)
    if not num_columns or not w.numel():
        return out.zero_()
    integers, unit = whole_numbers(w.detach().double())
    run = back_project_triton if use_triton(out) else back_project_torch
    run(integers.to(out.device), unit / w.numel() ** 0.5, first_column, seed, out)
    return out


def whole_numbers(w: Tensor) -> tuple[Tensor, float]:
    """float64 (D,) as whole numbers that any sum of +-w stays exact with, and what one is worth."""
    bits = 52 - (w.numel() - 1).bit_length()
    exponent = int(torch.frexp(w.abs().amax()).exponent)
    unit = math.ldexp(1.0, exponent - bits)
    return (w / unit).round_(), unit


def sign_matrix(num_columns: int, dim: int, seed: int = 0, first_column: int = 0) -> Tensor:
    """P (C, D) in float32 with entries +-1 / sqrt(D): for checks, and for small numbers."""
    words = sign_words(first_column, num_columns, dim, seed)
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32)[:, None] & 1
    signs = 1 - 2 * bits.view(-1, num_columns)[:dim].T
    return signs.float() / dim**0.5
