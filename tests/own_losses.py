"""Losses as a user writes them, outside the package, and the same in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import segloss
from segloss import functional, reference


class RobustLoss(segloss.TokenLoss):
    """`log(1 + strength * nll) / strength`; its option is no attribute of that name."""

    def __init__(self, strength: float = 0.5, **options):
        super().__init__(**options)
        self.factor = 1.0 * strength

    def formula(self, stats) -> Tensor:
        return torch.log1p(-self.factor * stats.log_prob) / self.factor


class OffsetLoss(segloss.TokenLoss):
    """`nll + offset[target]^2 p`, of a table that is a tensor option."""

    def __init__(self, offset: Tensor, **options):
        super().__init__(**options)
        self.register_buffer("offset", offset)

    def formula(self, stats) -> Tensor:
        return -stats.log_prob + self.offset[stats.target].square() * stats.log_prob.exp()


class MarginLoss(segloss.TokenLoss):
    """`sum_m max(0, 1 + log p_m - log p_target)` over the call's columns."""

    def formula(self, stats) -> Tensor:
        gap = torch.relu(1 + stats.column_log_prob - stats.log_prob[:, None])
        return torch.where(stats.columns >= 0, gap, 0).sum(-1)


class SquaredDiceLoss(segloss.RegionLoss):
    def formula(self, tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return (1 - (2 * tp + self.smooth) / (p + n + self.smooth)) ** 2


class LearntLoss(segloss.TokenLoss):
    """`exp(log_scale) * nll`, with a scale that is trained too."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def formula(self, stats) -> Tensor:
        return -self.log_scale.exp() * stats.log_prob


def robust_loss(logits, target, *, strength: float = 0.5, **options):
    value = reference._of_log_prob(lambda log_prob: torch.log1p(-strength * log_prob) / strength)
    return reference._token_loss(logits, target, value, **options)


def squared_dice_loss(logits, target, *, smooth: float = 1e-5, **options):
    def value(tp, p, n):
        return (1 - (2 * tp + smooth) / (p + n + smooth)) ** 2

    return reference._sums_loss(logits, target, value, **options)


# function: (class, ours as a function, plain PyTorch)
OWN = {
    "robust_loss": (RobustLoss, functional.functional("robust_loss", RobustLoss), robust_loss),
    "squared_dice_loss": (
        SquaredDiceLoss,
        functional.functional("squared_dice_loss", SquaredDiceLoss),
        squared_dice_loss,
    ),
}
