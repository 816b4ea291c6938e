"""What is read of the logits beside their statistics: listed classes, and a second matrix in step.

N tokens, R rows of a chunk, V classes, k listed classes, S divergences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.divergence import Pair, PairNumbers, divergence, divergence_grad
from segloss.kernels.logit_grad import GradTerms, logit_grad
from segloss.kernels.row_stats import RowStats
from segloss.sharding import Crossing, Sharding
from segloss.sweep.shards import joined_divergences, logits_at

LISTED, DIVERGENCES = "listed", "divergences"  # a sweep's outputs


@dataclass(frozen=True, eq=False)
class Divergence:
    """One number per token of two sources, as `kernels/divergence.py` names them.

    The temperature divides both sources' logits. `weight` (V,) goes with "targets".
    """

    kind: str
    beta: float = 0.5
    temperature: float = 1.0
    weight: Tensor | None = None

    def key(self) -> tuple:
        return self.kind, self.beta, self.temperature, id(self.weight)

    def __eq__(self, other) -> bool:
        return isinstance(other, Divergence) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())


@dataclass(frozen=True)
class Made:
    """What reading a matrix beside logits takes."""

    row_bytes: int = 0  # of a row of a block
    row_flop: int = 0
    copied: int = 0  # bytes, once


class Matrix(Protocol):
    """Logits or probabilities (N, V) that can be read a block at a time, without gradient."""

    def block(self, rows: Tensor | slice, classes: slice) -> Rows: ...

    def block_rows(self, num_rows: int) -> int: ...

    @property
    def made_classes(self) -> int:
        """Columns of a block, if it does not lie in memory as it is."""

    def made(self, num_classes: int, picked: bool) -> Made:
        """What blocks of so many classes take; `picked`: whether of some rows alone."""

    @property
    def packs(self) -> bool:
        """Whether tensors and plain options say all of it."""

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Matrix: ...


@dataclass(frozen=True)
class Second:
    """Rows of a second matrix."""

    matrix: Matrix
    index: Tensor | slice = field(default_factory=lambda: slice(None))
    gathered: tuple[Crossing, ...] = ()  # how it came here

    def take(self, rows: Tensor | slice) -> Second:
        index = self.index
        if isinstance(index, Tensor):
            return replace(self, index=index[rows])
        first = index.start or 0
        if isinstance(rows, Tensor):
            return replace(self, index=rows + first)
        return replace(self, index=slice((rows.start or 0) + first, (rows.stop or 0) + first))

    def block(self, classes: slice = slice(None)) -> Rows:
        return self.matrix.block(self.index, classes)


@dataclass(frozen=True)
class Top:
    """The likeliest classes of a teacher, per token; what `segloss.TopK` holds."""

    ids: Tensor  # (N, k), -1 for none
    log_prob: Tensor  # (N, k)
    rest: str

    @property
    def listed(self) -> Tensor:
        return self.ids >= 0

    def log_rest(self, num_others: Tensor) -> Tensor:
        """Log-probability (N,) of every other class, if so many share what is left."""
        known = torch.where(self.listed, self.log_prob, -torch.inf).logsumexp(-1)
        return torch.log(-torch.expm1(known.clamp(max=0)) / num_others.clamp(min=1))

    def take(self, rows: Tensor | slice) -> Top:
        return replace(self, ids=self.ids[rows], log_prob=self.log_prob[rows])


@dataclass(frozen=True)
class Beside:
    """What a call gives per token beside the target."""

    columns: Tensor | None = None  # (N, k) class ids, -1 to skip
    teacher: Second | None = None
    top: Top | None = None
    probabilities: Second | None = None  # the target's

    def take(self, rows: Tensor | slice) -> Beside:
        return Beside(
            None if self.columns is None else self.columns[rows],
            None if self.teacher is None else self.teacher.take(rows),
            None if self.top is None else self.top.take(rows),
            None if self.probabilities is None else self.probabilities.take(rows),
        )

    @property
    def listed(self) -> Tensor | None:
        """(N, k): the columns, then the teacher's likeliest classes."""
        parts = [self.columns, None if self.top is None else self.top.ids]
        found = [part for part in parts if part is not None]
        return None if not found else found[0] if len(found) == 1 else torch.cat(found, 1)

    @property
    def made_classes(self) -> int:
        """Columns of the matrices that a chunk is made of; those that lie in memory cost none."""
        found = [s for s in (self.teacher, self.probabilities) if s is not None]
        return sum(s.matrix.made_classes for s in found)

    def block_rows(self, num_rows: int) -> int:
        """How many rows every second matrix makes at a time."""
        found = [s for s in (self.teacher, self.probabilities) if s is not None]
        return max(1, min([s.matrix.block_rows(num_rows) for s in found], default=num_rows))

    def second(self, kind: str) -> Second | None:
        return {"targets": self.probabilities, "lse": None}.get(kind, self.teacher)


def cooled(rows: Rows, temperature: float) -> Rows:
    """Rows of logits divided by a temperature."""
    if temperature == 1:
        return rows
    cap = None if rows.softcap is None else rows.softcap / temperature
    return Rows(rows.data, cap, rows.scale / temperature)


def listed_log_prob(z: Rows, listed: Tensor, stats: RowStats, sharding: Sharding) -> Tensor:
    """Log-probabilities (R, k) of listed classes, 0 where none is; read before z is written over.

    Each rank gives the logits of those that it has. An id out of range, only met on a GPU, gives
    NaN.
    """
    own = torch.where(sharding.holds(listed), listed - sharding.first, -1)
    logit = sharding.sum(logits_at(z, own))
    found = logit - stats.row_max[:, None] - stats.log_sum[:, None]
    if listed.is_cuda:
        found = torch.where(listed >= sharding.num_classes, torch.nan, found)
    return torch.where(listed < 0, 0, found)


@dataclass
class Reading:
    """What one chunk of logits is read for beside its statistics, and what came of it."""

    beside: Beside
    valid: Tensor  # (R,)
    divergences: tuple[Divergence, ...]
    sharding: Sharding
    pairs: list[Pair]
    listed: Tensor | None = None  # (R, k) log-probabilities, NaN-free where ignored

    @classmethod
    def of(
        cls,
        z: Rows,
        beside: Beside,
        valid: Tensor,
        divergences: tuple[Divergence, ...],
        sharding: Sharding,
        stats: RowStats,
    ) -> Reading:
        reading = cls(beside, valid, divergences, sharding, [])
        ids = beside.listed
        if ids is not None:
            found = listed_log_prob(z, ids, stats, sharding)
            reading.listed = torch.where(valid[:, None], found, 0)
        reading.pairs = reading.make_pairs(z)
        if not sharding.is_whole:
            joined_divergences(reading.pairs, sharding)
            return reading
        for pair, of in zip(reading.pairs, divergences, strict=True):
            whole = of.temperature == 1 and pair.width == z.num_classes
            divergence(pair, (stats.row_max, stats.log_sum) if whole else None)
        return reading

    @classmethod
    def again(
        cls,
        z: Rows,
        beside: Beside,
        valid: Tensor,
        divergences: tuple[Divergence, ...],
        sharding: Sharding,
        vectors: Tensor,  # (S, 6, R)
        classes: slice = slice(None),
    ) -> Reading:
        """The same of a block of its classes, from the numbers of the first reading."""
        reading = cls(beside, valid, divergences, sharding, [])
        for pair, numbers in zip(reading.make_pairs(z, classes), vectors, strict=True):
            pair.numbers = PairNumbers(*numbers.unbind(0))
            reading.pairs.append(pair)
        return reading

    def make_pairs(self, z: Rows, classes: slice = slice(None)) -> list[Pair]:
        blocks: dict[int, Rows] = {}
        made = []
        for of in self.divergences:
            second, block = self.beside.second(of.kind), None
            if second is not None:
                if id(second) not in blocks:
                    blocks[id(second)] = second.block(classes)
                block = blocks[id(second)]
                if of.kind != "targets":
                    block = cooled(block, of.temperature)
            weight = self.sharding.part(of.weight)
            weight = None if weight is None else weight[classes]
            student = cooled(z, of.temperature)
            made.append(Pair(student, block, self.valid, of.kind, of.beta, weight))
        return made

    @property
    def values(self) -> Tensor | None:
        """(R, S)"""
        return torch.stack([p.numbers.value for p in self.pairs], 1) if self.pairs else None

    @property
    def vectors(self) -> Tensor | None:
        """(S, 6, R)"""
        if not self.pairs:
            return None
        return torch.stack([torch.stack(pair.numbers) for pair in self.pairs])

    def upstream(self, grad: Tensor | None) -> list[Pair]:
        """The pairs with the gradient (R, S) of their values; none if there is none."""
        if grad is None:
            return []
        for pair, column in zip(self.pairs, grad.unbind(1), strict=True):
            pair.grad = torch.where(self.valid, column, 0)
        return self.pairs


def logits_gradient(
    z: Rows, terms: GradTerms, pairs: list[Pair], out: Tensor, plain: bool = True
) -> Tensor:
    """dlogits in `out`, of the statistics (`plain`: whether any has a gradient) and of pairs."""
    if z.num_classes == 0:  # other ranks have all of them
        return out
    if not pairs:
        return logit_grad(z, terms, out)
    return divergence_grad(z, pairs, out, terms if plain else None)


def has_plain(grads: dict[str, Tensor]) -> bool:
    """Whether a statistic other than a divergence has a gradient."""
    return any(name != DIVERGENCES for name in grads)


class Readings:
    """The readings of all chunks of a sweep, as outputs and as what its backward needs."""

    def __init__(
        self,
        beside: Beside,
        valid: Tensor,
        divergences: tuple[Divergence, ...],
        sharding: Sharding,
    ):
        self.beside, self.valid = beside, valid
        self.divergences, self.sharding = divergences, sharding
        self.numbers: list[tuple] = []

    @property
    def any(self) -> bool:
        """Whether the logits are read for more than their statistics."""
        return self.beside.listed is not None or len(self.divergences) > 0

    def read(self, z: Rows, here: slice, stats: RowStats) -> Reading:
        at = self.beside.take(here), self.valid[here], self.divergences, self.sharding
        reading = Reading.of(z, *at, stats)
        self.numbers.append((reading.listed, reading.values, reading.vectors))
        return reading

    def column(self, place: int, dim: int = 0) -> Tensor | None:
        found = [numbers[place] for numbers in self.numbers]
        return None if not found or found[0] is None else torch.cat(found, dim)

    def outputs(self) -> dict[str, Tensor | None]:
        """(N, k) and (N, S)"""
        return {LISTED: self.column(0), DIVERGENCES: self.column(1)}

    def saved(self) -> dict[str, Tensor | None]:
        """Of the kept tokens; the second matrices' own tensors apart."""
        return {"ids": self.beside.listed, "vectors": self.column(2, 2)}


@dataclass
class Backward:
    """Makes the pairs of a block of logits again, with the gradients of their values."""

    beside: Beside
    saved: dict[str, Tensor]
    divergences: tuple[Divergence, ...]
    sharding: Sharding
    upstream: Tensor | None  # (N, S)

    @classmethod
    def of(
        cls,
        saved: dict[str, Tensor],
        upstream: Tensor | None,
        divergences: tuple[Divergence, ...],
        sharding: Sharding,
        seconds: dict[str, Any],
    ) -> Backward:
        beside = Beside() if upstream is None else unpack(saved, seconds, saved.get("rows"))
        return cls(beside, saved, divergences, sharding, upstream)

    def pairs(self, z: Rows, rows: slice, classes: slice = slice(None)) -> list[Pair]:
        if self.upstream is None:
            return []
        at = self.beside.take(rows), self.saved["valid"][rows], self.divergences, self.sharding
        reading = Reading.again(z, *at, self.saved["vectors"][:, :, rows], classes)
        return reading.upstream(self.upstream[rows])


def pack(beside: Beside, divergences: tuple[Divergence, ...]) -> tuple[dict, dict]:
    """(tensors to save, the rest) of the second matrices; `unpack` makes them again."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name in ("teacher", "probabilities"):
        second = getattr(beside, name)
        if second is None or not divergences:
            continue
        if not second.matrix.packs:
            rest[name] = second.matrix
            continue
        own, options = second.matrix.packed()
        tensors |= {f"{name}.{n}": t.detach() for n, t in own.items()}
        rest[name] = type(second.matrix), options
    return tensors, rest


def check_there(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                f"the teacher's weights are gone ({name}): an engine has taken them back after its "
                "forward, and this loss reads them again in backward; sums of token losses with "
                "reduction='mean' or 'sum' form their gradient in forward and do not"
            )


def unpack(saved: dict[str, Tensor], rest: dict[str, Any], rows: Tensor | None) -> Beside:
    found = {}
    for name, given in rest.items():
        if isinstance(given, tuple):
            kind, options = given
            names = [n for n in saved if n.startswith(f"{name}.")]
            own = {n.removeprefix(f"{name}."): saved[n] for n in names}
            check_there(own)
            given = kind.unpacked(own, options)
        found[name] = Second(given, slice(None) if rows is None else rows)
    return Beside(teacher=found.get("teacher"), probabilities=found.get("probabilities"))
