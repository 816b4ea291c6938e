"""What is read of rows whose columns lie on several ranks: single logits, divergences.

R rows of a chunk, P ranks, S divergences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.divergence import Pair, PairNumbers, divergence, mixture, normalisers
from segloss.sharding import Sharding, normaliser

BOTH = ("student_max", "student_sum", "teacher_max", "teacher_sum")
# what a rank tells of each row, by the divergence's kind
SENT = {
    "forward": ("value", *BOTH),
    "reverse": ("value", *BOTH),
    "jsd": BOTH,
    "targets": ("value", "student_max", "student_sum", "teacher_sum"),
    "lse": ("student_max", "student_sum"),
}


def logits_at(z: Rows, column: Tensor) -> Tensor:
    """z_i[column_i] for columns (R,) or (R, k), 0 where the column is -1."""
    if z.num_classes == 0:
        return z.new(*column.shape).zero_()
    row = torch.arange(z.num_rows, device=column.device)
    row = row.view(-1, *[1] * (column.dim() - 1)).expand_as(column)
    found = z.at(row.reshape(-1), column.clamp(min=0).reshape(-1)).view(column.shape)
    return torch.where(column >= 0, found, 0)


def joined_divergences(pairs: list[Pair], sharding: Sharding) -> None:
    """Fills the pairs' numbers with those of all columns, by one all-gather of what `SENT` names,
    and a sum of two more of "jsd", which is known only after both normalisers.

    All ranks combine the same numbers in the same order, so that the bits agree.
    """
    if not pairs:
        return
    for pair in pairs:
        if pair.kind == "jsd":
            normalisers(pair)
        else:
            divergence(pair)
    sent = [getattr(pair.numbers, name) for pair in pairs for name in SENT[pair.kind]]
    every = iter(sharding.every(torch.stack(sent)).unbind(1))
    for pair in pairs:
        pair.numbers = joined(pair, {name: next(every) for name in SENT[pair.kind]})
    mixed = [mixture(pair).numbers for pair in pairs if pair.kind == "jsd"]
    if mixed:
        parts = [x for numbers in mixed for x in (numbers.value, numbers.center)]
        for part, whole in zip(parts, sharding.sum(torch.stack(parts)), strict=True):
            part.copy_(whole)


def joined(pair: Pair, parts: dict[str, Tensor]) -> PairNumbers:
    """Numbers of all columns (R,) from those of each rank's (P, R); of "jsd" the normalisers."""
    found = {name: torch.zeros_like(parts["student_max"][0]) for name in PairNumbers._fields}
    base, log_sum, part = normaliser(parts["student_max"], parts["student_sum"])
    found["student_max"], found["student_sum"], log_p = base, log_sum, part - log_sum
    if "teacher_max" in parts:
        base, log_sum, part = normaliser(parts["teacher_max"], parts["teacher_sum"])
        found["teacher_max"], found["teacher_sum"], log_q = base, log_sum, part - log_sum
    if pair.kind == "forward":
        found["value"] = mean_divergence(parts["value"], log_q, log_p)
    elif pair.kind == "reverse":
        found["value"] = found["center"] = mean_divergence(parts["value"], log_p, log_q)
    elif pair.kind == "targets":
        mass = parts["teacher_sum"]
        found["teacher_sum"] = mass.sum(0)
        # from each rank's normaliser to that of all
        value = parts["value"] - mass * log_p
        value = torch.where(log_p > -torch.inf, value, torch.where(mass == 0, 0, torch.inf))
        found["value"] = value.sum(0)
    elif pair.kind == "lse":
        found["value"] = base + log_sum
    dtype = pair.student.dtype
    return PairNumbers(**{n: torch.where(pair.valid, x, 0).to(dtype) for n, x in found.items()})


def mean_divergence(value: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) (R,) of whole rows, from that within each rank's columns and the logarithms of
    what both have there (P, R): `sum_t a_t (KL_t + log(a_t / b_t))`."""
    term = torch.where(log_b == -torch.inf, torch.inf, value + log_a - log_b)
    return torch.where(log_a.exp() == 0, 0, log_a.exp() * term).sum(0)
