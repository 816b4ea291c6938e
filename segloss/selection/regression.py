"""Penalised logistic regression: fine-tuning on a subset, in projected gradients.

R rows, D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# scikit-learn's C in the published code
PUBLISHED_C = 1e-4


def fit_logistic(
    gradient: Tensor,  # (R, D)
    offset: Tensor,  # (R,)
    weight: Tensor,  # (R,), sum 1
    penalty: float,
    *,
    start: Tensor | None = None,  # (D,)
    steps: int = 100,
) -> Tensor:
    """`argmin_w sum_i weight_i ln(1 + exp(-(offset_i + g_i.w))) + penalty ||w||^2` by Newton."""
    w = torch.zeros_like(gradient[0]) if start is None else start.clone()
    identity = torch.eye(w.numel(), dtype=w.dtype, device=w.device)

    def value(w: Tensor) -> float:
        losses = F.softplus(-(offset + gradient @ w))
        return float(weight @ losses + penalty * w.square().sum())

    current = value(w)
    for _ in range(steps):
        wrong = torch.sigmoid(-(offset + gradient @ w))  # the probability of the other side
        slope = 2 * penalty * w - gradient.T @ (weight * wrong)
        curvature = (weight * wrong * (1 - wrong))[:, None] * gradient
        hessian = gradient.T @ curvature + 2 * penalty * identity
        # without a penalty, directions that no row has are left alone
        hessian.diagonal().add_(1e-12 * hessian.diagonal().mean())
        step = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(hessian))[:, 0]
        decrease = float(slope @ step)
        if decrease <= 1e-12 * (1 + abs(current)):
            break
        size = 1.0
        while (new := value(w - size * step)) > current - 1e-4 * size * decrease:
            size /= 2
            if size < 1e-8:
                return w
        w, current = w - size * step, new
    return w


def fit_published(
    gradient: Tensor,  # (R, D)
    weight: Tensor,  # (R,), sum 1
    penalty: float | None,
    seed: int,
) -> Tensor:
    """The published objective: margins left out, labels drawn with 0.7, and an intercept."""
    count = len(weight)
    penalty = 1 / (2 * PUBLISHED_C * count) if penalty is None else penalty
    labels = np.random.default_rng(seed).random(count) < 0.7
    side = torch.from_numpy(np.where(labels, 1.0, -1.0))
    with_intercept = torch.cat([gradient, side[:, None]], 1)
    return fit_logistic(with_intercept, torch.zeros_like(weight), weight, penalty)[:-1]
