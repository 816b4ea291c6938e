"""What a call gives beside logits and target, checked: listed classes, teacher, probabilities.

N tokens, V classes, k listed classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from segloss.checks import INTEGERS, check_choice, check_plain, describe
from segloss.kernels.common import Rows
from segloss.sharding import Sharding, VocabShard
from segloss.sources.dense import DenseLogits
from segloss.sources.given import as_source, is_local
from segloss.sweep.beside import Beside, Made, Second, Top
from segloss.sweep.source import Source

RESTS = ("renormalise", "uniform", "ignore")
# by how many classes two vocabularies may differ and still be one, padded differently
PADDING = 512


@dataclass(frozen=True)
class TopK:
    """A teacher of which only its likeliest classes are known, as files of stored teachers hold it.

    Args:
        ids: (..., k) integers, distinct class ids of each token; -1 where fewer are stored.
        log_prob: (..., k) floats, the teacher's log-probabilities of these classes (nats), from a
            softmax over its whole vocabulary.
        rest: what becomes of the probability that is left:
            "renormalise": it is shared among the listed classes by their own probabilities,
            "uniform": it is spread evenly over all other classes,
            "ignore": classes that are not listed are left out of the divergence's sum.

    Errors: TypeError or ValueError naming the argument.
    """

    ids: Tensor
    log_prob: Tensor
    rest: str = "renormalise"

    def __post_init__(self):
        check_choice("rest", self.rest, RESTS)
        for name, tensor in (("ids", self.ids), ("log_prob", self.log_prob)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{name} is {describe(tensor)}; it takes a tensor of shape (..., k)"
                )
            check_plain(name, tensor)
        if self.ids.dtype not in INTEGERS:
            raise TypeError(f"ids is {describe(self.ids)}; it takes an integer dtype")
        if not self.log_prob.is_floating_point():
            raise TypeError(f"log_prob is {describe(self.log_prob)}; it takes a float dtype")
        if self.ids.dim() < 2 or self.ids.shape[-1] == 0 or self.ids.shape != self.log_prob.shape:
            raise ValueError(
                f"ids has shape {tuple(self.ids.shape)}, log_prob {tuple(self.log_prob.shape)}; "
                "both take (..., k)"
            )

    @property
    def leading_shape(self) -> torch.Size:
        return self.ids.shape[:-1]

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"ids": self.ids, "log_prob": self.log_prob}, {"rest": self.rest}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> TopK:
        return cls(tensors["ids"], tensors["log_prob"], options["rest"])


@dataclass(frozen=True)
class TopLogits:
    """A stored teacher written out, a block at a time; what is not listed shares the rest."""

    ids: Tensor  # (N, k)
    log_prob: Tensor  # (N, k)
    sharding: Sharding  # of the student's classes, of which those here are written out
    packs: ClassVar[bool] = True

    def block(self, rows: Tensor | slice, classes: slice) -> Rows:
        ids, log_prob = self.ids[rows], self.log_prob[rows]
        top = Top(ids, log_prob, "uniform")
        fill = top.log_rest(self.sharding.num_classes - top.listed.sum(-1))
        first, last, _ = classes.indices(self.sharding.width)
        width = max(0, last - first)
        first, last = first + self.sharding.first, last + self.sharding.first
        out = fill[:, None].expand(-1, width + 1).contiguous()
        inside = top.listed & (ids >= first) & (ids < last)
        # what lies outside goes to the spare column
        out.scatter_(1, torch.where(inside, ids - first, width), log_prob)
        return Rows.of(out[:, :width])

    @property
    def made_classes(self) -> int:
        return self.sharding.widest  # so that all ranks cut the same chunks

    def block_rows(self, num_rows: int) -> int:
        return min(num_rows, max(1, (16 << 20) // self.sharding.widest))

    def made(self, num_classes: int, picked: bool) -> Made:
        return Made((num_classes + 1) * self.log_prob.element_size())

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"ids": self.ids, "log_prob": self.log_prob}, {"sharding": self.sharding}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> TopLogits:
        return cls(tensors["ids"], tensors["log_prob"], options["sharding"])


def make_beside(
    source: Source,
    *,
    columns: Tensor | None = None,
    teacher: Tensor | Source | TopK | None = None,
    probabilities: Tensor | None = None,
    crossing: bool = True,
) -> Beside:
    """Everything checked against the source it is read beside.

    `probabilities` are those of the classes here, as `own_probabilities` gives them. Without
    `crossing` no other rank is asked, nothing is copied, and a plan can be made of it, no more.
    """
    sharding = source.sharding if crossing else source.assumed
    found: dict[str, Any] = {}
    if columns is not None:
        columns = source.like_target("columns", columns)
        found["columns"] = check_ids("columns", columns, source)
    if isinstance(teacher, TopK):
        check_like("teacher", teacher.leading_shape, teacher.ids.device, source)
        ids = check_ids("teacher's ids", teacher.ids, source)
        log_prob = teacher.log_prob.detach().reshape(ids.shape).to(source.dtype)
        found["top"] = Top(ids, log_prob, teacher.rest)
        if teacher.rest == "uniform":
            found["teacher"] = Second(TopLogits(ids, log_prob, sharding))
    elif teacher is not None:
        given = as_teacher(teacher, source)
        if crossing:
            check_shards(given, source)
        settled = given.settled(sharding, crossing)
        found["teacher"] = Second(settled, gathered=tuple(given.gathers()))
    if probabilities is not None:
        vocab = VocabShard.of(sharding)
        found["probabilities"] = Second(DenseLogits(probabilities.detach(), vocab=vocab))
    return Beside(**found)


def check_like(name: str, shape: torch.Size, device: torch.device, source: Source) -> None:
    if shape != source.leading_shape:
        raise ValueError(
            f"{name} has leading shape {tuple(shape)}; it takes the logits', "
            f"{tuple(source.leading_shape)}"
        )
    if device != source.device:
        raise ValueError(f"{name} is on {device}, but logits are on {source.device}")


def check_ids(name: str, ids: Tensor, source: Source) -> Tensor:
    """(N, k) int64, -1 for none; out of range raises on a CPU, as a target does."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"{name} is {describe(ids)}; it takes class ids of an integer dtype")
    if ids.shape[:-1] != source.leading_shape or ids.dim() == 0:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}; it takes {(*source.leading_shape, 'k')}: the "
            "target's, then one place for each class"
        )
    if ids.device != source.device:
        raise ValueError(f"{name} is on {ids.device}, but logits are on {source.device}")
    flat = ids.detach().reshape(source.leading_shape.numel(), ids.shape[-1]).to(torch.int64)
    if flat.device.type == "cpu" and flat.numel():
        low, high = int(flat.min()), int(flat.max())
        if low < -1 or high >= source.num_classes:
            raise ValueError(
                f"{name} has ids from {low} to {high}; logits have {source.num_classes} classes "
                f"(0 to {source.num_classes - 1}), and -1 stands for none"
            )
    return flat


def as_teacher(teacher: Any, source: Source) -> Source:
    """A teacher's logits; a tensor holds logits."""
    if not isinstance(teacher, (Tensor, Source)):
        raise TypeError(
            f"teacher is {describe(teacher)}; it takes logits (..., V), DenseLogits, LinearLogits "
            "or TopK"
        )
    given = as_source(teacher)
    check_like("teacher", given.leading_shape, given.device, source)
    ours, theirs = source.num_classes, given.num_classes
    if abs(ours - theirs) > max(PADDING, max(ours, theirs) // 64):
        raise ValueError(
            f"teacher has {theirs} classes, the student {ours}: more than padding of one "
            "vocabulary; where one is the start of the other, cut the longer (logits[..., :n], or "
            "a head's weight[:n])"
        )
    return given


def is_packable(teacher: Any) -> bool:
    """Whether tensors of this rank alone and plain options say all of a teacher."""
    if isinstance(teacher, Source):
        return teacher.is_plain and teacher.packs
    return isinstance(teacher, TopK) or (isinstance(teacher, Tensor) and is_local(teacher))


def check_shards(teacher: Source, source: Source) -> None:
    """Refuse a teacher of which this rank has other tokens or other classes than of the student;
    all ranks see it alike."""
    if teacher.shared_tokens not in (None, source.shared_tokens):
        raise TypeError(
            "teacher's tokens are sharded over other ranks than the student's; it takes the "
            "placements of the student's tokens"
        )
    ours, theirs = source.sharding, teacher.sharding
    if not (theirs.is_whole or ours.is_like(theirs)):
        raise TypeError(
            "teacher's classes are sharded over ranks, and the student's are not so; it takes the "
            "student's shards, or all classes on every rank"
        )


def own_probabilities(target: Any, source: Source, crossing: bool = True) -> Tensor | None:
    """Of a target that holds probabilities (..., V), as `F.cross_entropy` takes them too, those of
    the classes here; None of any other target.

    A plain one may be cut to these classes already, without padding.
    """
    if not (isinstance(target, Tensor) and target.is_floating_point()):
        return None
    x = source.like_logits("target", target)
    if x.dim() == 0 or x.shape[:-1] != source.leading_shape:
        return None
    sharding = source.sharding if crossing else source.assumed
    if x.shape[-1] == sharding.width:
        return x
    return sharding.part(x) if x.shape[-1] == source.num_classes else None
