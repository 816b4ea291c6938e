"""The samples of a trainer's micro-batches, and what each of their tokens weighs.

A window is all micro-batches of one optimizer step. B rows of T tokens, b samples of a micro-batch,
K tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.checks import describe
from segloss.distributed import sum_over
from segloss.kernels.common import widest
from segloss.sources import logit_statistics
from segloss.weighting import SampleWeighting, sample_losses, token_weights

IGNORE = -100
# columns of a batch that are for the loss and not for the model's forward
LOSS_COLUMNS = ("task_ids", "sample_ids", "sample_weights", "token_weight")


def next_tokens(labels: Tensor, fill: float = IGNORE) -> Tensor:
    """What stands at place t + 1, at place t; the last place predicts nothing and has `fill`.

    One more column costs nothing, where `logits[:, :-1]` would copy them or break their strides.
    """
    return F.pad(labels, (0, 1), value=fill)[..., 1:]


def target_of(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) the token each place predicts: the labels shifted, unless the batch has done so."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("labels") is None:
        raise ValueError(f"the batch has the columns {', '.join(batch)}; the loss takes labels")
    return next_tokens(batch["labels"])


@dataclass
class Samples:
    """The samples of one micro-batch."""

    target: Tensor  # (B, T) next tokens, IGNORE where there is no loss
    index: Tensor  # (B, T) which of the b samples a place belongs to
    num_samples: int
    token_weight: Tensor | None  # (B, T) given with the data
    task: Tensor | None  # (b,)
    weight: Tensor | None  # (b,) given with the data

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Samples:
        target = target_of(batch)
        index, count = sample_index(batch, target)
        token_weight = batch.get("token_weight")
        if token_weight is not None:
            token_weight = next_tokens(per_place("token_weight", token_weight, target), 0)

        def per_sample(name: str) -> Tensor | None:
            if batch.get(name) is None:
                return None
            places = per_place(name, batch[name], target)
            # padding belongs to the row's last sample and says nothing of it
            places = torch.where(target == IGNORE, 0, places).reshape(-1)
            return places.new_zeros(count).scatter_reduce_(0, index.reshape(-1), places, "amax")

        task, weight = per_sample("task_ids"), per_sample("sample_weights")
        return cls(target, index, count, token_weight, task, weight)

    @property
    def are_weighed(self) -> bool:
        """Whether the data say so themselves."""
        return self.token_weight is not None or self.weight is not None

    def num_tokens(self, weighed: bool = True) -> Tensor:
        """(b,) tokens that carry loss, or the sums of their weights."""
        valid = (self.target != IGNORE).to(widest(self.target.device))
        if weighed and self.token_weight is not None:
            valid = valid * self.token_weight
        return valid.new_zeros(self.num_samples).index_add_(
            0, self.index.reshape(-1), valid.reshape(-1)
        )

    def losses(self, source) -> Tensor:
        """(b,) mean cross-entropy of each sample, NaN without tokens."""
        log_prob = logit_statistics(source, self.target).log_prob
        valid = self.target != IGNORE
        return sample_losses(log_prob, self.index, valid=valid, num_samples=self.num_samples)


def per_place(name: str, column: Tensor, target: Tensor) -> Tensor:
    """A column with a number per row (B,) or per place (B, T), as (B, T)."""
    if column.shape == target.shape:
        return column
    if column.shape != target.shape[:1]:
        raise ValueError(
            f"{name} is {describe(column)}; it takes one number per row, ({len(target)},), or per "
            f"token, {tuple(target.shape)}"
        )
    return column[:, None].expand(target.shape)


def packed_index(batch: Mapping[str, Tensor], target: Tensor) -> Tensor | None:
    """Which sample a place of packed rows belongs to (B, T), None if every row is one sample.

    By the column sample_ids (B, T), or by where position_ids start again.
    """
    if batch.get("sample_ids") is not None:
        return per_place("sample_ids", batch["sample_ids"], target)
    positions, attended = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or positions.shape != target.shape:
        return None
    starts = positions == 0
    if attended is not None and attended.shape == starts.shape:
        starts = starts & (attended != 0)
    starts[:, 0] = True
    return starts.reshape(-1).cumsum(0).view(target.shape)


def sample_index(batch: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, int]:
    """(index of each place's sample (B, T), number of samples b)."""
    packed = packed_index(batch, target)
    if packed is not None:
        distinct, index = torch.unique(packed, return_inverse=True)
        return index, len(distinct)
    rows = torch.arange(len(target), device=target.device)
    return rows[:, None].expand(target.shape), len(target)


@dataclass
class Weighed:
    """Token weights of a micro-batch, and the window's number of tokens to divide their sum by."""

    token_weight: Tensor  # (B, T)
    normalizer: Tensor  # ()


def weigh(
    window: Sequence[Samples],
    *,
    losses: Tensor | None = None,
    sample_weighting: SampleWeighting | None = None,
    task_weights: Tensor | None = None,
    group=None,
) -> list[Weighed]:
    """What each micro-batch's tokens weigh, by the columns of the data and by what is given.

    Args:
        losses: (samples of the window,) for `sample_weighting`.
        task_weights: (K,), for the column task_ids.
        group: process group that the window is spread over.
    """
    sums = torch.cat([samples.num_tokens() for samples in window])
    weights = None if sample_weighting is None else sample_weighting(losses)  # type: ignore[arg-type]
    given = joined("sample_weights", [samples.weight for samples in window])
    if given is not None:
        given = torch.where(sums > 0, given, 0)
        weights = given if weights is None else given * weights
        weights = weights / sum_over(weights.sum(), group)
    task = joined("task_ids", [samples.task for samples in window])
    if task_weights is None:
        task = None
    elif task is None:
        raise ValueError("task_weights needs the column task_ids in every batch; there is none")
    per_token = token_weights(
        sums, sample_weights=weights, task_ids=task, task_weights=task_weights, group=group
    )
    # of mean 1, so that the smoothing of a region loss keeps its size beside its sums
    number = sum_over(torch.stack([s.num_tokens(False).sum() for s in window]).sum(), group)
    rows = (per_token * number).split([samples.num_samples for samples in window])
    return [
        Weighed(row[samples.index] * (1 if given is None else given), number)
        for row, samples in zip(rows, window, strict=True)
        for given in [samples.token_weight]
    ]


def joined(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    """One column of all micro-batches, None if none has it."""
    found = [part for part in parts if part is not None]
    if len(found) not in (0, len(parts)):
        raise ValueError(f"{name} is a column of {len(found)} of {len(parts)} micro-batches")
    return torch.cat(found) if found else None
