"""What a loss is given: a matrix of logits that knows how it is swept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.sharding import Sharding
from segloss.sweep.batch import Batch
from segloss.sweep.request import Request, RowSum, Sweep, TokenStats


@dataclass(frozen=True)
class Crossing:
    """Collectives of one kind."""

    phase: str  # "forward" or "backward"
    ranks: str  # "vocabulary" or "tokens"
    kind: str  # "all-reduce", "all-gather", "reduce-scatter"
    count: int
    size: int | None  # bytes that a rank gives, all `count` together; None if logits decide


@dataclass(frozen=True)
class Spread:
    """How a source lies on the ranks, as its plan in words tells it."""

    rows: int  # tokens whose logits are looked at
    trained: bool
    vocabulary: int = 1  # ranks that share the classes
    chunks: int = 1
    crossings: list[Crossing] = field(default_factory=list)  # of its own tensors
    filtered: bool = False  # by grad_filter


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
    def num_classes(self) -> int:
        """Of all ranks."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""

    @property
    def sharding(self) -> Sharding:
        """Of the classes over ranks; may ask the others, once."""
        return Sharding.whole(self.num_classes)

    @property
    def is_plain(self) -> bool:
        """Whether every tensor is what it seems: whole, and of this rank alone."""
        return True

    def token_group(self, group) -> Any:
        """The group of the ranks with other tokens, from the one a loss was given."""
        return group

    def like_target(self, name: str, x) -> Any:
        """A tensor that goes with the target, as it is here."""
        return x

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
    def plan(self, batch: Batch, row_sum: bool, all_classes: bool, peaks: bool) -> str:
        """In words and bytes what a loss and its backward cost; `row_sum`: whether it is one,
        `all_classes`: whether it sums the probabilities of each of them, `peaks`: whether it asks
        for the largest of each."""

    def spread(self, batch: Batch, fused: bool) -> Spread:
        """How it lies on the ranks, of which none is asked; `fused`: by `row_sum`."""
        return Spread(batch.target.numel(), torch.is_grad_enabled())

    @abstractmethod
    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain options) that `unpacked` makes the same source of."""

    @classmethod
    @abstractmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Source: ...

    def explain(self, loss, target: Tensor) -> str:
        """What `loss(self, target)` and its backward do: chunks, matrix products, bytes."""
        return loss.explain(self, target)
