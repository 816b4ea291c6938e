"""Region losses: formulas on sums per class.

`TP_c` probability mass of class c on its own tokens, `P_c` on all tokens, `n_c` its tokens' weight;
`FP = P - TP`, `FN = n - TP`. B samples, K classes, V the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from segloss.checks import check_choice, check_number
from segloss.distributed import sum_over
from segloss.losses.base import Loss, power, ratio
from segloss.sweep.batch import Batch
from segloss.sweep.classes import group_sum
from segloss.sweep.request import Request, Sweep

__all__ = [
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "RegionLoss",
    "TverskyLoss",
]


class ClassSums(NamedTuple):
    """All (B, K), B = 1 unless per sample."""

    tp: Tensor
    p: Tensor
    n: Tensor
    counted: Tensor  # bool: the classes the loss ranges over
    weight: Tensor  # class weights, 0 where not counted


def reduce_samples(value: Tensor, occupied: Tensor, reduction: str) -> Tensor:
    """Reduction over samples (B,), those without a valid token left out of the mean."""
    value = torch.where(occupied, value, 0)
    if reduction == "none":
        return value
    total = value.sum()
    return total if reduction == "sum" else ratio(total, occupied.sum().to(value.dtype))


def region_scale(value: Tensor, batch: Batch, normalizer: Tensor | None) -> Tensor:
    """The share of the normaliser this batch's tokens make up."""
    if normalizer is None:
        return value
    weight = sum_over(batch.weights().sum(), batch.group)
    return value * ratio(weight, normalizer)


class ClassLoss(Loss):
    """What region and ranking losses share: class choice, samples, reductions."""

    def __init__(
        self,
        classes: str = "present",
        per_sample: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        check_choice("classes", classes, ("present", "all"))
        if not isinstance(per_sample, bool):
            raise TypeError(f"per_sample is {per_sample!r}; it takes True or False")
        self.classes = classes
        self.per_sample = per_sample

    def class_weight(self, ids: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of each class (B, K), 0 where it is not counted."""
        if self.weight is None:
            return counted.to(dtype)
        weight = self.weight.to(dtype)
        return torch.where(counted, weight if ids is None else weight[ids], 0)

    def reduce_classes(
        self,
        value: Tensor,  # (B, K)
        weight: Tensor,  # (B, K)
        occupied: Tensor,  # (B,)
        batch: Batch,
        normalizer: Tensor | None,
    ) -> Tensor:
        """Per sample the weighted mean over classes, then samples; else the classes themselves."""
        weighted = torch.where(weight != 0, value, 0) * weight
        if self.per_sample:
            mean = ratio(weighted.sum(-1), weight.sum(-1))
            return region_scale(reduce_samples(mean, occupied, self.reduction), batch, normalizer)
        if self.reduction == "none":
            return weighted[0]
        total = weighted.sum()
        if self.reduction == "mean":
            total = ratio(total, weight.sum())
        return region_scale(total, batch, normalizer)


class RegionLoss(ClassLoss):
    """A function of the class sums; a subclass gives `formula(tp, p, n)`, element-wise.

    Args of every region loss:
        smooth: added to numerator and denominator, keeps an empty class finite.
        classes: "present" (classes that occur as a target, per sample with `per_sample`) or "all"
            (every column with a finite logit).
        average: "macro" (weighted mean of the classes' values) or "micro" (one value from sums over
            the classes).
        per_sample: sums within each sample, then the mean over samples; needs `sample_ids` or
            logits of shape (B, T, V).
        weight: (V,) class weights or None.
        reduction: over samples if `per_sample`, else over classes.

    The value of a batch is not the mean of the values of its parts.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        classes: str = "present",
        average: str = "macro",
        per_sample: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(classes, per_sample, weight, ignore_index, reduction, group)
        check_choice("average", average, ("macro", "micro"))
        self.smooth = check_number("smooth", smooth)
        self.average = average

    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define formula(tp, p, n)")

    def request(self) -> Request:
        return Request(
            prob_sums=True,
            classes=self.classes,
            per_sample=self.per_sample,
            peaks=self.classes == "all",
        )

    def class_sums(self, sweep: Sweep, batch: Batch) -> tuple[ClassSums, Tensor]:
        """The sums of this loss's classes and samples, from those of the finest request."""
        log_prob, num_samples = sweep.log_prob, sweep.num_samples
        weights = batch.weights()
        ids = sweep.classes
        num_classes = batch.num_classes if ids is None else ids.numel()
        own = torch.where(batch.valid, batch.target, 0) if ids is None else sweep.own
        own = own.clamp(0, max(0, num_classes - 1))
        cell = sweep.sample.clamp(min=0) * num_classes + own
        p_own = torch.where(batch.valid, log_prob.exp(), 0) * weights
        shape = (num_samples, num_classes)
        tp = sum_over(group_sum(p_own, cell, num_samples * num_classes), batch.group).view(shape)
        n = sum_over(group_sum(weights, cell, num_samples * num_classes), batch.group).view(shape)
        p = sum_over(sweep.prob_sum, batch.group)
        if not self.per_sample:
            tp, p, n = tp.sum(0, keepdim=True), p.sum(0, keepdim=True), n.sum(0, keepdim=True)
        occupied = n.sum(-1) > 0
        if self.classes == "all":
            counted = sweep.finite.expand(n.shape) & occupied[:, None]
        else:
            counted = n > 0
            if ids is None and not self.per_sample:
                # a wider sweep served another part of a combined loss: keep our own classes
                tp, p, n, counted = (x[:, sweep.present] for x in (tp, p, n, counted))
                ids = sweep.present
        return ClassSums(tp, p, n, counted, self.class_weight(ids, counted, tp.dtype)), occupied

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        sums, occupied = self.class_sums(sweep, batch)
        if self.average == "macro":
            value = self.formula(sums.tp, sums.p, sums.n)
            return self.reduce_classes(value, sums.weight, occupied, batch, normalizer)
        tp, p, n = ((x * sums.weight).sum(-1) for x in (sums.tp, sums.p, sums.n))
        return self.reduce_micro(self.formula(tp, p, n), occupied, batch, normalizer)

    def reduce_micro(self, value, occupied, batch: Batch, normalizer) -> Tensor:
        """One value per sample (B,), B = 1 unless per sample."""
        return region_scale(reduce_samples(value, occupied, self.reduction), batch, normalizer)


class DiceLoss(RegionLoss, function="dice_loss", short="dice"):
    """Soft Dice over classes of the vocabulary.

        p = torch.softmax(logits.float(), -1).flatten(0, -2)
        y = torch.nn.functional.one_hot(target.flatten(), V)
        dice = 1 - (2 * (p * y).sum(0) + smooth) / (p.sum(0) + y.sum(0) + smooth)
        dice[target.unique()].mean()

    Source: Milletari et al., arXiv 1606.04797, section 3, without the squares.
    """

    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return 1 - (2 * tp + self.smooth) / (p + n + self.smooth)


class JaccardLoss(RegionLoss, function="jaccard_loss", short="jaccard"):
    """Soft Jaccard (intersection over union): `1 - (TP + smooth) / (P + n - TP + smooth)`."""

    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return 1 - (tp + self.smooth) / (p + n - tp + self.smooth)


class TverskyLoss(RegionLoss, function="tversky_loss", short="tversky"):
    """Tversky loss: `1 - (TP + s) / (TP + alpha FP + beta FN + s)`.

    alpha weighs false positives, beta false negatives; alpha = beta = 0.5 is Dice, both 1 Jaccard.
    Source: Salehi et al., arXiv 1706.05721, eq. 3.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1e-5, **options):
        super().__init__(smooth, **options)
        self.alpha = check_number("alpha", alpha)
        self.beta = check_number("beta", beta)

    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        weighed = tp + self.alpha * (p - tp) + self.beta * (n - tp)
        return 1 - (tp + self.smooth) / (weighed + self.smooth)


class FocalTverskyLoss(TverskyLoss, function="focal_tversky_loss", short="focal_tversky"):
    """Focal Tversky: each class's Tversky loss to the power gamma, then the mean.

    gamma below 1 as in the paper's 3/4 raises classes that are nearly right; the slope at 0 is
    taken as 0. Source: Abraham and Khan, arXiv 1810.07842, eq. 4.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, **options):
        super().__init__(alpha, beta, **options)
        self.gamma = check_number("gamma", gamma)

    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return power(super().formula(tp, p, n), self.gamma)


class GeneralizedDiceLoss(RegionLoss, function="generalized_dice_loss", short="gdice"):
    """Generalised Dice: one ratio over all classes, each weighed by 1 / n_c^2.

        w = torch.where(n > 0, weight / n**2, 0)
        1 - (2 * (w * TP).sum() + smooth) / ((w * (P + n)).sum() + smooth)

    Absent classes weigh 0; the weight of 1e20 in the code of arXiv 2409.13641 makes the gradient
    vanish (`segloss.reference.generalized_dice_loss(published=True)`).
    Source: Sudre et al., arXiv 1707.03237, eq. 3.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        classes: str = "present",
        per_sample: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(
            smooth, classes, "macro", per_sample, weight, ignore_index, reduction, group
        )

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        sums, occupied = self.class_sums(sweep, batch)
        w = torch.where(sums.n > 0, sums.weight / torch.where(sums.n > 0, sums.n, 1).square(), 0)
        overlap = 2 * (w * sums.tp).sum(-1) + self.smooth
        value = 1 - overlap / ((w * (sums.p + sums.n)).sum(-1) + self.smooth)
        return self.reduce_micro(value, occupied, batch, normalizer)
