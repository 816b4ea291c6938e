"""Where logits come from: a tensor, or a hidden state and a head that are never multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def describe(value) -> str:
    """How an error message shows what it was given."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return repr(value)


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse tensors that only stand for data that lies elsewhere."""
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor; pass {name}.full_tensor(), or {name}.to_local() with group= "
            "where its rows are sharded over tokens"
        )
    if tensor.numel() == 0 and hasattr(tensor, "ds_shape"):
        raise TypeError(
            f"{name} is an empty ZeRO-3 placeholder; gather it first with "
            "deepspeed.zero.GatheredParameters"
        )


def check_transform(softcap: float | None, scale: float) -> None:
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < torch.inf):
        raise ValueError(f"softcap is {describe(softcap)}; it takes a positive number or None")
    if not (isinstance(scale, (int, float)) and 0 < scale < torch.inf):
        raise ValueError(f"scale is {describe(scale)}; it takes a positive number")


@dataclass(frozen=True)
class DenseLogits:
    """`softcap * torch.tanh(scale * logits / softcap)`, transformed on the fly.

    A plain tensor given to a loss means `DenseLogits(tensor)`.

    Args:
        logits: (..., V), float64, float32, bfloat16 or float16, at least one leading dimension.
        softcap: positive number, or None for no cap (Gemma-2 style logit soft-capping).
        scale: positive number the logits are multiplied by before the cap (1 / temperature).

    -inf stays -inf through the cap, with gradient 0.
    """

    logits: Tensor
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self):
        check_transform(self.softcap, self.scale)
        logits = self.logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits is {describe(logits)}; it takes a tensor of shape (..., V)")
        check_plain("logits", logits)
        if logits.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"logits is {describe(logits)}; it takes float64, float32, bfloat16 or float16"
            )
        if logits.dim() < 2 or logits.shape[-1] == 0:
            raise ValueError(
                f"logits is {describe(logits)}; it takes shape (..., V): at least two dimensions, "
                "at least one class"
            )
        if logits.device.type == "meta":
            raise ValueError(f"logits is {describe(logits)}; it takes a tensor with data")

    @property
    def leading_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32


def as_source(logits) -> DenseLogits:
    return logits if isinstance(logits, DenseLogits) else DenseLogits(logits)
