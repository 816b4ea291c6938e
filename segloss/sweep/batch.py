"""The tokens of one call, checked and flattened: targets, weights, samples.

N tokens, B samples, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from segloss.checks import INTEGERS, describe
from segloss.distributed import union_over
from segloss.sharding import Sharding
from segloss.sweep.beside import Beside


@dataclass
class Batch:
    shape: torch.Size  # the target's
    target: Tensor  # (N,) int64, ignore_index where not valid
    valid: Tensor  # (N,) bool
    token_weight: Tensor | None  # (N,) in the compute dtype
    ignore_index: int
    num_classes: int
    dtype: torch.dtype  # of statistics and losses
    sample_ids: Tensor | None  # (N,) int64 as given; None for the leading index
    group: object | None = None  # of the ranks that have other tokens
    beside: Beside = field(default_factory=Beside)
    sharding: Sharding = field(kw_only=True)  # of the classes over ranks

    def weights(self) -> Tensor:
        """What each token counts for (N,): its weight, 1 without weights, 0 if it is ignored."""
        return self.valid.to(self.dtype) if self.token_weight is None else self.token_weight

    def samples(self) -> tuple[Tensor, int]:
        """(index of each token's sample (N,), -1 where ignored; number of samples)."""
        if self.sample_ids is not None:
            ids = union_over(self.sample_ids, self.group)
            index = torch.searchsorted(ids, self.sample_ids)
            return torch.where(self.valid, index, -1), ids.numel()
        if len(self.shape) < 2:
            raise ValueError(
                f"per_sample=True with a target of shape {tuple(self.shape)} needs sample_ids: "
                "integers of the target's shape that say which sample a token belongs to"
            )
        if self.group is not None:
            raise ValueError(
                "per_sample=True with group= needs sample_ids that are the same on every rank; "
                "the leading index says nothing about the other ranks' samples"
            )
        leading = self.shape[0]
        index = torch.arange(leading, device=self.target.device)
        index = index.view(-1, *[1] * (len(self.shape) - 1)).expand(self.shape).reshape(-1)
        return torch.where(self.valid, index, -1), leading


def check_like_target(name: str, tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {describe(tensor)}; it takes a tensor of shape {tuple(shape)}")
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it takes the shape of the logits without "
            f"their last dimension, {tuple(shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but logits are on {device}")


def check_range(target: Tensor, shape: torch.Size, ignore_index: int, num_classes: int) -> None:
    """CPU only: on a GPU a look at the values would synchronise, and the kernel returns NaN."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0, 0])
    place: list[int] = []
    for size in reversed(shape):
        first, rest = divmod(first, size)
        place.insert(0, rest)
    value = int(target[int(wrong.nonzero()[0, 0])])
    raise ValueError(
        f"target{place} is {value}, but logits have {num_classes} classes (0 to "
        f"{num_classes - 1}) and ignore_index is {ignore_index}"
    )


def make_batch(
    source,
    target: Tensor,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    sample_ids: Tensor | None = None,
    group=None,
    sharding: Sharding | None = None,
    beside: Beside | None = None,
) -> Batch:
    """Check everything that has the target's shape, and flatten it to (N,).

    `sharding` is the source's, which may ask other ranks for it, unless it is given.
    """
    shape, device = source.leading_shape, source.device
    target = source.like_target("target", target)
    token_weight = source.like_target("token_weight", token_weight)
    sample_ids = source.like_target("sample_ids", sample_ids)
    if isinstance(target, Tensor) and target.dtype not in INTEGERS:
        raise TypeError(
            f"target is {describe(target)}; it takes class indices of an integer dtype "
            "(probabilities (..., V) go to CrossEntropyLoss, a teacher's to DistillationLoss)"
        )
    check_like_target("target", target, shape, device)
    flat = target.reshape(-1).to(torch.int64)
    if device.type == "cpu":
        check_range(flat, shape, ignore_index, source.num_classes)
    valid = flat != ignore_index
    if token_weight is not None:
        check_like_target("token_weight", token_weight, shape, device)
        if token_weight.dtype == torch.bool or token_weight.is_complex():
            raise TypeError(f"token_weight is {describe(token_weight)}; it takes a float dtype")
        token_weight = token_weight.detach().reshape(-1).to(source.dtype)
        if device.type == "cpu":
            wrong = ~((token_weight >= 0) & (token_weight < torch.inf)) & valid
            if bool(wrong.any()):
                value = float(token_weight[wrong][0])
                raise ValueError(f"token_weight has a value of {value}; it takes numbers >= 0")
        # weight 0 is the token not listed: as ignored, so that its NaN or inf cannot leak in
        valid = valid & (token_weight != 0)
        flat = torch.where(valid, flat, ignore_index)
        token_weight = torch.where(valid, token_weight, 0)
    if sample_ids is not None:
        check_like_target("sample_ids", sample_ids, shape, device)
        if sample_ids.dtype not in INTEGERS:
            raise TypeError(f"sample_ids is {describe(sample_ids)}; it takes an integer dtype")
        sample_ids = sample_ids.reshape(-1).to(torch.int64)
    return Batch(
        shape,
        flat,
        valid,
        token_weight,
        ignore_index,
        source.num_classes,
        source.dtype,
        sample_ids,
        group,
        Beside() if beside is None else beside,
        sharding=source.sharding if sharding is None else sharding,
    )
