"""Token losses: formulas on the statistics of one row at a time.

N tokens, V classes; `p` is the target's probability, `nll = -log_prob`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from segloss.checks import check_number
from segloss.distributed import sum_over
from segloss.losses.base import Loss, power, ratio
from segloss.sweep.batch import Batch
from segloss.sweep.beside import Beside, Divergence
from segloss.sweep.classes import class_index
from segloss.sweep.request import Request, RowSum, Sweep, TokenStats

__all__ = [
    "CrossEntropyLoss",
    "DFTLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "PolyLoss",
    "SelfAdjustingDiceLoss",
    "TokenLoss",
]


class TokenLoss(Loss):
    """A loss that is a sum over tokens of a function of the token's own row.

    A subclass gives `formula(stats) -> (N,)`, with `stats.log_prob`, `stats.lse` and `stats.target`
    (class ids, 0 where ignored), and what its `request()` asks for.
    Reductions, with token weights t and class weights w: mean
    `sum_i t_i w_yi l_i / sum_i t_i w_yi`, sum `sum_i t_i w_yi l_i`, none `t_i w_yi l_i`.
    """

    is_token_loss = True

    def formula(self, stats: TokenStats) -> Tensor:
        """Value of each token (N,), before any weight."""
        raise TypeError(f"{type(self).__name__} does not define formula(stats)")

    def class_weights(self, target: Tensor, valid: Tensor) -> Tensor | None:
        """w_yi (N,), None for ones."""
        if self.weight is None:
            return None
        return self.weight[class_index(target, valid, self.weight.shape[0])]

    def token_values(self, stats: TokenStats, target: Tensor, valid: Tensor) -> Tensor:
        """Value of each token (N,) with its class weight; read only where valid."""
        value = self.formula(stats)
        weight = self.class_weights(target, valid)
        return value if weight is None else value * weight.to(value.dtype)

    def denominator(self, batch: Batch, normalizer: Tensor | None) -> Tensor:
        """What the sum over tokens is divided by."""
        if self.reduction == "sum":
            return torch.ones((), dtype=batch.dtype, device=batch.target.device)
        if normalizer is not None:
            return normalizer
        counted = batch.weights()
        weight = self.class_weights(batch.target, batch.valid)
        if weight is not None:
            counted = counted * weight.to(batch.dtype)
        return sum_over(counted.sum(), batch.group)

    def row_sum(self, batch: Batch, normalizer: Tensor | None, request: Request) -> RowSum:
        denominator = self.denominator(batch, normalizer)
        denominator = torch.where(denominator == 0, 1, denominator)
        plain = self.reads_plain(batch.beside)
        return RowSum([(1 / denominator, self.token_values)], request, denominator, plain)

    def value(self, sweep: Sweep, batch: Batch, normalizer: Tensor | None) -> Tensor:
        value = self.token_values(sweep, batch.target, batch.valid)
        # by selection, not by multiplication: an ignored row may hold anything
        value = torch.where(batch.valid, value, 0)
        if batch.token_weight is not None:
            value = value * batch.token_weight
        if self.reduction == "none":
            return value.view(batch.shape)
        total = sum_over(value.sum(), batch.group)
        return ratio(total, self.denominator(batch, normalizer))


class CrossEntropyLoss(TokenLoss, function="cross_entropy", short="ce"):
    """Cross-entropy with label smoothing and z-loss.

        torch.nn.functional.cross_entropy(logits.float(), target, weight, label_smoothing=e)
            + z_loss * (torch.logsumexp(logits.float(), -1) ** 2).mean()

    The target may also hold probabilities (..., V), as PyTorch's may: then nothing is ignored, the
    mean divides by the number of tokens.

    Args:
        weight: (V,) class weights or None. As in PyTorch the smoothing term weighs every column by
            its own weight, and the mean divides by the targets' weights.
        label_smoothing: e in [0, 1], spread over the columns with a finite logit.
        z_loss: factor of lse^2 (PaLM, arXiv 2204.02311, section 5).

    Errors: ValueError or TypeError naming the argument.
    """

    takes_probabilities = True

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
        self.z_loss = check_number("z_loss", z_loss)

    def request(self) -> Request:
        if self.label_smoothing == 0:
            return Request()
        return Request(column_sums=True, column_weight=self.weight)

    def request_for(self, beside: Beside) -> Request:
        request = self.request()
        if beside.probabilities is None:
            return request
        return replace(request, divergences=(self.of_probabilities(),))

    def of_probabilities(self) -> Divergence:
        """`-sum_j w_j y_j log p_j`, of a target that holds probabilities y."""
        return Divergence("targets", weight=self.weight)

    def denominator(self, batch: Batch, normalizer: Tensor | None) -> Tensor:
        if batch.beside.probabilities is None or self.reduction == "sum" or normalizer is not None:
            return super().denominator(batch, normalizer)
        return sum_over(batch.weights().sum(), batch.group)

    def formula(self, stats: TokenStats) -> Tensor:
        soft = (stats.divergence or {}).get(self.of_probabilities())
        value = -stats.log_prob if soft is None else soft
        if self.label_smoothing:
            value = (1 - self.label_smoothing) * value
        if self.z_loss:
            value = value + self.z_loss * stats.lse.square()
        return value

    def token_values(self, stats: TokenStats, target: Tensor, valid: Tensor) -> Tensor:
        if self.of_probabilities() in (stats.divergence or {}):
            value = self.formula(stats)  # the class weights are in it
        else:
            value = super().token_values(stats, target, valid)
        if self.label_smoothing:
            share = self.label_smoothing / stats.num_finite
            value = value + share * (stats.lse * stats.weight_sum - stats.logit_sum)
        return value


class FocalLoss(TokenLoss, function="focal_loss", short="focal"):
    """Focal loss: tokens that are already likely count less.

        p = torch.softmax(logits.float(), -1).gather(-1, target[..., None])[..., 0]
        (-(1 - p) ** gamma * p.log()).mean()

    gamma = 0 is cross-entropy. For gamma < 1 the slope stays finite as p -> 1, where the plain
    formula gives NaN. Source: Lin et al., arXiv 1708.02002, eq. 4.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        self.gamma = check_number("gamma", gamma)

    def formula(self, stats: TokenStats) -> Tensor:
        return _Focal.apply(stats.log_prob, self.gamma)


class _Focal(torch.autograd.Function):
    """(1-p)^gamma nll with the slope written so that it is bounded: autograd meets inf * 0."""

    @staticmethod
    def forward(ctx, log_prob: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(log_prob)
        ctx.gamma = gamma
        return (-torch.expm1(log_prob)) ** gamma * -log_prob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (log_prob,) = ctx.saved_tensors
        miss = -torch.expm1(log_prob)
        # nll / (1 - p) -> 1 as p -> 1
        steepness = torch.where(miss == 0, 1, -log_prob / torch.where(miss == 0, 1, miss))
        # p * nll -> 0 as p -> 0, where nll may be inf
        slope = 1 + ctx.gamma * torch.where(miss == 1, 0, log_prob.exp() * steepness)
        return -grad * miss**ctx.gamma * slope, None


class PolyLoss(TokenLoss, function="poly_loss", short="poly"):
    """Poly-1: cross-entropy with its first polynomial coefficient raised by epsilon.

        (-p.log() + epsilon * (1 - p)).mean()

    Source: Leng et al., arXiv 2204.12511, eq. 6.
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        self.epsilon = check_number("epsilon", epsilon, low=-1.0)

    def formula(self, stats: TokenStats) -> Tensor:
        return -stats.log_prob - self.epsilon * torch.expm1(stats.log_prob)


class GeneralizedCrossEntropyLoss(TokenLoss, function="generalized_cross_entropy", short="gce"):
    """Generalised cross-entropy, between cross-entropy (q -> 0) and 1 - p (q = 1).

        ((1 - p**q) / q).mean()

    Robust against wrong labels, slow where p is small. Source: Zhang and Sabuncu, arXiv 1805.07836,
    eq. 6.
    """

    def __init__(
        self,
        q: float = 0.7,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        self.q = check_number("q", q, 0, 1)

    def formula(self, stats: TokenStats) -> Tensor:
        if self.q == 0:
            return -stats.log_prob
        return -torch.expm1(self.q * stats.log_prob) / self.q


class DFTLoss(TokenLoss, function="dft_loss", short="dft"):
    """Dynamic fine-tuning: the gradient of cross-entropy scaled by the target's probability.

        (p.detach() * -p.log()).mean()

    Source: Wu et al., arXiv 2508.05629, eq. 9.
    """

    def formula(self, stats: TokenStats) -> Tensor:
        log_prob = stats.log_prob
        p = log_prob.detach().exp()
        # p log p = 0 at p = 0
        return -p * log_prob.clamp(min=torch.finfo(log_prob.dtype).min)


class SelfAdjustingDiceLoss(TokenLoss, function="self_adjusting_dice_loss", short="sadl"):
    """Self-adjusting Dice loss of single tokens.

        q = (1 - p) ** alpha * p
        (1 - (2 * q + gamma) / (q + 1 + gamma)).mean()

    Its least value lies at p = 1 / (1 + alpha), not at 1: at alpha = 1, the value of its paper's
    formula, a token is pushed to p = 0.5. Keep alpha small or mix it with cross-entropy;
    `detach=True` stops the gradient of (1 - p)^alpha, so that p always rises.
    Source: Li et al., arXiv 1911.02855, eq. 11.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        gamma: float = 1.0,
        detach: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        self.alpha = check_number("alpha", alpha)
        self.gamma = check_number("gamma", gamma)
        self.detach = bool(detach)

    def formula(self, stats: TokenStats) -> Tensor:
        damping = power(-torch.expm1(stats.log_prob), self.alpha)
        q = (damping.detach() if self.detach else damping) * stats.log_prob.exp()
        return 1 - (2 * q + self.gamma) / (q + 1 + self.gamma)
