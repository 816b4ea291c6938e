"""What a loss is given: a matrix of logits that knows how it is swept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.sweep.batch import Batch
from segloss.sweep.request import Request, RowSum, Sweep, TokenStats


class Source(ABC):
    """Logits (..., V). Nothing above this class asks which source it has."""

    softcap: float | None
    scale: float
    packs = True  # whether `packed` says all of it

    @property
    @abstractmethod
    def leading_shape(self) -> torch.Size:
        """The target's."""

    @property
    @abstractmethod
    def num_classes(self) -> int: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""

    @abstractmethod
    def sweep(self, batch: Batch, request: Request) -> Sweep:
        """The statistics that `request` names, differentiable."""

    @property
    def waits(self) -> bool:
        """Whether a sweep waits for the device, whatever the loss."""
        return False

    @property
    def forms_gradients(self) -> bool:
        """Whether `row_sum` forms the gradients with the value, which saves a matrix product."""
        return False

    def row_sum(self, batch: Batch, plan: RowSum) -> tuple[Tensor, TokenStats]:
        """(value (), detached statistics), where `forms_gradients`."""
        raise TypeError(f"{type(self).__name__} forms no gradients with a value")

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Logits (n, V) of some rows before scale and softcap; differentiable."""

    def block(self, rows: Tensor | slice, classes: slice) -> Rows:
        """Some rows' logits of some classes, for a loss of another source; no gradient."""
        with torch.no_grad():
            index = torch.arange(self.leading_shape.numel(), device=self.device)[rows]
            return Rows.of(self.rows(index)[:, classes], self.softcap, self.scale)

    @property
    def made_classes(self) -> int:
        """Columns of a block, if it does not lie in memory as it is."""
        return self.num_classes

    def block_rows(self, num_rows: int) -> int:
        """How many of so many rows a block may have."""
        return num_rows

    @abstractmethod
    def plan(self, batch: Batch, row_sum: bool) -> str:
        """In words and bytes what a loss and its backward cost; `row_sum`: whether it is one."""

    @abstractmethod
    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain options) that `unpacked` makes the same source of."""

    @classmethod
    @abstractmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Source: ...

    def explain(self, loss, target: Tensor) -> str:
        """What `loss(self, target)` and its backward do: chunks, matrix products, bytes."""
        return loss.explain(self, target)
