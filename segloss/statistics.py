"""The autograd Functions: statistics of the implicit logits in, their gradients out.

A sweep runs the kernels without autograd and collects two kinds of numbers: differentiable outputs,
and what backward needs to turn their gradients into gradients of the source's tensors.

N tokens, V classes, K classes looked at, B samples, M Lovász candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from segloss.batch import Batch, make_batch
from segloss.distributed import reduce_over, union_over
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import GradTerms, logit_grad
from segloss.kernels.row_stats import row_stats
from segloss.logits import DenseLogits, LinearLogits, as_source, describe


@dataclass
class Statistics:
    """Per-token and per-class numbers of a batch, differentiable where they are real numbers.

    Per token, of the target's shape, 0 (argmax: -1) at ignored tokens:
    `log_prob` of the target, `lse`, `entropy` (nats), `argmax`, `valid`.
    Per class: `classes` (K,) the ids looked at, `prob_sum` (K,) the sum of their probabilities.
    """

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    valid: Tensor | None = None
    prob_sum: Tensor | None = None
    classes: Tensor | None = None


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

    def __or__(self, other: Request) -> Request:
        """The least request that serves both; sums per sample and per column serve any other."""
        weights = [r.column_weight for r in (self, other) if r.column_sums]
        if len(weights) == 2 and not same_weight(*weights):
            raise ValueError(
                "label_smoothing in two parts of a combined loss takes the same class weight in "
                "both; give one part all of the smoothing"
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


# ----------------------------------------------------------------------------------- autograd

Rule = Callable[[tuple, dict[str, Tensor], dict[str, Tensor], tuple], tuple]


class _Attach(torch.autograd.Function):
    """Makes numbers that were computed outside autograd differentiable by a rule of our own."""

    @staticmethod
    def forward(ctx, rule: Rule, outputs: dict, saved: dict, *tensors):
        ctx.rule = rule
        ctx.names = len(tensors), tuple(outputs), tuple(saved)
        # through save_for_backward, never on ctx: outputs would keep their own graph alive there
        ctx.save_for_backward(*tensors, *outputs.values(), *saved.values())
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx, *grads):
        num_tensors, output_names, saved_names = ctx.names
        values = ctx.saved_tensors
        tensors, values = values[:num_tensors], values[num_tensors:]
        saved = dict(zip(output_names + saved_names, values, strict=True))
        named = {n: g for n, g in zip(output_names, grads, strict=True) if g is not None}
        needed = ctx.needs_input_grad[3:]
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            result = ctx.rule(tensors, saved, named, needed)
        return (None, None, None, *only_once(result))


def only_once(grads: tuple) -> tuple:
    """Gradients that raise when they are differentiated again.

    `once_differentiable` lets them pass as constants where the upstream gradient is one.
    """
    if not torch.is_grad_enabled():
        return grads
    message = b"segloss losses cannot be differentiated twice (create_graph=True)"
    raising = torch._C._functions.DelayedError(message, len(grads))
    marked = raising(*(None if g is None else g.detach().requires_grad_() for g in grads))
    return marked if isinstance(marked, tuple) else (marked,)


def attach(rule: Rule, outputs: dict, saved: dict, tensors: tuple) -> dict[str, Any]:
    """`outputs`, differentiable with respect to `tensors` by `rule(tensors, saved, grads, needed)`.

    `saved` reaches the rule together with the outputs; None values are left out of both.
    """
    outputs = {name: value for name, value in outputs.items() if value is not None}
    saved = {name: value for name, value in saved.items() if value is not None}
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return outputs
    return dict(zip(outputs, _Attach.apply(rule, outputs, saved, *tensors), strict=True))


# ------------------------------------------------------------------------------ class statistics


def class_ids(request: Request, batch: Batch) -> dict[str, Any]:
    """Which classes the sums run over, and where each token stands among them."""
    ids: dict[str, Any] = {}
    if not (request.prob_sums or request.rankings):
        return ids
    # a target out of range (only met on a GPU) is NaN in log_prob; as a column it must stay inside
    target = torch.where(batch.valid, batch.target, 0).clamp(0, batch.num_classes - 1)
    ids["present"] = union_over(target[batch.valid], batch.group)
    own = torch.searchsorted(ids["present"], target)
    ids["own"] = own.clamp(max=max(0, ids["present"].numel() - 1))
    if isinstance(request.classes, Tensor):
        ids["classes"] = request.classes
    else:
        ids["classes"] = ids["present"] if request.classes == "present" else None
    if request.per_sample:
        ids["sample"], ids["num_samples"] = batch.samples()
    else:
        ids["sample"] = torch.where(batch.valid, 0, -1)
    return ids


def smallest_error(error: Tensor, cell: Tensor, valid: Tensor, num_cells: int, group) -> Tensor:
    """`tau` (num_cells,): the least foreground error 1 - p_iy of each, inf for a cell without."""
    tau = error.new_full((num_cells,), torch.inf)
    if num_cells == 0:
        return tau
    cell = torch.where(valid, cell, 0)
    error = torch.where(valid, error, torch.inf)
    return reduce_over(tau.scatter_reduce(0, cell, error, "amin"), group, "min")


def thresholds(request: Request, batch: Batch, sweep: Sweep) -> Tensor:
    """(B, K') below which an entry matters to none of the requested rankings."""
    num_present = sweep.present.numel()
    error = -torch.expm1(sweep.log_prob)
    batch_tau = smallest_error(error, sweep.own, batch.valid, num_present, batch.group)
    sample_tau = batch_tau[None]
    if request.per_sample:
        cell = sweep.sample.clamp(min=0) * num_present + sweep.own
        num_cells = sweep.num_samples * num_present
        sample_tau = smallest_error(error, cell, batch.valid, num_cells, batch.group)
        sample_tau = sample_tau.view(sweep.num_samples, num_present)
    tau = torch.full_like(sample_tau, torch.inf)
    for per_sample, tolerance in request.rankings:
        own_tau = sample_tau if per_sample else batch_tau.expand_as(sample_tau)
        tau = torch.minimum(tau, own_tau.clamp(min=tolerance))
    return tau


# ----------------------------------------------------------------------------- a tensor of logits


def sweep_dense(source: DenseLogits, batch: Batch, request: Request) -> Sweep:
    """One read of the logits, then of the K columns that class statistics ask for."""
    logits = source.logits
    with torch.no_grad():
        rows = Rows.of(logits, source.softcap, source.scale)
        stats = row_stats(
            rows,
            batch.target,
            batch.ignore_index,
            entropy=request.entropy,
            argmax=request.argmax,
            column_sums=request.column_sums,
            column_weight=request.column_weight,
        )
        sweep = Sweep(
            stats.log_prob,
            stats.row_max + stats.log_sum,
            stats.entropy,
            stats.argmax,
            stats.logit_sum,
            stats.weight_sum,
            stats.num_finite,
            **class_ids(request, batch),
        )
        peak_row = None
        at = (rows, stats.row_max, stats.log_sum)
        if request.prob_sums:
            sweep.prob_sum = class_sums(
                *at, sweep.classes, sweep.sample, sweep.num_samples, batch.token_weight
            )
        if request.rankings:
            tau = thresholds(request, batch, sweep)
            found = candidates(*at, sweep.present, sweep.sample, sweep.own, tau)
            sweep.candidate_row, sweep.candidate_class, sweep.candidate_prob = found
        if request.peaks:
            peak, peak_row = class_peaks(*at, sweep.sample, sweep.num_samples)
            sweep.peak_prob = peak.exp()
            sweep.finite = reduce_over((peak.amax(0) != -torch.inf).long(), batch.group, "max") > 0
    names = ("log_prob", "lse", "entropy", "logit_sum", "prob_sum", "candidate_prob", "peak_prob")
    outputs = {name: getattr(sweep, name) for name in names}
    saved = {
        "target": batch.target,
        "valid": batch.valid,
        "row_max": stats.row_max,
        "log_sum": stats.log_sum,
        "column_weight": request.column_weight,
        "row_weight": batch.token_weight,
        "sample": sweep.sample,
        "classes": sweep.classes,
        "present": sweep.present,
        "candidate_row": sweep.candidate_row,
        "candidate_class": sweep.candidate_class,
        "peak_row": peak_row,
    }
    rule = functools.partial(grad_dense, softcap=source.softcap, scale=source.scale)
    return replace(sweep, **attach(rule, outputs, saved, (logits,)))


def grad_dense(
    tensors: tuple,
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
    needed: tuple,
    *,
    softcap: float | None,
    scale: float,
) -> tuple:
    """dlogits, from the gradients of the statistics."""
    (logits,) = tensors
    rows = Rows.of(logits, softcap, scale)
    terms = grad_terms(saved, grads)
    if terms.class_grad is not None:
        dots = row_dots(
            rows, terms.row_max, terms.log_sum, terms.columns, terms.sample, terms.class_grad
        )
        if terms.row_weight is not None:
            dots = dots * terms.row_weight
        terms.prob_coef = terms.prob_coef - dots
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logit_grad(rows, terms, dlogits.view(-1, logits.shape[-1]))
    return (dlogits,)


def grad_terms(saved: dict[str, Tensor], grads: dict[str, Tensor]) -> GradTerms:
    """The terms of `kernels/logit_grad.py`, but for the class sums' part of `s_i`."""
    zero = torch.zeros_like(saved["row_max"])
    target_coef = grads.get("log_prob", zero)
    terms = GradTerms(
        valid=saved["valid"],
        target=saved["target"],
        row_max=saved["row_max"],
        log_sum=saved["log_sum"],
        prob_coef=grads.get("lse", zero) - target_coef,
        target_coef=target_coef,
        target_rest=target_coef * -torch.expm1(saved["log_prob"]),
    )
    if "entropy" in grads:
        terms.entropy, terms.entropy_grad = saved["entropy"], grads["entropy"]
    if "logit_sum" in grads:
        terms.sum_grad, terms.column_weight = grads["logit_sum"], saved.get("column_weight")
    if "prob_sum" in grads:
        terms.sample, terms.class_grad = saved["sample"], grads["prob_sum"].contiguous()
        terms.columns, terms.row_weight = saved.get("classes"), saved.get("row_weight")
    add_entries(terms, candidate_entries(saved, grads), peak_entries(saved, grads))
    return terms


def add_entries(terms: GradTerms, candidate: tuple | None, peak: tuple | None) -> None:
    """The entries with a gradient of their own, ordered by row and column, each once."""
    if candidate is None and peak is None:
        return
    if peak is None:
        row, column, grad, prob = candidate
    else:
        both = [entry for entry in (candidate, peak) if entry is not None]
        row, column, grad, prob = (torch.cat(part) for part in zip(*both, strict=True))
    terms.prob_coef = terms.prob_coef - group_sum(prob * grad, row, terms.row_max.numel())
    if peak is not None and row.numel():
        # a candidate and a peak may be the same entry
        width = int(column.max()) + 1
        key, inverse = torch.unique(row * width + column, return_inverse=True)
        row, column, grad = key // width, key % width, group_sum(grad, inverse, key.numel())
    if terms.class_grad is not None and terms.columns is not None:
        column = torch.searchsorted(terms.columns, column)
    terms.entry_row, terms.entry_class, terms.entry_grad = row, column, grad


def candidate_entries(saved, grads) -> tuple | None:
    if "candidate_prob" not in grads:
        return None
    column = saved["present"][saved["candidate_class"]]
    return saved["candidate_row"], column, grads["candidate_prob"], saved["candidate_prob"]


def peak_entries(saved, grads) -> tuple | None:
    if "peak_prob" not in grads:
        return None
    used = (grads["peak_prob"] != 0) & (saved["peak_row"] >= 0)
    row, column = saved["peak_row"][used], used.nonzero()[:, 1]
    return row, column, grads["peak_prob"][used], saved["peak_prob"][used]


def group_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`out[index[i]] += values[i]` over a new (size,) tensor of zeros, the same bits every time."""
    if size == 0:
        return values[:0]  # still of the graph
    zeros = values.new_zeros(size)
    if values.is_cuda:  # index_add_ adds atomically there; the accumulating put sorts first
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)


# -------------------------------------------------------------------------------------- public


def make_sweep(source, batch: Batch, request: Request) -> Sweep:
    """Statistics of any logits source."""
    if isinstance(source, LinearLogits):
        from segloss.linear import sweep_linear

        return sweep_linear(source, batch, request)
    with torch.autocast(source.device.type, enabled=False):
        return sweep_dense(source, batch, request)


def logit_statistics(
    logits: Tensor | DenseLogits | LinearLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    argmax: bool = False,
    classes: str | Tensor | None = None,
) -> Statistics:
    """Differentiable statistics for losses of your own, from one sweep over the logits.

        log_p = torch.log_softmax(logits.float(), -1)
        log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        lse = torch.logsumexp(logits.float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        prob_sum = log_p.exp().flatten(0, -2).sum(0)[classes]

    Args:
        logits: (..., V) tensor or a logits source.
        target: (...) integers; nothing is shifted.
        ignore_index: tokens with this target are left out; their statistics are 0 (argmax: -1).
        entropy, argmax: whether to compute them.
        classes: "present" (classes that occur as a target), "all", or a (K,) tensor of distinct
            class ids: also sums the probabilities of these classes over the tokens.

    Returns float32 statistics, float64 for float64 logits. Errors: as every loss.
    """
    source = as_source(logits)
    batch = make_batch(source, target, ignore_index=ignore_index)
    request = Request(entropy=entropy, argmax=argmax)
    if classes is not None:
        request = replace(request, prob_sums=True, classes=check_classes(classes, source))
    sweep = make_sweep(source, batch, request)
    statistics = public_statistics(sweep, batch)
    if classes is not None:
        statistics.prob_sum = sweep.prob_sum[0]
        statistics.classes = sweep.classes
        if sweep.classes is None:
            statistics.classes = torch.arange(source.num_classes, device=source.device)
        if isinstance(classes, Tensor):
            classes = classes.to(source.device)
            place = torch.searchsorted(sweep.classes, classes)
            statistics.prob_sum, statistics.classes = statistics.prob_sum[place], classes
    return statistics


def check_classes(classes, source) -> str | Tensor:
    """ "present", "all", or class ids, which come back sorted and distinct."""
    if isinstance(classes, str) and classes in ("present", "all"):
        return classes
    if isinstance(classes, Tensor) and classes.dim() == 1 and not classes.is_floating_point():
        ids = torch.unique(classes.to(source.device, torch.int64))
        if ids.numel() and not (int(ids[0]) >= 0 and int(ids[-1]) < source.num_classes):
            raise ValueError(
                f"classes has ids from {int(ids[0])} to {int(ids[-1])}; logits have "
                f"{source.num_classes} classes (0 to {source.num_classes - 1})"
            )
        return ids
    raise ValueError(
        f"classes is {describe(classes)}; it takes 'present', 'all' or a 1-D tensor of class ids"
    )


def public_statistics(sweep: TokenStats, batch: Batch) -> Statistics:
    shape = batch.shape

    def shaped(values):
        return None if values is None else values.view(shape)

    return Statistics(
        shaped(sweep.log_prob),
        shaped(sweep.lse),
        shaped(sweep.entropy),
        shaped(sweep.argmax),
        batch.valid.view(shape),
    )
