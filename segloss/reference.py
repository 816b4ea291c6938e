"""The naive full-matrix truth: every loss as its formula, in plain PyTorch with autograd.

Nothing here is fused, chunked or clever: each function builds the whole `(N, V)` matrix of
log-probabilities and reads like the paper. It computes in the dtype of its inputs, so float64
logits give the truth the fused losses are tested against, and bfloat16 logits give the error that a
plain PyTorch run in bfloat16 has. The memory is N x V several times over: use it to check, not to
train. It shares no code with the fused path.

Names and keywords are those of the functions in `segloss`. Every loss takes

    logits        (..., V), the class dimension last
    target        (...), int64 or int32; nothing is shifted
    weight        (V,) class weights: of the tokens in a token loss (as `F.cross_entropy`), of the
                  mean over classes in a region loss
    ignore_index  tokens with this target are removed before anything is computed
    reduction     "mean", "sum" or "none": over tokens; region losses over classes, or over samples
                  if `per_sample`
    token_weight  (...): a token of weight 2 is a token listed twice, of weight 0 one not listed
    sample_ids    (...), integers; the default is the leading index of logits with 3 or more dims
    normalizer    a number: replaces the denominator of a token mean; multiplies a region loss by
                  (sum of token weights / normalizer)
    return_statistics   return `(loss, Statistics)`

and region losses (Dice to Lovász) also `classes` ("present", "all") and `per_sample`, and those
made of sums also `average` ("macro", "micro"). A batch without a valid token gives 0, connected to
the graph.

`published=True` reproduces the code released with "Loss functions from computer vision for language
models" (arXiv:2409.13641) where it differs from its formulas; each docstring says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Statistics",
    "answer_slice",
    "cross_entropy",
    "dft_loss",
    "dice_loss",
    "distillation_loss",
    "focal_loss",
    "focal_tversky_loss",
    "generalized_cross_entropy",
    "generalized_dice_loss",
    "jaccard_loss",
    "linear_logits",
    "logit_statistics",
    "lovasz_softmax",
    "poly_loss",
    "self_adjusting_dice_loss",
    "transform",
    "tversky_loss",
]


# ---------------------------------------------------------------------------------- logits


def transform(logits: Tensor, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """`softcap * tanh(scale * logits / softcap)`, or `scale * logits` without a softcap.

    A logit of -inf stays -inf and gets no gradient.
    """
    masked = logits == -torch.inf
    z = scale * logits.masked_fill(masked, 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.masked_fill(masked, -torch.inf)


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """`transform(hidden @ weight.T + bias)`.

    hidden (..., D), weight (V, D), bias (V,) -> (..., V); `lora = (A, B, scaling)` with A (r, D)
    and B (V, r) adds `scaling * B @ A` to the weight.
    """
    logits = hidden @ weight.T
    if lora is not None:
        a, b, scaling = lora
        logits = logits + scaling * (hidden @ a.T) @ b.T
    if bias is not None:
        logits = logits + bias
    return transform(logits, softcap, scale)


# ------------------------------------------------------------------------------ statistics


@dataclass
class Statistics:
    """What the losses are made of; per-token fields have target's shape, 0 at ignored tokens."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None
    argmax: Tensor | None  # -1 at ignored tokens
    valid: Tensor
    prob_sum: Tensor | None
    classes: Tensor | None
    column_log_prob: Tensor | None = None  # (..., k)


def logit_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    argmax: bool = False,
    classes: str | Tensor | None = None,
    columns: Tensor | None = None,
) -> Statistics:
    """`log_softmax` gathered at the target, `logsumexp`, entropy, argmax and sums of `softmax`.

    `prob_sum[k]` sums the probability of class `classes[k]` over the valid tokens; `classes` is
    "present" (sorted classes of the batch), "all" (all V) or a vector of class ids. `columns`
    (..., k) are class ids of each token, -1 to skip: `column_log_prob` is 0 there.
    """
    rows = _valid_rows(logits, target, ignore_index=ignore_index)
    ids = _class_ids(rows, classes, logits.shape[-1])
    return Statistics(
        log_prob=rows.scatter(rows.log_prob),
        lse=rows.scatter(rows.lse),
        entropy=rows.scatter(rows.entropy) if entropy else None,
        argmax=rows.scatter(rows.logits.argmax(-1), fill=-1) if argmax else None,
        valid=rows.valid,
        prob_sum=None if ids is None else rows.log_probs.exp().sum(0)[ids],
        classes=ids,
        column_log_prob=None if columns is None else _column_log_prob(rows, columns),
    )


def _column_log_prob(rows: _Rows, columns: Tensor) -> Tensor:
    ids = columns[rows.valid].long()
    found = rows.log_probs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
    full = found.new_zeros(columns.shape)
    return full.masked_scatter(rows.valid[..., None].expand(columns.shape), found)


def _class_ids(rows: _Rows, classes: str | Tensor | None, num_classes: int) -> Tensor | None:
    if classes is None or isinstance(classes, Tensor):
        return classes
    return {"present": rows.target.unique(), "all": torch.arange(num_classes)}[classes].to(
        rows.target.device
    )


@dataclass
class _Rows:
    """The valid tokens: every ignored row is gone before anything is computed."""

    logits: Tensor  # (n, V)
    target: Tensor  # (n,)
    weight: Tensor  # (n,)
    sample: Tensor | None  # (n,)
    valid: Tensor  # target's shape, bool

    @property
    def log_probs(self) -> Tensor:
        return self.logits.log_softmax(-1)

    @property
    def log_prob(self) -> Tensor:
        return self.log_probs.gather(-1, self.target[:, None]).squeeze(-1)

    @property
    def lse(self) -> Tensor:
        return self.logits.logsumexp(-1)

    @property
    def entropy(self) -> Tensor:
        log_p = self.log_probs
        p = log_p.exp()
        # p log p = 0 at p = 0, and so is its gradient through a column of -inf
        return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)

    def scatter(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the valid tokens in target's shape."""
        full = values.new_full(self.valid.shape, fill)
        return full.masked_scatter(self.valid, values)


def _valid_rows(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    token_weight: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> _Rows:
    valid = target != ignore_index
    if token_weight is None:
        token_weight = torch.ones(target.shape, device=logits.device)
    valid = valid & (token_weight != 0)
    return _Rows(
        logits=logits[valid],
        target=target[valid].long(),
        weight=token_weight.detach()[valid].to(logits.dtype),
        sample=None if sample_ids is None else sample_ids[valid],
        valid=valid,
    )


def _detached_statistics(logits: Tensor, rows: _Rows) -> Statistics:
    target = rows.scatter(rows.target, fill=-100)
    return logit_statistics(logits.detach(), target, entropy=True, argmax=True)


def _power(base: Tensor, exponent: float) -> Tensor:
    """`base ** exponent`, with slope 0 where base is 0 and the exponent below 1."""
    base = base.clamp(min=0)  # rounding can leave -1e-17, whose fractional power is NaN
    if exponent >= 1:
        return base**exponent
    zero = base == 0
    return torch.where(zero, 0.0**exponent, base.masked_fill(zero, 1) ** exponent)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, 0 and connected to the graph if there is nothing to average."""
    return numerator if denominator == 0 else numerator / denominator


# ---------------------------------------------------------------------------- token losses


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> Any:
    """`F.cross_entropy(logits, target, weight, label_smoothing=...)`, plus `z_loss * lse ** 2`.

    With smoothing e and class weights w, over the n columns whose logit is finite:
    `(1-e) w_y nll + e/n sum_j w_j (lse - z_j) + w_y z_loss lse^2`.

    A target of probabilities y (..., V): `(1-e) sum_j w_j y_j (lse - z_j)` in place of the first
    term, `z_loss lse^2` of the last, and a mean over tokens.
    """
    if target.is_floating_point():
        return _soft_cross_entropy(logits, target, label_smoothing, z_loss, **options)

    def value(rows: _Rows, class_weight: Tensor) -> Tensor:
        finite = rows.logits.isfinite()
        distance = rows.lse[:, None] - rows.logits.masked_fill(~finite, 0)
        uniform = (class_weight * distance * finite).sum(-1) / finite.sum(-1)
        own = class_weight[rows.target]
        value = (1 - label_smoothing) * own * -rows.log_prob + own * z_loss * rows.lse**2
        return value + label_smoothing * uniform if label_smoothing else value

    return _token_loss(logits, target, value, **options)


def _soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    *,
    weight: Tensor | None = None,
    **options: Any,
) -> Any:
    class_weight = _class_weight(weight, logits)

    def value(rows: _Rows, _: Tensor) -> Tensor:
        y = target.detach()[rows.valid].to(logits)
        finite = rows.logits.isfinite().to(logits)
        share = (1 - label_smoothing) * y + label_smoothing * finite / finite.sum(-1, keepdim=True)
        terms = torch.where(share == 0, 0, class_weight * share * -rows.log_probs)
        return terms.sum(-1) + z_loss * rows.lse**2

    every = torch.zeros(target.shape[:-1], dtype=torch.int64, device=target.device)
    return _token_loss(logits, every, value, **options)


def distillation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    teacher: Any,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    **options: Any,
) -> Any:
    """KL(q || p), KL(p || q) or `beta KL(q || m) + (1 - beta) KL(p || m)`, m the mixture of both.

    p = softmax(logits / temperature) and q of the teacher, a tensor of logits, over the classes
    that both have. A teacher with `ids`, `log_prob` (..., k) and `rest` stands for the q that is
    written out here: its rest shared among the listed classes, spread over the others, or left out
    of the sums.
    """
    teacher = teacher if isinstance(teacher, Tensor) else _written_out(teacher, logits)
    width = min(logits.shape[-1], teacher.shape[-1])
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse" if beta else "forward"

    def kl(log_a: Tensor, log_b: Tensor, counted: Tensor) -> Tensor:
        # 0 log 0 is 0, and so is its gradient
        some = counted & (log_a.exp() > 0)
        ratio = torch.where(some, log_a - log_b, 0)
        return (torch.where(some, log_a, -torch.inf).exp() * ratio).sum(-1)

    def value(rows: _Rows, class_weight: Tensor) -> Tensor:
        log_p = (rows.logits[:, :width] / temperature).log_softmax(-1)
        z = teacher.detach()[rows.valid][:, :width].to(logits)
        counted = ~z.isnan()
        log_q = z.masked_fill(~counted, -torch.inf) / temperature
        if bool(counted.all()):
            log_q = log_q.log_softmax(-1)
        if divergence == "forward":
            found = kl(log_q, log_p, counted)
        elif divergence == "reverse":
            found = kl(log_p, log_q, counted)
        else:
            shares = np.log([beta, 1 - beta])
            dead = (log_q == -torch.inf) & (log_p == -torch.inf)
            of_q, of_p = (torch.where(dead, 0, x) for x in (log_q, log_p))
            log_m = torch.logaddexp(of_q + shares[0], of_p + shares[1])
            found = beta * kl(log_q, log_m, counted) + (1 - beta) * kl(log_p, log_m, counted)
        factor = temperature**2 if temperature_squared else 1.0
        return class_weight[rows.target] * factor * found

    return _token_loss(logits, target, value, **options)


def _written_out(teacher: Any, logits: Tensor) -> Tensor:
    """Log-probabilities (..., V) of a stored teacher; NaN where "ignore" leaves a class out."""
    ids, log_prob = teacher.ids.long(), teacher.log_prob.to(logits)
    listed = ids >= 0
    known = log_prob.masked_fill(~listed, -torch.inf).exp().sum(-1, keepdim=True)
    left = (1 - known).clamp(min=0) / (logits.isfinite().sum(-1) - listed.sum(-1))[..., None]
    fill = {"renormalise": torch.full_like(left, -torch.inf), "uniform": left.log()}
    fill = fill.get(teacher.rest, torch.full_like(left, torch.nan))
    wide = fill.expand(*logits.shape[:-1], logits.shape[-1] + 1).clone()
    wide.scatter_(-1, torch.where(listed, ids, logits.shape[-1]), log_prob)
    return wide[..., :-1].masked_fill(~logits.isfinite() & ~wide[..., :-1].isnan(), -torch.inf)


def focal_loss(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, published: bool = False, **options: Any
) -> Any:
    """`-(1 - p)^gamma log p`, p the target's probability (Lin et al., arXiv:1708.02002, eq. 4).

    `published=True`: an ignored token is not ignored. Its logits become zeros and its label class
    0, and it is averaged in: `(n_valid * loss + n_ignored * (1 - 1/V)^gamma log V) / n_all`.
    """
    if published:
        logits, target = _published_masking(logits, target, **options)

    def value(log_prob: Tensor) -> Tensor:
        return _power(-torch.expm1(log_prob), gamma) * -log_prob

    return _token_loss(logits, target, _of_log_prob(value), **options)


def poly_loss(logits: Tensor, target: Tensor, *, epsilon: float = 1.0, **options: Any) -> Any:
    """Poly-1: `-log p + epsilon (1 - p)` (Leng et al., arXiv:2204.12511)."""

    def value(log_prob: Tensor) -> Tensor:
        return -log_prob + epsilon * -torch.expm1(log_prob)

    return _token_loss(logits, target, _of_log_prob(value), **options)


def generalized_cross_entropy(
    logits: Tensor, target: Tensor, *, q: float = 0.7, **options: Any
) -> Any:
    """`(1 - p^q) / q`: q -> 0 is CE, q = 1 is 1 - p (Zhang and Sabuncu, arXiv:1805.07836)."""

    def value(log_prob: Tensor) -> Tensor:
        return -torch.expm1(q * log_prob) / q

    return _token_loss(logits, target, _of_log_prob(value), **options)


def dft_loss(logits: Tensor, target: Tensor, **options: Any) -> Any:
    """Dynamic fine-tuning: `-stopgrad(p) log p` (arXiv:2508.05629)."""

    def value(log_prob: Tensor) -> Tensor:
        p = log_prob.detach().exp()
        return p * -log_prob.masked_fill(p == 0, 0)  # p log p = 0 at p = 0

    return _token_loss(logits, target, _of_log_prob(value), **options)


def self_adjusting_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    detach: bool = False,
    published: bool = False,
    **options: Any,
) -> Any:
    """`1 - (2q + gamma) / (q + 1 + gamma)` with `q = (1-p)^alpha p` (Li et al., arXiv:1911.02855).

    Its minimum is at p = 1 / (1 + alpha), so at the authors' alpha = 1 it pulls p to 0.5;
    `detach=True` stops the gradient of `(1-p)^alpha`, and then it pulls p to 1.

    `published=True`: ignored tokens get logits 0 and label 0 and are averaged in, as in
    `focal_loss`. That code's alpha is 1.
    """
    if published:
        logits, target = _published_masking(logits, target, **options)

    def value(log_prob: Tensor) -> Tensor:
        difficulty = _power(-torch.expm1(log_prob), alpha)
        q = (difficulty.detach() if detach else difficulty) * log_prob.exp()
        return 1 - (2 * q + gamma) / (q + 1 + gamma)

    return _token_loss(logits, target, _of_log_prob(value), **options)


_TokenValue = Callable[[_Rows, Tensor], Tensor]


def _of_log_prob(value: Callable[[Tensor], Tensor]) -> _TokenValue:
    """A token loss that is a function of the target's log-probability, times its class weight."""
    return lambda rows, class_weight: class_weight[rows.target] * value(rows.log_prob)


def _token_loss(
    logits: Tensor,
    target: Tensor,
    value: _TokenValue,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    sample_ids: Tensor | None = None,
    normalizer: float | None = None,
    return_statistics: bool = False,
) -> Any:
    _check_reduction(reduction, normalizer)
    rows = _valid_rows(logits, target, ignore_index=ignore_index, token_weight=token_weight)
    class_weight = _class_weight(weight, logits)
    values = rows.weight * value(rows, class_weight)
    if reduction == "none":
        loss = rows.scatter(values)
    elif reduction == "sum":
        loss = values.sum()
    elif normalizer is not None:
        loss = values.sum() / normalizer
    else:
        loss = _ratio(values.sum(), (rows.weight * class_weight[rows.target]).sum())
    return (loss, _detached_statistics(logits, rows)) if return_statistics else loss


def _class_weight(weight: Tensor | None, logits: Tensor) -> Tensor:
    if weight is None:
        return logits.new_ones(logits.shape[-1])
    return weight.detach().to(logits)


def _check_reduction(reduction: str, normalizer: float | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, but takes "mean", "sum" or "none"')
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'normalizer needs reduction="mean", got reduction={reduction!r}')


# --------------------------------------------------------------------------- region losses
# TP = probability on the right class, P = all its probability, n = how often it is the target


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5, **options: Any) -> Any:
    """`1 - (2 TP + s) / (P + n + s)` per class (Milletari et al., arXiv:1606.04797, unsquared)."""

    def value(tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return 1 - (2 * tp + smooth) / (p + n + smooth)

    return _sums_loss(logits, target, value, **options)


def jaccard_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5, **options: Any) -> Any:
    """`1 - (TP + s) / (P + n - TP + s)` per class (Rahman and Wang, 2016)."""

    def value(tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return 1 - (tp + smooth) / (p + n - tp + smooth)

    return _sums_loss(logits, target, value, **options)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1e-5,
    **options: Any,
) -> Any:
    """`1 - (TP + s) / (TP + alpha FP + beta FN + s)` (Salehi et al., arXiv:1706.05721)."""
    return focal_tversky_loss(
        logits, target, alpha=alpha, beta=beta, gamma=1.0, smooth=smooth, **options
    )


def focal_tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    smooth: float = 1e-5,
    **options: Any,
) -> Any:
    """`Tversky_c ^ gamma` per class (Abraham and Khan, arXiv:1810.07842)."""

    def value(tp: Tensor, p: Tensor, n: Tensor) -> Tensor:
        fp, fn = p - tp, n - tp
        tversky = 1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)
        return tversky if gamma == 1 else _power(tversky, gamma)

    return _sums_loss(logits, target, value, **options)


def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1e-5,
    published: bool = False,
    **options: Any,
) -> Any:
    """`1 - (2 sum_c w_c TP_c + s) / (sum_c w_c (P_c + n_c) + s)`, `w_c = 1 / n_c^2`, 0 if absent.

    Sudre et al., arXiv:1707.03237, section 2. One number: reductions have nothing to average but
    the samples.

    `published=True` (takes `smooth` and `ignore_index` only): the mean over samples of
    `-2 (I + s) / (U + s)` with `w_c = 1 / (n_c + 1e-10)^2`, so an absent class weighs 1e20: the
    value is about -1e-20 and the gradient as small or exactly 0, whatever the model predicts. The
    range is [-1, 0] instead of [0, 1], and ignored tokens count as tokens of class 0 with logits 0.
    """
    if published:
        return _published_generalized_dice(logits, target, smooth, **options)

    def value(log_p: Tensor, y: Tensor, w: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
        tp, p, n = _sums(log_p, y, w)
        c = torch.where(n > 0, class_weight / n.where(n > 0, 1) ** 2, 0)
        overlap = (2 * (c * tp).sum() + smooth) / ((c * (p + n)).sum() + smooth)
        return _one_number(1 - overlap, log_p)

    return _set_loss(logits, target, value, one_number=True, **options)


def lovasz_softmax(
    logits: Tensor,
    target: Tensor,
    *,
    tolerance: float = 0.0,
    published: bool = False,
    **options: Any,
) -> Any:
    """Sort every class's errors and take the Lovász extension of the Jaccard loss.

    Berman et al., arXiv:1705.08790, algorithm 1: with errors `1 - p` (foreground) and `p`
    (background) in descending order and `J_k = 1 - (M - P_k) / (M + B_k)` after k of them, the
    value is `sum_k e_k (J_k - J_{k-1})`. P_k and B_k are the foreground and background weights so
    far, M the class's whole foreground weight; for an absent class the value is the largest p.
    `tolerance` is the fused version's; nothing is dropped here.

    `published=True`: ignored tokens get logits 0 and label 0 instead of being removed, so class 0
    joins the mean over classes with errors that no training can change.
    """
    if published:
        logits, target = _published_masking(logits, target, **options)

    def value(log_p: Tensor, y: Tensor, w: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
        errors = torch.where(y, -torch.expm1(log_p), log_p.exp())
        errors, order = errors.sort(dim=0, descending=True)
        foreground = (w * y).gather(0, order).cumsum(0)
        background = (w * ~y).gather(0, order).cumsum(0)
        total = (w * y).sum(0)
        jaccard = 1 - (total - foreground) / (total + background)
        steps = jaccard.diff(dim=0, prepend=torch.zeros_like(jaccard[:1]))
        return (errors * steps).sum(0), class_weight

    return _set_loss(logits, target, value, **options)


# values of a set of tokens: log-probabilities of the K classes (n, K), one-hot targets (n, K),
# token weights (n, 1), class weights (K,) -> values and their weights in the mean, (K,) or (1,)
_SetValue = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _sums(log_p: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = log_p.exp()
    return (w * p * y).sum(0), (w * p).sum(0), (w * y).sum(0)


def _one_number(value: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    if not len(log_p):  # without smoothing the value of nothing would be 0 / 0
        value = log_p.sum()
    return value[None], log_p.new_ones(1)


def _sums_loss(
    logits: Tensor,
    target: Tensor,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    average: str = "macro",
    **options: Any,
) -> Any:
    """A loss that is `value(TP, P, n)`: per class (macro), or of the sums over classes (micro)."""
    if average not in ("macro", "micro"):
        raise ValueError(f'average is {average!r}, but takes "macro" or "micro"')

    def macro(log_p: Tensor, y: Tensor, w: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
        return value(*_sums(log_p, y, w)), class_weight

    def micro(log_p: Tensor, y: Tensor, w: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
        tp, p, n = ((class_weight * s).sum() for s in _sums(log_p, y, w))
        return _one_number(value(tp, p, n), log_p)

    if average == "macro":
        return _set_loss(logits, target, macro, **options)
    return _set_loss(logits, target, micro, one_number=True, **options)


def _set_loss(
    logits: Tensor,
    target: Tensor,
    value: _SetValue,
    *,
    one_number: bool = False,
    classes: str = "present",
    per_sample: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    sample_ids: Tensor | None = None,
    normalizer: float | None = None,
    return_statistics: bool = False,
) -> Any:
    _check_reduction(reduction, normalizer)
    if classes not in ("present", "all"):
        raise ValueError(f'classes is {classes!r}, but takes "present" or "all"')
    ids = _sample_ids(logits, target, sample_ids) if per_sample else None
    rows = _valid_rows(
        logits, target, ignore_index=ignore_index, token_weight=token_weight, sample_ids=ids
    )
    class_weight = _class_weight(weight, logits)
    log_probs = rows.log_probs
    finite = rows.logits.isfinite().any(0).nonzero().squeeze(-1)

    def of_tokens(token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, weights and class ids of the set of tokens selected by the mask."""
        column = finite if classes == "all" else rows.target[token].unique()
        y = rows.target[token][:, None] == column
        values = value(
            log_probs[token][:, column], y, rows.weight[token][:, None], class_weight[column]
        )
        return *values, column

    if ids is None:
        values, weights, column = of_tokens(torch.ones_like(rows.target, dtype=torch.bool))
        loss = _reduce(weights * values, reduction, weights.sum())
        if reduction == "none" and classes == "all" and not one_number:
            loss = loss.new_zeros(logits.shape[-1]).index_put((column,), loss)
    else:
        loss = _over_samples(of_tokens, rows, _distinct_samples(logits, ids, sample_ids), reduction)
    if normalizer is not None:
        loss = loss * (rows.weight.sum() / normalizer)
    return (loss, _detached_statistics(logits, rows)) if return_statistics else loss


def _over_samples(
    of_tokens: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    rows: _Rows,
    samples: Tensor,
    reduction: str,
) -> Tensor:
    """Each sample's mean over its own classes, reduced over the samples that have a token."""
    nothing = rows.logits[:0].sum()
    means, count = [], 0
    for sample in samples:
        token = rows.sample == sample
        if token.any():
            values, weights, _ = of_tokens(token)
            means.append(_ratio((weights * values).sum(), weights.sum()))
            count += 1
        else:
            means.append(nothing)
    values = torch.stack(means) if means else nothing.expand(0)
    return _reduce(values, reduction, torch.tensor(count))


def _reduce(values: Tensor, reduction: str, denominator: Tensor) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else _ratio(values.sum(), denominator)


def _sample_ids(logits: Tensor, target: Tensor, sample_ids: Tensor | None) -> Tensor:
    if sample_ids is not None:
        return sample_ids
    if logits.dim() < 3:
        raise ValueError(
            f"per_sample=True needs sample_ids for logits of shape {tuple(logits.shape)}: "
            "only logits of 3 or more dimensions have a leading sample index"
        )
    leading = torch.arange(len(target), device=target.device)
    return leading.view(-1, *[1] * (target.dim() - 1)).expand(target.shape)


def _distinct_samples(logits: Tensor, ids: Tensor, sample_ids: Tensor | None) -> Tensor:
    # a leading index without tokens is still a sample
    return torch.arange(len(logits)) if sample_ids is None else ids.unique()


# ---------------------------------------------------------- what the published code does


def answer_slice(
    logits: Tensor, labels: Tensor, answer_start: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The tokens that the published code hands to its region losses, as `(logits, target)`.

        logits[:, :-1][:, s - 1 : -1], labels[:, 1:][:, s - 1 : -1]      with s = min(answer_start)

    logits (B, T, V), labels (B, T), answer_start (B,) the position of each answer's first token.
    The shift is included, so nothing must be shifted afterwards. Where sample i's answer starts
    later than s, its first `answer_start[i] - s` targets become `ignore_index`. The slice's end
    drops the last target, so the end-of-sequence token is never trained by these losses; the
    cross-entropy of the same code sees the whole sequence, prompt included.
    """
    start = int(answer_start.min())
    window = slice(start - 1, -1)
    logits, target = logits[:, :-1][:, window], labels[:, 1:][:, window]
    early = torch.arange(target.shape[1], device=target.device) < (answer_start - start)[:, None]
    return logits, target.masked_fill(early, ignore_index)


def _published_masking(
    logits: Tensor, target: Tensor, ignore_index: int = -100, **_: Any
) -> tuple[Tensor, Tensor]:
    """Ignored tokens become tokens of class 0 with all logits 0."""
    ignored = target == ignore_index
    return logits.masked_fill(ignored[..., None], 0), target.masked_fill(ignored, 0)


def _published_generalized_dice(
    logits: Tensor, target: Tensor, smooth: float, ignore_index: int = -100, **options: Any
) -> Tensor:
    if options:
        raise ValueError(f"published=True takes smooth and ignore_index only, got {set(options)}")
    logits, target = _published_masking(logits, target, ignore_index)
    if logits.dim() == 2:
        logits, target = logits[None], target[None]
    p = logits.softmax(-1)
    y = torch.nn.functional.one_hot(target.long(), logits.shape[-1]).to(p)
    w = 1 / (y.sum(1) + 1e-10) ** 2
    intersection = (w * (p * y).sum(1)).sum(-1)
    union = (w * (p.sum(1) + y.sum(1))).sum(-1)
    return (-2 * (intersection + smooth) / (union + smooth)).mean()


# ------------------------------------------------------------------------------------- projection


def sign_matrix(
    num_columns: int, dim: int, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """P (num_columns, dim) of GradEx's projection, entry by entry, with +-1 / sqrt(dim).

    Entry (c, r) is minus where bit r % 64 of word r // 64 % 4 of NumPy's Philox block at counter
    (c, r // 256, 0, 0) under the key `seed` is set.
    """
    matrix = torch.empty(num_columns, dim, dtype=dtype)
    for column in range(num_columns):
        for group in range(-(-dim // 256)):
            counter = (column + (group << 64) - 1) % (1 << 256)  # NumPy counts up before it draws
            words = np.random.Philox(key=seed, counter=counter).random_raw(4)
            bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
            part = matrix[column, 256 * group : 256 * (group + 1)]
            part.copy_(torch.from_numpy(1.0 - 2.0 * bits)[: len(part)])
    return matrix / dim**0.5


def project(gradient: Tensor, dim: int, seed: int = 0) -> Tensor:
    """`gradient @ sign_matrix(C, dim, seed)` (N, dim) of gradient (N, C), the matrix stored."""
    return gradient @ sign_matrix(gradient.shape[1], dim, seed, dtype=gradient.dtype)
