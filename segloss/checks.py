"""How arguments are checked, and how an error message shows what it was given."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value) -> str:
    """How an error message shows what it was given."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} ({', '.join(map(describe, value))})"
    return repr(value)


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it takes {' or '.join(map(repr, choices))}")


def check_number(name: str, value, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {describe(value)}; it takes a number")
    if not (low <= value <= high and value < math.inf):
        span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; it takes a number {span}")
    return float(value)


SHARDED = (
    "weights that an engine shards are whole only while the model runs: call "
    "segloss.integrations.transformers.head_loss(model, loss, target, **inputs)"
)


def is_dtensor(tensor) -> bool:
    """Without the import, which takes longer than the package's own."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def check_plain(name: str, tensor: Tensor) -> None:
    """`check_data`, and no DTensor either."""
    if is_dtensor(tensor):
        raise TypeError(f"{name} is a DTensor; it takes a plain tensor: {name}.to_local()")
    check_data(name, tensor)


def check_data(name: str, tensor: Tensor) -> None:
    """Refuse tensors that only stand for data that lies elsewhere."""
    if tensor.numel() == 0 and hasattr(tensor, "ds_shape"):
        raise TypeError(f"{name} is an empty ZeRO-3 placeholder; {SHARDED}")
    if getattr(tensor, "_fsdp_flattened", False):
        raise TypeError(f"{name} is a part of a flat parameter of FSDP1; {SHARDED}")
    if not torch.compiler.is_compiling():
        check_readable(name, tensor)


def check_readable(name: str, tensor: Tensor) -> None:
    """Refuse tensors whose values a kernel does not find where their data lie."""
    # a DTensor's layout is looked at later; the other is a plain tensor that is still on its way
    of_ranks = is_dtensor(tensor) or type(tensor).__name__ == "AsyncCollectiveTensor"
    wrapped: bool = is_traceable_wrapper_subclass(tensor)
    if (wrapped and not of_ranks) or (name == "weight" and is_quantised(tensor)):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype}, which is no plain tensor of "
            "floats: a quantised head is used by its own forward in "
            "segloss.integrations.transformers.head_loss(model, loss, target, **inputs)"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{name} is inside a torch.func transform (grad, vmap, ...), which the losses do not "
            "take; use loss.backward() or torch.autograd.grad"
        )


def is_quantised(weight: Tensor) -> bool:
    """Integers or bytes that only a layer's own forward can read: 4-bit, 8-bit, fp8."""
    return weight.dtype.itemsize == 1 and weight.dtype != torch.bool


def check_transform(softcap: float | None, scale: float) -> None:
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < torch.inf):
        raise ValueError(f"softcap is {describe(softcap)}; it takes a positive number or None")
    if not (isinstance(scale, (int, float)) and 0 < scale < torch.inf):
        raise ValueError(f"scale is {describe(scale)}; it takes a positive number")
