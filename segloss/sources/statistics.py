"""The statistics of a batch, for losses of one's own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from segloss.checks import describe
from segloss.distributed import sum_over
from segloss.sources.beside import make_beside
from segloss.sources.given import as_source
from segloss.sweep.batch import Batch, make_batch
from segloss.sweep.request import Request, Statistics, TokenStats
from segloss.sweep.source import Source


def logit_statistics(
    logits: Tensor | Source,
    target: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    argmax: bool = False,
    classes: str | Tensor | None = None,
    columns: Tensor | None = None,
) -> Statistics:
    """Differentiable statistics for losses of your own, from one sweep over the logits.

        log_p = torch.log_softmax(logits.float(), -1)
        log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        lse = torch.logsumexp(logits.float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        prob_sum = log_p.exp().flatten(0, -2).sum(0)[classes]
        column_log_prob = log_p.gather(-1, columns)

    Args:
        logits: (..., V) tensor or a logits source.
        target: (...) integers; nothing is shifted.
        ignore_index: tokens with this target are left out; their statistics are 0 (argmax: -1).
        entropy, argmax: whether to compute them.
        classes: "present" (classes that occur as a target), "all", or a (K,) tensor of distinct
            class ids: also sums the probabilities of these classes over the tokens.
        columns: (..., k) integers, class ids of each token, -1 to skip: also their
            log-probabilities (0 where skipped), as for several answers or stored teachers.

    Of DTensors and a `VocabShard` the statistics are plain tensors, of this rank's tokens and of
    all classes; sums over tokens are of all ranks.

    Returns float32 statistics, float64 for float64 logits. Errors: as every loss.
    """
    source = as_source(logits)
    group = source.token_group(None)
    beside = make_beside(source, columns=columns)
    batch = make_batch(source, target, ignore_index=ignore_index, group=group, beside=beside)
    request = Request(entropy=entropy, argmax=argmax)
    if classes is not None:
        request = replace(request, prob_sums=True, classes=check_classes(classes, source))
    sweep = source.sweep(batch, request)
    statistics = public_statistics(sweep, batch)
    if classes is not None:
        statistics.prob_sum = sum_over(sweep.prob_sum[0], group)
        statistics.classes = sweep.classes
        if sweep.classes is None:
            statistics.classes = torch.arange(source.num_classes, device=source.device)
        if isinstance(classes, Tensor):
            classes = classes.to(source.device)
            place = torch.searchsorted(sweep.classes, classes)
            statistics.prob_sum, statistics.classes = statistics.prob_sum[place], classes
    return statistics


def check_classes(classes, source: Source) -> str | Tensor:
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

    columns = sweep.column_log_prob
    if columns is not None:
        columns = columns.reshape(*shape, columns.shape[1])
    return Statistics(
        shaped(sweep.log_prob),
        shaped(sweep.lse),
        shaped(sweep.entropy),
        shaped(sweep.argmax),
        batch.valid.view(shape),
        column_log_prob=columns,
    )
