"""What a loss may ask of the logits, and what one sweep over them returns.

N tokens, V classes, K classes looked at, B samples, M Lovász candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from segloss.sweep.beside import Beside, Divergence, Top


@dataclass
class Statistics:
    """Per-token and per-class numbers of a batch, differentiable where they are real numbers.

    Per token, of the target's shape, 0 (argmax: -1) at ignored tokens:
    `log_prob` of the target, `lse`, `entropy` (nats), `argmax`, `valid`.
    `column_log_prob` (..., k): of the classes that were listed, 0 where that is -1.
    Per class: `classes` (K,) the ids looked at, `prob_sum` (K,) the sum of their probabilities.
    """

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    valid: Tensor | None = None
    prob_sum: Tensor | None = None
    classes: Tensor | None = None
    column_log_prob: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What a loss needs of the logits beyond `log_prob` and `lse`."""

    entropy: bool = False
    argmax: bool = False
    column_sums: bool = False
    column_weight: Tensor | None = None  # (V,), None for ones
    prob_sums: bool = False
    classes: str | Tensor = "present"  # "present", "all", or class ids (K,)
    per_sample: bool = False  # sums within each sample, not over the whole batch
    rankings: frozenset[tuple[bool, float]] = frozenset()  # (per_sample, tolerance) of each
    peaks: bool = False  # also the largest probability of every class
    divergences: tuple[Divergence, ...] = ()  # of the call's teacher or target probabilities

    def __or__(self, other: Request) -> Request:
        """The least request that serves both; sums per sample and per column serve any other."""
        weights = [r.column_weight for r in (self, other) if r.column_sums]
        if len(weights) == 2 and not same_weight(*weights):
            raise ValueError(
                "label_smoothing in two parts of a combined loss takes the same class weight in "
                "both (a teacher's uniform rest takes none); give one part all of the smoothing"
            )
        all_classes = "all" in (self.classes, other.classes)
        return Request(
            entropy=self.entropy or other.entropy,
            argmax=self.argmax or other.argmax,
            column_sums=self.column_sums or other.column_sums,
            column_weight=weights[0] if weights else None,
            prob_sums=self.prob_sums or other.prob_sums,
            classes="all" if all_classes else self.classes,
            per_sample=self.per_sample or other.per_sample,
            rankings=self.rankings | other.rankings,
            peaks=self.peaks or other.peaks,
            divergences=tuple(dict.fromkeys(self.divergences + other.divergences)),
        )


def same_weight(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@dataclass
class TokenStats:
    """What a token loss's formula reads: per-row numbers (N,), differentiable."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    logit_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    num_finite: Tensor | None = None
    target: Tensor | None = None  # class ids, 0 where ignored (whose value is not read)
    listed: Tensor | None = None  # (N, k) log-probabilities of all listed classes
    divergences: Tensor | None = None  # (N, S) in the request's order
    # what losses read of the two
    columns: Tensor | None = None  # (N, k) class ids that the call lists, -1 to skip
    column_log_prob: Tensor | None = None  # (N, k) their log-probabilities, 0 where skipped
    top: Top | None = None  # the teacher's likeliest classes
    top_log_prob: Tensor | None = None  # (N, k) the student's of these
    divergence: dict[Divergence, Tensor] | None = None  # (N,) each

    def named(self, beside: Beside, divergences: tuple[Divergence, ...]) -> None:
        """Give losses what they read of `listed` and `divergences` by its name."""
        if self.divergences is not None:
            self.divergence = dict(zip(divergences, self.divergences.unbind(1), strict=True))
        if self.listed is None:
            return
        width = 0
        if beside.columns is not None:
            width = beside.columns.shape[1]
            self.columns, self.column_log_prob = beside.columns, self.listed[:, :width]
        self.top, self.top_log_prob = beside.top, self.listed[:, width:]


@dataclass
class Sweep(TokenStats):
    """Every statistic of one pass over the logits, as losses read them."""

    classes: Tensor | None = None  # (K,) ids of the columns of prob_sum; None for all V
    sample: Tensor | None = None  # (N,) row of prob_sum a token belongs to, -1 where ignored
    num_samples: int = 1
    prob_sum: Tensor | None = None  # (B, K), of token-weighted probabilities
    present: Tensor | None = None  # (K',) sorted ids of the classes that occur as target
    own: Tensor | None = None  # (N,) index of the target into `present`
    candidate_row: Tensor | None = None  # (M,)
    candidate_class: Tensor | None = None  # (M,) into `present`
    candidate_prob: Tensor | None = None  # (M,)
    peak_prob: Tensor | None = None  # (B, V)
    finite: Tensor | None = None  # (V,) columns with any finite logit


@dataclass(frozen=True)
class RowSum:
    """`sum(factor * (token weight * value(stats, target, valid)).sum())`, a value of single rows.

    Every factor is known before the logits are, so that a source that makes its logits a chunk at a
    time may form the gradients while they are there.
    """

    terms: list[tuple[Tensor, Callable]]  # (factor (), value: TokenStats, (N,), (N,) -> (N,))
    request: Request
    denominator: Tensor  # of the first term, ()
    plain: bool = True  # whether a value reads more than divergences
