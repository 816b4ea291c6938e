"""A tensor of logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from segloss.checks import FLOATS, check_data, check_transform, describe
from segloss.kernels.common import Rows
from segloss.kernels.divergence import raw_rows
from segloss.sharding import Sharding, VocabShard
from segloss.sources.layout import Layout, dense_layout, refuse_rows
from segloss.sweep.batch import Batch
from segloss.sweep.dense import sweep_dense
from segloss.sweep.request import Request, Sweep
from segloss.sweep.source import Source, Spread


@dataclass(frozen=True)
class DenseLogits(Source):
    """`softcap * torch.tanh(scale * logits / softcap)`, transformed on the fly.

    A plain tensor given to a loss means `DenseLogits(tensor)`.

    Args:
        logits: (..., V), float64, float32, bfloat16 or float16, at least one leading dimension.
        softcap: positive number, or None for no cap (Gemma-2 style logit soft-capping).
        scale: positive number the logits are multiplied by before the cap (1 / temperature).
        vocab: `VocabShard` where logits is a slice of the vocabulary, others of which lie on other
            ranks. A DTensor says so itself: Shard(-1) on one dimension of its mesh, and Shard of a
            leading dimension where tokens lie on other ranks.

    -inf stays -inf through the cap, with gradient 0.
    """

    logits: Tensor
    softcap: float | None = None
    scale: float = 1.0
    vocab: VocabShard | None = None
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self):
        check_transform(self.softcap, self.scale)
        logits = self.logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits is {describe(logits)}; it takes a tensor of shape (..., V)")
        check_data("logits", logits)
        if logits.dtype not in FLOATS:
            raise TypeError(
                f"logits is {describe(logits)}; it takes float64, float32, bfloat16 or float16"
            )
        if logits.dim() < 2 or (logits.shape[-1] == 0 and self.vocab is None):
            raise ValueError(
                f"logits is {describe(logits)}; it takes shape (..., V): at least two dimensions, "
                "at least one class"
            )
        if logits.device.type == "meta":
            raise ValueError(f"logits is {describe(logits)}; it takes a tensor with data")
        object.__setattr__(self, "layout", dense_layout(logits, self.vocab))

    @property
    def leading_shape(self) -> torch.Size:
        return self.layout.leading_shape(self.logits.shape)

    @property
    def num_classes(self) -> int:
        return self.layout.num_classes

    @property
    def sharding(self) -> Sharding:
        return self.layout.sharding

    @property
    def is_plain(self) -> bool:
        return self.layout.is_plain

    def token_group(self, group) -> Any:
        return self.layout.token_group(group)

    def like_target(self, name: str, x) -> Any:
        return self.layout.like_target(name, x)

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def sweep(self, batch: Batch, request: Request) -> Sweep:
        with torch.autocast(self.device.type, enabled=False):
            return sweep_dense(self.here(), self.softcap, self.scale, batch, request)

    def here(self) -> Tensor:
        """The columns of this rank, without padding."""
        return self.layout.columns(self.logits, self.sharding, -1)

    def rows(self, index: Tensor) -> Tensor:
        refuse_rows(self.layout)
        return self.logits.reshape(-1, self.num_classes)[index]

    @property
    def made_classes(self) -> int:
        return 0

    def block(self, rows: Tensor | slice, classes: slice) -> Rows:
        data = Rows.of(self.logits.detach()).data
        time = data.shape[1]
        if isinstance(rows, Tensor):
            data = data[rows // time, rows % time][None]
        elif rows != slice(None):
            data = raw_rows(Rows(data), rows)[None]
        return Rows(data[:, :, classes], self.softcap, self.scale)

    def plan(self, batch: Batch, row_sum: bool, all_classes: bool, peaks: bool) -> str:
        width = self.layout.assumed.width
        size = batch.target.numel() * width * self.logits.element_size() / 2**20
        mode, peak = "no gradient: the logits are read once", 0.0
        if torch.is_grad_enabled() and self.logits.requires_grad:
            mode, peak = "logits given: read once, read again to write their gradient", size
        lines = [
            f"tokens     {int(batch.valid.sum())} of {batch.target.numel()}",
            f"mode       {mode}",
            f"peak       {peak:.1f} MiB of gradient beside {size:.1f} MiB of logits",
        ]
        return "\n".join(lines)

    def spread(self, batch: Batch, fused: bool) -> Spread:
        trained = torch.is_grad_enabled() and self.logits.requires_grad
        return Spread(batch.target.numel(), trained, self.layout.vocabulary)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"logits": self.logits}, {"softcap": self.softcap, "scale": self.scale}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> DenseLogits:
        return cls(tensors["logits"], **options)
