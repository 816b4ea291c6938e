"""How far a target is ahead of all other classes together, computed where p rounds to 1 too.

N tokens, V classes, T tokens of one answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segloss.sources import DenseLogits, as_source, logit_statistics
from segloss.sweep.batch import make_batch
from segloss.sweep.source import Source


def output_margin(logits: Tensor | Source, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`z_y - logsumexp_{j != y} z_j`, the log-odds of every target token; differentiable.

        rest = logits.float().scatter(-1, target[..., None], -torch.inf)
        margin = logits.float().gather(-1, target[..., None])[..., 0] - rest.logsumexp(-1)

    `log p - log(1 - p)` is the same number, but infinite once p rounds to 1 (from a margin of 17 in
    float32); and with it goes every digit of the gradient. Here the sum never holds the target.

    Args:
        logits: (..., V), V >= 2, a tensor or a logits source. Only rows whose target counts are
            made, so with LinearLogits they take as many rows as there are answer tokens.
        target: (...) integers; nothing is shifted.

    Returns the target's shape, float32 (float64 for float64 logits), 0 at ignored tokens. The
    cross-entropy is `softplus(-margin)`. Errors: as every loss; ValueError for a lone class.
    """
    source = as_source(logits)
    batch = make_batch(source, target, ignore_index=ignore_index)
    if source.num_classes < 2:
        raise ValueError("logits have 1 class; a margin takes at least 2")
    rows = batch.valid.nonzero()[:, 0]
    y = batch.target[rows]
    z = source.rows(rows)
    rest = DenseLogits(z.scatter(1, y[:, None], -torch.inf), source.softcap, source.scale)
    # the log-sum-exp does not depend on which class is asked for
    lse = logit_statistics(rest, (y + 1) % source.num_classes).lse
    z_y = z.gather(1, y[:, None])[:, 0].to(lse.dtype) * source.scale
    if source.softcap is not None:
        z_y = source.softcap * torch.tanh(z_y / source.softcap)
    margin = lse.new_zeros(batch.target.numel()).index_put((rows,), z_y - lse)
    return margin.view(batch.shape)


def answer_margin(token_margin: Tensor) -> Tensor:
    """Log-odds of a whole answer from the margins (T,) of its tokens; 0-dim, float64.

        nll = F.softplus(-token_margin).sum()       # -log P(answer)
        margin = -nll - log(1 - exp(-nll))          # log P - log(1 - P)

    So `softplus(-margin)` is the sum of the tokens' cross-entropies *exactly*, for any T. (The mean
    of the margins, as published, is not: softplus of a mean is below the mean of softplus.) In
    float64 it is finite up to margins of 700.
    """
    nll = F.softplus(-token_margin.double()).sum()
    return -nll - torch.log(-torch.expm1(-nll))
