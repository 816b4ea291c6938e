"""A linear head as the engine is given it: tensors and options, checked by whoever gives them.

V classes, D hidden size, r rank of a LoRA adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from segloss.sharding import Sharding

# Logits of one row chunk, in bytes, where the caller gives none (measured: bench/NOTES.md)
CPU_CHUNK_BYTES = 64 << 20
GPU_CHUNK_BYTES = 512 << 20
# with fewer rows than these the matrix units wait for the weight to be read again
CPU_CHUNK_ROWS = 512
GPU_CHUNK_ROWS = 1024
# up to this many classes grad_filter is taken as it is; small columns add up, so more of them are
# held to a lower limit (measured: bench/NOTES.md)
FILTER_CLASSES = 1 << 16


@dataclass(frozen=True)
class Options:
    """Everything of a head but its tensors; their meaning stands at `segloss.LinearLogits`."""

    product_dtype: torch.dtype  # of the matrix products
    softcap: float | None = None
    scale: float = 1.0
    lora_scale: float = 0.0
    compact: bool = True
    chunk_bytes: int | None = None
    memory_budget: int | None = None
    grad_filter: float = 0.0
    sharding: Sharding | None = None  # of the classes over ranks; None for all here
    # filled by backward: "dropped_mass", the share of |dlogits| that grad_filter merged
    report: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """`tensors`: hidden (..., D), weight (V, D), and of bias (V,), lora_a (r, D), lora_b (V, r)
    those there are; gradients come in their order."""

    tensors: dict[str, Tensor]
    options: Options
    other_classes: int = 0  # of a chunk of other logits that is made beside one of these

    @property
    def hidden(self) -> Tensor:
        return self.tensors["hidden"]

    @property
    def weight(self) -> Tensor:
        return self.tensors["weight"]

    @property
    def num_classes(self) -> int:
        """Those here."""
        return self.weight.shape[0]

    @property
    def sharding(self) -> Sharding:
        return self.options.sharding or Sharding.whole(self.num_classes)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def filter_limit(self) -> float:
        """`grad_filter` as each column is held to it."""
        return self.options.grad_filter * min(1.0, FILTER_CLASSES / self.sharding.num_classes)

    def needed(self) -> dict[str, bool]:
        """Which tensors get a gradient."""
        enabled = torch.is_grad_enabled()
        return {name: enabled and tensor.requires_grad for name, tensor in self.tensors.items()}

    @property
    def sums_apart(self) -> bool:
        """Whether dweight is added up over chunks in other memory than its own, in float32."""
        product = self.options.product_dtype
        return product.itemsize == 2 and self.weight.dtype == product

    def chunk_rows(self, num_rows: int, *, trained: bool, row_sum: bool = True) -> int:
        """Rows of a chunk: from the byte budget alone, never from V / D.

        `trained`: whether the weight gets a gradient, `row_sum`: whether it is formed in forward,
        chunk by chunk. The float32 sum that many chunks then need is memory, too: up to two chunks
        go without, and may take as much.
        """
        on_gpu, chunk_bytes = self.device.type == "cuda", self.options.chunk_bytes
        widest = self.sharding.widest  # ranks that share the classes cut the same chunks
        row_bytes = (widest + self.other_classes) * self.options.product_dtype.itemsize
        if chunk_bytes is not None:
            return self.even_rows(num_rows, chunk_bytes // row_bytes)
        sum_bytes = 4 * widest * self.weight.shape[1] if trained and self.sums_apart else 0
        if on_gpu:
            rows = max(GPU_CHUNK_ROWS, max(GPU_CHUNK_BYTES, sum_bytes) // row_bytes)
            return self.even_rows(num_rows, rows)
        rows = max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // row_bytes)
        half = -(-num_rows // 2)
        if row_sum and half > rows and (half - rows) * row_bytes <= sum_bytes:
            rows = half
        return self.even_rows(num_rows, rows)

    @staticmethod
    def even_rows(num_rows: int, rows: int) -> int:
        """At most about so many, in equal chunks: a small last one would reread the weight for
        little."""
        if rows >= num_rows:
            return max(1, num_rows)
        even = -(-num_rows // -(-num_rows // max(1, rows)))
        return even if even < 128 else min(num_rows, -(-even // 128) * 128 if rows >= 128 else even)


def is_frozen(needed: dict[str, bool]) -> bool:
    """Whether only hidden gets a gradient."""
    return needed["hidden"] and not any(on for name, on in needed.items() if name != "hidden")
