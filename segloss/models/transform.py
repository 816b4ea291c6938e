"""What a model does to its head's logits, learnt from what becomes of logits that are known.

V classes of the head, P rows of probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from segloss.checks import is_dtensor
from segloss.models.tensor_parallel import like_weight
from segloss.sources import LinearLogits

NUM_PROBES = 8  # at least
SMALLEST, LARGEST = -10, 40  # exponents of 2: any scale is met, and any cap is reached
MASKED = -1e4  # what models write into classes that do not exist, or less


@dataclass(frozen=True)
class Transform:
    """`softcap * tanh(scale * z / softcap)`, then `+ bias`, of the first `num_classes` columns."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (num_classes,), -inf for masked classes
    num_classes: int | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """In float64."""
        z = z[..., : self.num_classes].double() * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.bias is None else z + self.bias.to(z.device)

    def source(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple | None
    ) -> LinearLogits:
        """The logits of a linear head, so transformed."""
        n = self.num_classes
        if n is not None and n < weight.shape[0] and is_dtensor(weight):
            raise TypeError(
                f"the model cuts the logits of {weight.shape[0]} classes to {n}, and its head is "
                "cut by classes over ranks (tensor parallelism); leave lm_head out of the plan"
            )
        if n is not None and n < weight.shape[0]:
            weight, bias = weight[:n], None if bias is None else bias[:n]
            lora = None if lora is None else (lora[0], lora[1][:n], lora[2])
        if self.bias is not None:
            added = (self.bias / self.scale).to(weight.device, weight.dtype)
            added = like_weight(added, weight)
            bias = added if bias is None else bias + added
        return LinearLogits(hidden, weight, bias, softcap=self.softcap, scale=self.scale, lora=lora)


def probes(num_classes: int, like: Tensor) -> Tensor:
    """(P, V) logits, a first row of zeros, then sizes of every order and both signs in a column.

    In float64 where the device has it, so that a scale is learnt to the last bit.
    """
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    rows = max(NUM_PROBES, -(-256 // num_classes))  # enough numbers where there are few classes
    column = torch.arange(num_classes, dtype=torch.float64) * 0.6180339887498949
    row = torch.arange(rows - 1, dtype=torch.float64)[:, None]
    size = (column + row / (rows - 1)) % 1  # spread evenly along both
    z = torch.exp2(SMALLEST + (LARGEST - SMALLEST) * size)
    z = torch.where((row + torch.arange(num_classes)) % 2 == 0, z, -z)
    return torch.cat([torch.zeros(1, num_classes, dtype=z.dtype), z]).to(like.device, dtype)


def learnt(name: str, z: Tensor, logits: Tensor, rounding: torch.dtype) -> Transform:
    """The transform that made `logits` (..., P, V') of the probes `z` (P, V).

    `rounding` is the model's own dtype, which its logits may have passed through.

    Errors: ValueError for a model that does anything else.
    """
    refused = ValueError(
        f"{name} does more to its head's logits than scale, soft-cap, bias and cut them; give the "
        'loss model(...).logits (LossMixin: head="logits")'
    )
    if logits.dim() < 2 or logits.shape[-2] != len(z) or logits.shape[-1] > z.shape[1]:
        raise refused
    eps = torch.finfo(logits.dtype).eps
    out = logits.reshape(-1, *logits.shape[-2:])[0].cpu().double()
    num_classes = out.shape[1]
    z = z.cpu().double()[:, :num_classes]
    masked = (out == out[0]).all(0) & (out[0] <= MASKED)
    kept = int((~masked).nonzero()[-1]) + 1 if not masked.all() else 0
    if kept == 0:
        raise refused
    if masked.any() and bool(masked[:kept].logical_not().all()):
        num_classes, out, z, masked = kept, out[:, :kept], z[:, :kept], masked[:kept]
    bias = torch.where(masked, -torch.inf, out[0])
    z, own, shift = z[1:, ~masked], (out[1:] - out[0])[:, ~masked], bias[~masked].abs()
    use = own.isfinite()
    if not use.any(0).all():
        raise refused
    scale, softcap = fitted(z, own, use)
    if not (0 < scale < math.inf) or (softcap is not None and bool(shift.any())):
        raise refused
    found = Transform(scale, softcap)
    want = found(z)
    error, size = (own - want)[use], (want.abs() + shift)[use]
    exact = bool((error.abs() <= 16 * eps * size + 1e-300).all())
    coarse = torch.finfo(rounding).eps
    # rounding, on the way, to the model's own dtype shows as errors of both signs
    rounded = bool((error.abs() <= 4 * coarse * size).all()) and bool(
        (error / size.clamp(min=1e-300)).mean().abs() <= coarse / 4
    )
    if not (exact or rounded):
        raise refused
    if abs(scale - 1) <= (16 * eps if exact else coarse / 4):
        scale = 1.0
    return Transform(scale, softcap, bias if bool((bias != 0).any()) else None, num_classes)


def fitted(z: Tensor, own: Tensor, use: Tensor) -> tuple[float, float | None]:
    """(scale, softcap) that make `own` of `z`, as well as it can be done."""
    size = z.abs()
    top = own[use & (size >= 2.0 ** (LARGEST - 10))].abs()
    if top.numel() > 1 and bool(top.amin() >= 0.9 * top.amax()):
        softcap = float(top.amax())
        inside = use & (own.abs() < 0.5 * softcap)
        ratio = softcap * torch.atanh(own[inside] / softcap) / z[inside]
        return float(ratio.mean()), softcap
    ratio = own[use] / z[use]
    return float(ratio.median()), None
