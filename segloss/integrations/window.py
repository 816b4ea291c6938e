"""The samples of a trainer's micro-batches, and what each of their tokens weighs.

A window is all micro-batches of one optimizer step. B rows of T tokens, b samples of a micro-batch,
K tasks. What is said of (B, T) holds for (B,) too, the labels of a classifier of rows.
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
from segloss.sources import TopK, logit_statistics
from segloss.weighting import SampleWeighting, sample_losses, token_weights

IGNORE = -100
# columns of a batch that are for the loss and not for the model's forward
WEIGHT_COLUMNS = ("task_ids", "sample_ids", "sample_weights", "token_weight")
# of a stored teacher: k numbers per label, and what stands where fewer are stored
TEACHER_COLUMNS = {"teacher_ids": -1, "teacher_log_prob": 0}
LOSS_COLUMNS = (*WEIGHT_COLUMNS, *TEACHER_COLUMNS)
# a stored teacher's probabilities may add up to so much, by rounding to half precision
TOTAL = 1.01
# by which collators tell packed samples apart: cumulated lengths of the joined rows
LENGTHS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")


def next_tokens(labels: Tensor, fill: float = IGNORE) -> Tensor:
    """What stands at place t + 1, at place t; the last place predicts nothing and has `fill`.

    One more column costs nothing, where `logits[:, :-1]` would copy them or break their strides.
    """
    return F.pad(labels, (0, 1), value=fill)[..., 1:]


def target_of(batch: Mapping[str, Tensor], shift: bool = True, ignore: int = IGNORE) -> Tensor:
    """(B, T) what each place predicts: the labels, shifted unless the batch has done so or `shift`
    is off. A place before another packed sample predicts nothing."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    if labels is None:
        names = ", ".join(name for name, column in batch.items() if column is not None)
        raise ValueError(f"the batch has the columns {names}; the loss takes labels")
    check_classes(labels)
    if not shift or labels.dim() < 2:
        return labels
    target = next_tokens(labels, ignore)
    packed = packed_index(batch, labels.shape)
    if packed is None:
        return target
    return target.masked_fill(next_tokens(packed, -1) != packed, ignore)


# ------------------------------------------------------------------------------ stored teachers


def stored_teacher(
    batch: Mapping[str, Tensor], target: Tensor, rest: str, shift: bool = True, ignore: int = IGNORE
) -> TopK | None:
    """The columns teacher_ids and teacher_log_prob (B, T, k), at the places of the targets; None
    where a batch has neither."""
    found = {name: batch[name] for name in TEACHER_COLUMNS if batch.get(name) is not None}
    if not found:
        return None
    for name in TEACHER_COLUMNS:
        if name not in found:
            raise ValueError(f"the batch has the column {next(iter(found))} and no {name}")
    for name, column in found.items():
        if column.shape[:-1] != target.shape or column.shape != found["teacher_ids"].shape:
            raise ValueError(
                f"{name} is {describe(column)}; it takes {(*target.shape, 'k')}: k numbers for "
                "each label, as many as the other column of the teacher"
            )
        if shift and target.dim() > 1:
            places = column.movedim(-1, 1)
            found[name] = next_tokens(places, TEACHER_COLUMNS[name]).movedim(1, -1)
    teacher = TopK(found["teacher_ids"], found["teacher_log_prob"], rest)
    check_stored(teacher, target != ignore)
    return teacher


def check_stored(teacher: TopK, valid: Tensor) -> None:
    """Where there is a loss; what is no probability would be learnt as one."""
    ids, log_prob = teacher.ids[valid], teacher.log_prob[valid]
    listed = ids >= 0
    if not listed.any(-1).all():
        raise ValueError(
            "teacher_ids lists no class for some label that has a loss; it takes one at least, or "
            "the label -100"
        )
    ordered = ids.sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("teacher_ids lists a class twice for one label; it takes distinct classes")
    total = torch.where(listed, log_prob.float(), -torch.inf).exp().sum(-1)
    wrong = ~((total > 0) & (total <= TOTAL))
    if wrong.any():
        raise ValueError(
            f"teacher_log_prob holds probabilities that add up to {total[wrong][0].item():.4g} for "
            "some label; it takes log-probabilities (nats), whose sum is above 0 and at most 1"
        )


# -------------------------------------------------------------------------------------- samples


def check_classes(labels: Tensor) -> None:
    """No numbers of a regression, and no classes of which several may hold."""
    if labels.is_floating_point():
        raise TypeError(
            f"labels are {describe(labels)}; it takes classes of an integer dtype, and a "
            "regression or multi-label model keeps its own loss"
        )


@dataclass
class Samples:
    """The samples of one micro-batch."""

    target: Tensor  # (B, T) what is predicted
    valid: Tensor  # (B, T) whether it is
    index: Tensor  # (B, T) which of the b samples a place belongs to
    num_samples: int
    token_weight: Tensor | None  # (B, T) given with the data
    task: Tensor | None  # (b,)
    weight: Tensor | None  # (b,) given with the data

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], shift: bool = True, ignore: int = IGNORE) -> Samples:
        target = target_of(batch, shift, ignore)
        valid = target != ignore
        index, count = sample_index(batch, target)
        columns = {
            name: per_place(name, batch[name], target.shape)
            for name in ("token_weight", "task_ids", "sample_weights")
            if batch.get(name) is not None
        }
        token_weight = columns.get("token_weight")
        if token_weight is not None:
            if shift and target.dim() > 1:
                token_weight = next_tokens(token_weight, 0)
            check_weights("token_weight", token_weight, valid)
            token_weight = torch.where(valid, token_weight, 0)
        if "task_ids" in columns:
            check_task_ids(columns["task_ids"], valid)
        if "sample_weights" in columns:
            check_weights("sample_weights", columns["sample_weights"], valid)

        def per_sample(name: str) -> Tensor | None:
            if name not in columns:
                return None
            # padding belongs to the row's last sample and says nothing of it
            values, at = columns[name][valid], index[valid]
            most = values.new_zeros(count)
            most.scatter_reduce_(0, at, values, "amax", include_self=False)
            if not torch.equal(most[at], values):
                raise ValueError(f"{name} differs within a sample; it takes one number for each")
            return most

        task, weight = per_sample("task_ids"), per_sample("sample_weights")
        return cls(target, valid, index, count, token_weight, task, weight)

    @property
    def are_weighed(self) -> bool:
        """Whether the data say so themselves."""
        return self.token_weight is not None or self.weight is not None

    def num_tokens(self, weighed: bool = True) -> Tensor:
        """(b,) tokens that carry loss, or the sums of their weights."""
        valid = self.valid.to(widest(self.target.device))
        if weighed and self.token_weight is not None:
            valid = valid * self.token_weight
        return valid.new_zeros(self.num_samples).index_add_(
            0, self.index.reshape(-1), valid.reshape(-1)
        )

    def losses(self, source) -> Tensor:
        """(b,) mean cross-entropy of each sample, NaN without tokens."""
        target = self.target.masked_fill(~self.valid, IGNORE)
        log_prob = logit_statistics(source, target).log_prob
        return sample_losses(log_prob, self.index, valid=self.valid, num_samples=self.num_samples)


def per_place(name: str, column: Tensor, shape: torch.Size) -> Tensor:
    """A column with a number per row (B,) or per place (B, T), as (B, T)."""
    if not isinstance(column, Tensor):
        raise TypeError(f"{name} is {describe(column)}; it takes a tensor")
    if column.shape == shape:
        return column
    if column.shape != shape[:1]:
        raise ValueError(
            f"{name} is {describe(column)}; it takes one number per row, ({shape[0]},), or per "
            f"token, {tuple(shape)}"
        )
    return column[:, None].expand(shape)


def check_weights(name: str, column: Tensor, valid: Tensor) -> None:
    """Where there is a loss; a collator fills the rest up with what it likes."""
    if column.dtype == torch.bool or column.is_complex():
        raise TypeError(f"{name} is {describe(column)}; it takes floats >= 0")
    wrong = ~((column >= 0) & (column < torch.inf)) & valid
    if wrong.any():
        raise ValueError(f"{name} has the value {column[wrong][0].item()}; it takes floats >= 0")


def at_predictions(column: Tensor | None, shape: torch.Size, shift: bool) -> Tensor | None:
    """token_weight (B,) or (B, T) of labels of a shape, where these are predicted."""
    if column is None:
        return None
    column = per_place("token_weight", column, shape)
    return next_tokens(column, 0) if shift and len(shape) > 1 else column


def check_task_ids(column: Tensor, valid: Tensor) -> None:
    if column.is_floating_point() or column.is_complex() or column.dtype == torch.bool:
        raise TypeError(f"task_ids is {describe(column)}; it takes integers 0 to K - 1")
    wrong = (column < 0) & valid
    if wrong.any():
        raise ValueError(f"task_ids has {column[wrong][0].item()}; it takes integers 0 to K - 1")


# ------------------------------------------------------------------------------ packed samples


def packed_index(batch: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """Which sample a place of packed rows belongs to (B, T), None if every row is one sample.

    By the column sample_ids, or by what a collator that packs tells the model: seq_idx, the
    cumulated lengths of cu_seq_lens_q, where position_ids (B, T), (1, T), or (3, B, T) as of
    Qwen2-VL, start again, or an attention_mask that numbers the samples 1, 2, ...
    """
    if len(shape) < 2:
        return None
    if batch.get("sample_ids") is not None:
        return per_place("sample_ids", batch["sample_ids"], shape)
    numbers = of_shape(batch.get("seq_idx"), shape)
    if numbers is not None:
        return numbers
    for name in LENGTHS:
        if batch.get(name) is not None:
            return by_lengths(name, batch[name], shape)
    attended = of_shape(batch.get("attention_mask"), shape)
    positions = of_shape(batch.get("position_ids"), shape)
    numbered = attended is not None and attended.dtype != torch.bool and bool((attended > 1).any())
    if positions is None and not numbered:
        return None
    device = next(t.device for t in (positions, attended) if t is not None)
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    if positions is not None:
        starts |= positions == 0
        if batch["position_ids"].dim() == 2:  # a restart at another place than 0
            starts |= positions < F.pad(positions, (1, 0))[..., :-1]
    if attended is not None:
        real = attended != 0
        starts &= real
        if numbered:
            starts |= attended != F.pad(attended, (1, 0))[..., :-1]
        # padding at the front of a row belongs to its first sample
        starts &= F.pad(real, (1, 0))[..., :-1].cumsum(-1) > 0
    starts[:, 0] = True
    return starts.reshape(-1).cumsum(0).view(shape)


def of_shape(tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A (B, T) column of a batch as such, None for one of another shape."""
    if not isinstance(tensor, Tensor):
        return None
    if tensor.dim() == 3 and tensor.shape[1:] == shape:
        return tensor.amax(0)  # places in text, height and width: all 0 where a sample begins
    if tensor.shape == (1, shape[-1]):
        return tensor.expand(shape)
    return tensor if tensor.shape == shape else None


def by_lengths(name: str, lengths: Tensor, shape: torch.Size) -> Tensor:
    """The samples of rows that begin at the cumulated lengths (b + 1,): 0, ..., B * T or less,
    where what follows is padding."""
    if lengths.dim() != 1:
        raise ValueError(f"{name} is {describe(lengths)}; it takes cumulated lengths, (b + 1,)")
    places = torch.arange(shape.numel(), device=lengths.device, dtype=lengths.dtype)
    return torch.bucketize(places, lengths[1:].contiguous(), right=True).view(shape)


def sample_index(batch: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, int]:
    """(index of each place's sample (B, T), number of samples b)."""
    packed = packed_index(batch, target.shape)
    if packed is not None:
        distinct, index = torch.unique(packed, return_inverse=True)
        return index, len(distinct)
    rows = torch.arange(len(target), device=target.device)
    return rows.view(-1, *[1] * (target.dim() - 1)).expand(target.shape), len(target)


# ---------------------------------------------------------------------------- weights of tokens


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

    Where the weights leave nothing, every token weighs 0.

    Args:
        losses: (samples of the window,) for `sample_weighting`.
        task_weights: (K,), for the column task_ids.
        group: process group that the window is spread over.
    """
    sums = torch.cat([samples.num_tokens() for samples in window])
    weights = None if sample_weighting is None else sample_weighting(losses)  # type: ignore[arg-type]
    given = joined("sample_weights", [samples.weight for samples in window])
    if given is not None:
        given = torch.where(sums > 0, given, 0).to(sums.dtype)
        weights = given if weights is None else given * weights
        total = sum_over(weights.sum(), group)
        weights = weights / torch.where(total > 0, total, 1)
    task = joined("task_ids", [samples.task for samples in window])
    if task_weights is None:
        task = None
    else:
        check_tasks(task, task_weights)
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


def check_tasks(task: Tensor | None, task_weights: Tensor) -> None:
    if task is None:
        raise ValueError("task_weights needs the column task_ids in every batch; there is none")
    if task.numel() and int(task.max()) >= len(task_weights):
        raise ValueError(
            f"task_ids has the value {int(task.max())}; with task_weights of {len(task_weights)} "
            f"tasks it takes 0 to {len(task_weights) - 1}"
        )


def joined(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    """One column of all micro-batches, None if none has it."""
    found = [part for part in parts if part is not None]
    if len(found) not in (0, len(parts)):
        raise ValueError(f"{name} is a column of {len(found)} of {len(parts)} micro-batches")
    return torch.cat(found) if found else None
