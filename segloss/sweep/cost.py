"""What a call takes, in the numbers that its plan in words is made of.

N tokens, R rows of a chunk, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from segloss.kernels.common import BLOCK_BYTES
from segloss.kernels.divergence import MATRICES
from segloss.sweep.beside import Beside
from segloss.sweep.request import Request


@dataclass(frozen=True)
class Asked:
    """What a loss makes of a sweep."""

    request: Request
    row_sum: bool  # whether it is one, so that gradients may be formed in forward
    plain: bool = True  # whether anything but divergences has a gradient

    @property
    def all_classes(self) -> bool:
        """Whether it sums the probabilities of every class, which backward reads before it
        begins."""
        return self.request.prob_sums and self.request.classes == "all"


@dataclass(frozen=True)
class Seconds:
    """What the matrices take that are read beside the logits."""

    row_bytes: int = 0  # of what is made of them for each row of a chunk
    row_flop: int = 0  # of their heads' products
    copied: int = 0  # bytes, once
    tile_bytes: int = 0  # of what a pass of the CPU keeps of each row of a block of rows
    tile_rows: int = 1
    count: int = 0  # of divergences
    copies_chunk: bool = False  # a GPU adds up several terms of the gradient over a copy
    spent: bool = False  # a CPU's only term of the gradient is formed with the value

    def chunk(self, rows: int, own_bytes: int) -> int:
        """Bytes beside a chunk of so many rows, which takes `own_bytes` itself."""
        tiles = torch.get_num_threads() * min(rows, self.tile_rows) * self.tile_bytes
        return rows * self.row_bytes + tiles + self.copies_chunk * own_bytes

    def lines(self, num_rows: int, rows: int, passes: int) -> list[str]:
        if not (self.row_bytes or self.row_flop):
            return []
        line = f"teacher    {megabytes(rows * self.row_bytes)} beside a chunk"
        if self.row_flop:
            times = f"{passes} product{'s' * (passes > 1)}"
            line += f", {times} of its head = {passes * num_rows * self.row_flop:.3g} FLOP"
        return [line]


def seconds_of(
    beside: Beside,
    asked: Asked,
    num_classes: int,
    picked: bool,
    device: torch.device,
    itemsize: int,
) -> Seconds:
    """`num_classes`: of the logits here, `picked`: whether some of their rows are left out,
    `itemsize`: of the arithmetic."""
    divergences = asked.request.divergences
    if not divergences:
        return Seconds()
    read = {id(s): s for s in (beside.second(of.kind) for of in divergences) if s is not None}
    made = [s.matrix.made(num_classes, picked) for s in read.values()]
    tile_bytes, on_gpu = 0, device.type == "cuda"
    if not on_gpu:
        # three buffers and a spare one; the logarithm of the mixture needs another
        tile_bytes = itemsize * num_classes * (4 + any(of.kind == "jsd" for of in divergences))
    return Seconds(
        sum(m.row_bytes for m in made),
        sum(m.row_flop for m in made),
        sum(m.copied for m in made),
        tile_bytes,
        max(1, BLOCK_BYTES // (4 * max(1, num_classes) * MATRICES)),
        len(divergences),
        on_gpu and (asked.plain or len(divergences) > 1),
        not (on_gpu or asked.plain) and len(divergences) == 1,
    )


def megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
