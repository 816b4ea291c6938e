"""Weighted sums of losses, evaluated from one sweep over the logits."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from segloss.checks import describe
from segloss.losses.base import Loss
from segloss.sweep.batch import Batch
from segloss.sweep.beside import Beside
from segloss.sweep.request import Request, RowSum, Sweep
from segloss.sweep.source import Source

__all__ = ["CombinedLoss"]


class CombinedLoss(Loss):
    """`sum(coefficient * loss(logits, target) for coefficient, loss in terms)`, one sweep.

    Made by `0.6 * CrossEntropyLoss() + 0.4 * LovaszSoftmaxLoss()`. The parts share `ignore_index`,
    `group` and the kind of reduction; "none" is for sums of token losses. Each part keeps its own
    class weights.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]):
        flat: list[tuple[float, Loss]] = []
        for coefficient, loss in terms:
            if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
                raise TypeError(f"coefficient is {describe(coefficient)}; it takes a number")
            if not isinstance(loss, Loss):
                raise TypeError(f"a term is {describe(loss)}; it takes a segloss loss")
            inner = loss.terms if isinstance(loss, CombinedLoss) else [(1.0, loss)]
            flat += [(coefficient * c, part) for c, part in inner]
        if not flat:
            raise ValueError("terms is empty; it takes at least one (coefficient, loss)")
        parts = [part for _, part in flat]
        for name in ("ignore_index", "group"):
            values = [getattr(part, name) for part in parts]
            if any(value != values[0] for value in values):
                raise ValueError(f"the parts of a combined loss have {name} {values}; it takes one")
        reductions = {part.reduction for part in parts}
        if "none" in reductions and (
            len(parts) > 1 and not (reductions == {"none"} and all(p.is_token_loss for p in parts))
        ):
            raise ValueError(
                "reduction='none' in a combined loss needs token losses that all have it; got "
                + ", ".join(f"{type(p).__name__}(reduction={p.reduction!r})" for p in parts)
            )
        reduction = parts[0].reduction if len(reductions) == 1 else "mean"
        super().__init__(None, parts[0].ignore_index, reduction, parts[0].group)
        self.coefficients = [c for c, _ in flat]
        self.parts = nn.ModuleList(parts)

    @property
    def terms(self) -> list[tuple[float, Loss]]:
        return list(zip(self.coefficients, cast(list[Loss], self.parts), strict=True))

    def describe(self, options: Mapping[str, Any]) -> str | None:
        parts = [f"({c!r}, {part.description})" for c, part in self.terms]
        if any(part.description is None for part in self.parts):
            return None
        return f"({self.key!r}, ({', '.join(parts)},))"

    def check(self, source: Source) -> None:
        for _, part in self.terms:
            part.check(source)

    def check_teacher(self, teacher) -> None:
        super().check_teacher(teacher)
        for _, part in self.terms:
            if part.reads_teacher:
                part.check_teacher(teacher)

    def request(self) -> Request:
        return functools.reduce(operator.or_, (part.request() for _, part in self.terms))

    def reads_plain(self, beside: Beside) -> bool:
        return any(part.reads_plain(beside) for _, part in self.terms)

    def request_for(self, beside: Beside) -> Request:
        parts = (part.request_for(beside) for _, part in self.terms)
        return functools.reduce(operator.or_, parts)

    @property
    def reads_teacher(self) -> bool:  # type: ignore[override]
        return any(part.reads_teacher for _, part in self.terms)

    @property
    def takes_probabilities(self) -> bool:  # type: ignore[override]
        return all(part.takes_probabilities for _, part in self.terms)

    @property
    def is_token_loss(self) -> bool:  # type: ignore[override]
        return all(part.is_token_loss for _, part in self.terms)

    def row_sum(self, batch: Batch, normalizer: Tensor | None, request: Request) -> RowSum:
        plans = [part.row_sum(batch, normalizer, request) for _, part in self.terms]
        terms = [
            (coefficient * factor, values)
            for coefficient, plan in zip(self.coefficients, plans, strict=True)
            for factor, values in plan.terms
        ]
        plain = any(plan.plain for plan in plans)
        return RowSum(terms, request, plans[0].denominator, plain)

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        values = [
            coefficient * part.value(sweep, batch, normalizer) for coefficient, part in self.terms
        ]
        return values[0] if len(values) == 1 else torch.stack(values).sum(0)

    def extra_repr(self) -> str:
        return f"coefficients={self.coefficients}"
