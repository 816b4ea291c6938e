"""Statistics of rows whose columns may lie on several ranks.

R rows of a chunk, W columns here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.divergence import divergence
from segloss.kernels.row_stats import RowStats, row_stats
from segloss.sharding import Sharding
from segloss.sweep.beside import Beside, Reading
from segloss.sweep.request import Request
from segloss.sweep.shards import logits_at


def request_stats(
    z: Rows,  # (R, W)
    target: Tensor,  # (R,) class ids
    ignore_index: int,
    request: Request,
    sharding: Sharding,
    exp_out: Tensor | None = None,  # (R, W)
) -> RowStats:
    """What `request` asks of whole rows; `exp_out` as for `row_stats`."""
    wanted: dict[str, Any] = {
        "entropy": request.entropy,
        "argmax": request.argmax,
        "column_sums": request.column_sums,
        "column_weight": sharding.part(request.column_weight),
        "exp_out": exp_out,
    }
    if sharding.is_whole:
        return row_stats(z, target, ignore_index, **wanted)
    valid, own = target != ignore_index, sharding.own(target)
    target_logit = logits_at(z, torch.where(valid, own, -1))
    # here ignore_index may be the number of a column, and -1 would be an ignored row
    local = torch.where(valid, torch.where(own < 0, z.num_classes, own), -1)
    return sharding.exchange(row_stats(z, local, -1, **wanted), target_logit, target, valid)


def read_spent(
    z: Rows,  # (R, V), all classes
    target: Tensor,  # (R,) class ids
    ignore_index: int,
    request: Request,  # one divergence
    sharding: Sharding,
    beside: Beside,
    valid: Tensor,  # (R,)
) -> tuple[RowStats, Reading]:
    """Statistics and the divergence's value, whose gradient is left where the logits were; not on a
    GPU.

    At temperature 1 the divergence's own pass finds the statistics, too.
    """
    reading = Reading(beside, valid, request.divergences, sharding, [])
    reading.pairs = reading.make_pairs(z)
    (pair,), (of,) = reading.pairs, request.divergences
    own = torch.where(valid, target, -1)
    more = request.entropy or request.argmax or request.column_sums
    apart = more or of.temperature != 1 or pair.width < z.num_classes
    if apart:
        stats = request_stats(z, target, ignore_index, request, sharding)
    target_logit = logits_at(z, own)
    divergence(pair, out=z.data[0])
    if not apart:
        row_max, log_sum = pair.numbers.student_max, pair.numbers.student_sum
        log_prob = torch.where(valid, target_logit - row_max - log_sum, 0)
        stats = RowStats(row_max, log_sum, log_prob)
    return stats, reading
