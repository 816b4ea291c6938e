"""What crosses ranks when the columns of the logits are sharded over a process group.

Every vocabulary rank has the same tokens and other columns. Forward gathers a few numbers per row;
backward sums one number per row where a loss reads classes. Where a rank's gradient of a replicated
tensor is its own columns' part, the parts are summed.

N tokens, R rows of a chunk, P vocabulary ranks, V classes in all, W of them here, K looked at,
B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from segloss.checks import describe
from segloss.distributed import as_group, gathered, scattered_sum
from segloss.kernels.common import widest
from segloss.kernels.row_stats import RowStats

# statistics that are gathered beside a row's maximum, sum and target where a loss asks for them
OPTIONAL = ("entropy", "argmax", "logit_sum", "weight_sum", "num_finite")


@dataclass(frozen=True)
class Crossing:
    """Collectives of one kind."""

    phase: str  # "forward" or "backward"
    ranks: str  # "vocabulary" or "tokens"
    kind: str  # "all-reduce", "all-gather", "reduce-scatter"
    count: int
    size: int | None  # bytes that a rank gives, all `count` together; None if logits decide


@dataclass(frozen=True)
class Sharding:
    """Which columns are here, `first` to `first + width`, and what that makes cross ranks.

    Without a group they all are, nothing crosses, and every method gives back what it got.
    """

    num_classes: int  # V
    first: int = 0
    width: int = 0  # 0 is allowed
    widest: int = 0  # of all ranks: the chunks follow it, so that all cut the same ones
    group: Any = None
    spans: tuple[tuple[int, int], ...] = ()  # (first, width) of every rank, where they are known

    @classmethod
    def whole(cls, num_classes: int) -> Sharding:
        return cls(num_classes, 0, num_classes, num_classes)

    @property
    def is_whole(self) -> bool:
        return self.group is None

    @property
    def last(self) -> int:
        return self.first + self.width

    def is_like(self, other: Sharding) -> bool:
        """Whether the same ranks have the same columns, on which all of them agree."""
        if self.is_whole or other.is_whole:
            return self.is_whole and other.is_whole
        ranks = [dist.get_process_group_ranks(each.group) for each in (self, other)]
        return self.spans == other.spans and ranks[0] == ranks[1]

    def cut(self, num_classes: int) -> Sharding:
        """The same columns of a vocabulary that is padded to another size."""
        if self.is_whole:
            return Sharding.whole(num_classes)
        width = max(0, min(self.width, num_classes - self.first))
        return replace(self, num_classes=num_classes, width=width)

    # ----------------------------------------------------------------- global to own numbers

    def own(self, target: Tensor) -> Tensor:
        """Class ids as columns here, -1 where another rank has them."""
        if self.is_whole:
            return target
        return torch.where(self.holds(target), target - self.first, -1)

    def holds(self, target: Tensor) -> Tensor:
        return (target >= self.first) & (target < self.last)

    def place(self, classes: Tensor | None) -> slice:
        """Where the columns here stand among sorted class ids; None for all of them."""
        if classes is None:
            return slice(self.first, self.last)
        if self.is_whole:
            return slice(0, classes.numel())
        before = [(classes < edge).sum() for edge in (self.first, self.last)]
        return slice(*torch.stack(before).tolist())  # a GPU is waited for once

    def columns(self, classes: Tensor | None) -> Tensor | None:
        """Those of sorted class ids that are here, as columns."""
        if classes is None or self.is_whole:
            return classes
        return classes[self.place(classes)] - self.first

    def within(self, index: Tensor, at: slice) -> Tensor:
        """Indices into a list as indices into a slice of it, -1 outside."""
        if self.is_whole:
            return index
        return torch.where((index >= at.start) & (index < at.stop), index - at.start, -1)

    def part(self, per_class: Tensor | None) -> Tensor | None:
        """Of numbers (..., V) those of the columns here."""
        if per_class is None or self.is_whole:
            return per_class
        return per_class[..., self.first : self.last]

    def spread(self, x: Tensor, fill: int) -> Tensor:
        """Numbers (B, W) of the columns here as (B, V), `fill` elsewhere."""
        if self.is_whole:
            return x
        full = x.new_full((x.shape[0], self.num_classes), fill)
        full[:, self.first : self.last] = x
        return full

    # ----------------------------------------------------------------------- what crosses

    def every(self, x: Tensor) -> Tensor:
        """x of every rank, stacked (P, ...), in the dtype that ranks' numbers are combined in."""
        return gathered(x, self.group).to(widest(x.device))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient."""
        if self.is_whole:
            return x
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def placed(self, parts: Sequence[tuple[Tensor, slice, int]]) -> list[Tensor]:
        """Each (values (B, K_here), their place, K) as (B, K) on every rank; one collective."""
        if self.is_whole or not parts:
            return [x for x, _, _ in parts]
        full = [x.new_zeros(x.shape[0], size) for x, _, size in parts]
        for zeros, (x, at, _) in zip(full, parts, strict=True):
            zeros[:, at] = x
        total = self.sum(torch.cat([x.view(-1) for x in full]))
        sizes = [x.numel() for x in full]
        return [t.view(x.shape) for t, x in zip(total.split(sizes), full, strict=True)]

    def joined(self, x: Tensor) -> Tensor:
        """The sum of numbers of which each rank has its own classes' part.

        Every rank then computes the whole loss of it, so that each part has the whole gradient.
        """
        return x if self.is_whole else _Joined.apply(x, self)

    def divided(self, x: Tensor) -> Tensor:
        """Numbers that all ranks have, of which each goes on to read its own part: the ranks'
        gradients are summed."""
        return x if self.is_whole else _Divided.apply(x, self)

    def exchange(
        self, stats: RowStats, target_logit: Tensor, target: Tensor, valid: Tensor
    ) -> RowStats:
        """Statistics of these columns -> of all, by one all-gather of a few numbers per row.

        `target_logit` (R,) is 0 where the target is elsewhere. All ranks combine the same numbers
        in the same order, so that the bits agree. Maxima and sums cross apart: their rounded total
        would cost the small `nll` of a confident row its digits.
        """
        own = dist.get_rank(self.group)
        every = self.numbers(stats, target_logit)
        row_max, log_sum = every["row_max"], every["log_sum"]
        base, log_total, part = normaliser(row_max, log_sum)
        empty = part == -torch.inf  # no finite logit among that rank's columns
        share, total = part.exp(), part.exp().sum(0)
        log_prob = every["target_logit"].sum(0) - base - log_total
        known = (target >= 0) & (target < self.num_classes)
        found = {
            "row_max": base,
            "log_sum": log_total,
            "log_prob": torch.where(known, log_prob, torch.nan),
        }
        if "entropy" in every:
            # sum_t q_t (H_t - log q_t)
            q = share / total
            parts = torch.where(q == 0, 0, q * (every["entropy"] - q.log()))
            found["entropy"] = torch.where(total == 0, torch.nan, parts.sum(0))
        if "argmax" in every:
            best = torch.where(empty, -torch.inf, row_max)
            top = best.amax(0)
            best = torch.where((best == top) | best.isnan(), every["argmax"], self.num_classes)
            found["argmax"] = best.amin(0).clamp(max=self.num_classes - 1)
        for name in ("logit_sum", "weight_sum", "num_finite"):
            if name in every:
                found[name] = every[name].sum(0)
        if stats.exp_scale is not None:
            scale = torch.exp(row_max[own] - base - log_total)
            found["exp_scale"] = torch.where(empty[own], 0, scale)
        result = {}
        for name, value in found.items():
            value = torch.where(valid, value, -1 if name == "argmax" else 0)
            result[name] = value.to(getattr(stats, name).dtype)
        return RowStats(**result)

    def numbers(self, stats: RowStats, target_logit: Tensor) -> dict[str, Tensor]:
        """What the ranks have (P, R) of each statistic, in the dtype they are combined in."""
        dtype = stats.row_max.dtype
        # sent as integers, so that a class id of any size and any NaN arrive as they are
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        named = {"row_max": stats.row_max, "log_sum": stats.log_sum, "target_logit": target_logit}
        for name in OPTIONAL:
            if getattr(stats, name) is not None:
                named[name] = getattr(stats, name)
        sent = []
        for name, value in named.items():
            sent.append((value + self.first).to(bits) if name == "argmax" else value.view(bits))
        packed = torch.stack(sent)  # (numbers of a row, R)
        every = gathered(packed, self.group)
        wide = widest(packed.device)
        return {
            name: every[:, i].long() if name == "argmax" else every[:, i].view(dtype).to(wide)
            for i, name in enumerate(named)
        }


def normaliser(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum (R,), log of the sum of exponentials relative to it (R,), each rank's part of that
    (P, R) as a logarithm, -inf without a finite logit), of what the ranks have (P, R) of both."""
    empty = log_sums == -torch.inf
    top = torch.where(empty, -torch.inf, maxima).amax(0)
    base = torch.where(top == -torch.inf, 0, top)
    part = torch.where(empty, -torch.inf, maxima - base + log_sums)
    return base, part.exp().sum(0).log(), part


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sharding):
        return sharding.sum(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sharding):
        ctx.sharding = sharding
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.sharding.sum(grad), None


class _Gathered(torch.autograd.Function):
    """Tokens that the ranks share out along a dimension: all-gather in, reduce-scatter out."""

    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return gathered(x.movedim(dim, 0), group).flatten(0, 1).movedim(0, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        own = scattered_sum(grad.movedim(ctx.dim, 0), ctx.group)
        return own.movedim(0, ctx.dim), None, None


@dataclass(frozen=True, eq=False)
class VocabShard:
    """How plain tensors hold the vocabulary's shards, as in Megatron-LM: `vocab=` of a source.

        logits = torch.cat(all_gather(local_logits), -1)[..., :num_classes]

    without the gather: each rank of the group gives its slice of the head (or of the logits), all
    give the same tokens, and each has the loss of all columns and the gradient of its slice.
    hidden's gradient is summed over the ranks, as a tensor-parallel linear layer does. Make it
    once, beside the head: on first use the ranks tell each other their columns and check them.

    Args:
        group: process group, or 1-D DeviceMesh, of the ranks that share the vocabulary.
        num_classes: V without padding: what lies behind it gets gradient 0.
        first, width: the columns here; by default the ranks' slices lie one after the other.
            Rows of a slice beyond `width` are padding.
        sequence_dim: the dimension along which the ranks share out hidden's tokens (Megatron's
            sequence parallelism: 0); None where each has all of them. The target is of all tokens.

    Errors: TypeError or ValueError naming the argument, on every rank of the group, for columns
    that overlap, leave gaps or make another V.
    """

    group: Any
    num_classes: int
    first: int | None = None
    width: int | None = None
    sequence_dim: int | None = None
    known: dict[int, Sharding] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def of(cls, sharding: Sharding) -> VocabShard | None:
        """Of a slice without padding, whose columns are known already; None for all of them."""
        if sharding.is_whole:
            return None
        made = cls(sharding.group, sharding.num_classes, sharding.first, sharding.width)
        made.known[sharding.width] = sharding
        return made

    def __post_init__(self):
        if self.group is None:
            raise TypeError("group is None; VocabShard takes the process group of the vocabulary")
        object.__setattr__(self, "group", as_group(self.group))
        for name in ("num_classes", "first", "width", "sequence_dim"):
            value = getattr(self, name)
            if value is None and name != "num_classes":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {describe(value)}; VocabShard takes an integer")
            if value < (name == "num_classes") and name != "sequence_dim":
                raise ValueError(f"{name} is {value}; VocabShard takes no less than "
                                 f"{int(name == 'num_classes')}")  # fmt: skip
        if (self.first is None) != (self.width is None):
            raise ValueError(
                f"first is {self.first} and width {self.width}; VocabShard takes both or neither"
            )

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def sharding(self, rows: int, device: torch.device) -> Sharding:
        """The columns of a slice of `rows` columns, padding included."""
        if rows not in self.known:
            self.known[rows] = self.agreed(rows, device)
        return self.known[rows]

    def agreed(self, rows: int, device: torch.device) -> Sharding:
        given = [-1 if n is None else n for n in (self.first, self.width)]
        own = torch.tensor([rows, self.num_classes, *given], device=device)
        spans = columns_of(gathered(own, self.group).tolist())
        return sharding_of(self.num_classes, spans, dist.get_rank(self.group), self.group)

    def assumed(self, rows: int) -> Sharding:
        """As `sharding`, without asking: equal slices, unless it is known."""
        if rows in self.known:
            return self.known[rows]
        first = dist.get_rank(self.group) * rows if self.first is None else self.first
        width = max(0, min(rows, self.num_classes - first)) if self.width is None else self.width
        return Sharding(self.num_classes, first, width, max(1, width), self.group)


def sharding_of(num_classes: int, spans: list[tuple[int, int]], rank: int, group) -> Sharding:
    """From (first, width) of every rank."""
    first, width = spans[rank]
    most = max(width for _, width in spans)
    return Sharding(num_classes, first, width, most, group, tuple(spans))


def columns_of(every: list[list[int]]) -> list[tuple[int, int]]:
    """(first, width) of each rank, from what all gave: [rows, num_classes, first or -1, width or
    -1]. All ranks see the same lists, so that all raise or none."""
    rows, classes, firsts, widths = zip(*every, strict=True)
    if len(set(classes)) > 1:
        raise ValueError(f"num_classes is {list(classes)} on the vocabulary's ranks; it takes one")
    num_classes = classes[0]
    if min(firsts) < 0 <= max(firsts):
        raise ValueError("some of the vocabulary's ranks give first and width, some do not")
    if min(firsts) < 0:
        starts = [sum(rows[:i]) for i in range(len(rows))]
        if starts[-1] + rows[-1] < num_classes:
            raise ValueError(
                f"the vocabulary's ranks have {list(rows)} columns; num_classes is {num_classes}"
            )
        starts = [min(start, num_classes) for start in starts]
        return [(s, min(n, num_classes - s)) for s, n in zip(starts, rows, strict=True)]
    spans = list(zip(firsts, widths, strict=True))
    reached = 0
    for first, width in sorted(span for span in spans if span[1]):
        if first != reached:
            raise ValueError(
                f"the vocabulary's ranks have the columns (first, width) {spans}, which "
                f"{'overlap' if first < reached else 'leave a gap'} at {min(first, reached)}"
            )
        reached = first + width
    if reached != num_classes or any(w > n for w, n in zip(widths, rows, strict=True)):
        raise ValueError(
            f"the vocabulary's ranks have the columns (first, width) {spans} in slices of "
            f"{list(rows)}; num_classes is {num_classes}"
        )
    return spans


def sum_of_gradients(x: Tensor, vocab: VocabShard) -> Tensor:
    """A tensor that all vocabulary ranks have; its gradient is the sum of theirs."""
    sharding = Sharding(vocab.num_classes, group=vocab.group)
    return sharding.divided(x)


def gathered_tokens(hidden: Tensor, vocab: VocabShard) -> Tensor:
    """Hidden states of all tokens, whose gradient is summed over the vocabulary's ranks."""
    if vocab.sequence_dim is None:
        return sum_of_gradients(hidden, vocab)
    return _Gathered.apply(hidden, vocab.group, vocab.sequence_dim % hidden.dim())
