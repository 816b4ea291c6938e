"""Where logits come from: a tensor, or a hidden state and a head that are never multiplied out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def describe(value) -> str:
    """How an error message shows what it was given."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} ({', '.join(map(describe, value))})"
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


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Logits of one row chunk, in bytes, where the caller gives none (measured: bench/NOTES.md)
CPU_CHUNK_BYTES = 64 << 20
GPU_CHUNK_BYTES = 512 << 20
# with fewer rows than these the matrix units wait for the weight to be read again
CPU_CHUNK_ROWS = 512
GPU_CHUNK_ROWS = 1024
# up to this many classes grad_filter is taken as it is; small columns add up, so more of them are
# held to a lower limit (measured: bench/NOTES.md)
FILTER_CLASSES = 1 << 16


@dataclass(frozen=True)
class LinearLogits:
    """`softcap * tanh(scale * F.linear(hidden, weight, bias) / softcap)`, never stored.

    Takes the place of the logits in every loss: they are made, used and dropped a chunk of rows at
    a time.

    Args:
        hidden: (..., D), of the weight's dtype (or any, under autocast, which casts both).
        weight: (V, D), the lm_head.
        bias: (V,) or None.
        softcap, scale: as for DenseLogits.
        lora: (A (r, D), B (V, r), scaling) of a LoRA adapter on the head, as peft stores it: the
            head is `weight + scaling * B @ A`. Adapter dropout must be 0.
        compact: leave ignored rows out of the matrix products; costs one synchronisation for their
            count on a GPU, which compact=False avoids (CUDA graphs).
        chunk_bytes: what the logits of one chunk may take; None for a measured default.
        memory_budget: bytes of logits that may be kept from forward to backward where they would
            otherwise be computed again.
        grad_filter: columns of a block of 256 rows in which every |dlogits| (before the mean and
            the upstream gradient) is below this are multiplied as one rank-1 term; 0 for none.
            With more than 65,536 classes the limit falls as 65,536 / V.

    Errors: TypeError or ValueError naming the argument.
    Memory and matrix products: `explain(loss, target)`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    lora: tuple[Tensor, Tensor, float] | None = None
    compact: bool = True
    chunk_bytes: int | None = None
    memory_budget: int = 0
    grad_filter: float = 0.0
    # of the matrix products: autocast's where it is on
    product_dtype: torch.dtype = field(init=False, repr=False)
    # filled by backward: "dropped_mass", the share of |dlogits| that grad_filter merged
    report: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        check_transform(self.softcap, self.scale)
        for name, tensor in self.named_tensors():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {describe(tensor)}; it takes a tensor")
            check_plain(name, tensor)
            if tensor.dtype not in FLOATS:
                raise TypeError(
                    f"{name} is {describe(tensor)}; it takes float64, float32, bfloat16 or float16"
                )
            if tensor.device != self.hidden.device or tensor.device.type == "meta":
                raise ValueError(
                    f"{name} is on {tensor.device}; it takes the device of hidden, a real one "
                    f"({self.hidden.device})"
                )
        self.check_shapes()
        self.check_options()
        device, dtype = self.hidden.device.type, self.hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        object.__setattr__(self, "product_dtype", dtype)

    def check_shapes(self) -> None:
        hidden, weight = self.hidden, self.weight
        if hidden.dim() < 2 or hidden.shape[-1] == 0:
            raise ValueError(f"hidden is {describe(hidden)}; it takes shape (..., D), 2-D at least")
        width = hidden.shape[-1]
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
            raise ValueError(f"weight is {describe(weight)}; it takes shape (V, {width})")
        num_classes = weight.shape[0]
        if self.bias is not None and self.bias.shape != (num_classes,):
            raise ValueError(f"bias is {describe(self.bias)}; it takes shape ({num_classes},)")
        if self.lora is not None:
            a, b, scaling = self.lora
            if not (isinstance(scaling, (int, float)) and math.isfinite(scaling)):
                raise TypeError(f"lora's scaling is {describe(scaling)}; it takes a finite number")
            if a.dim() != 2 or a.shape[1] != width:
                raise ValueError(f"lora's A is {describe(a)}; it takes shape (r, {width})")
            if b.shape != (num_classes, a.shape[0]):
                raise ValueError(
                    f"lora's B is {describe(b)}; it takes shape ({num_classes}, {a.shape[0]})"
                )
        if not torch.is_autocast_enabled(hidden.device.type):
            for name, tensor in self.named_tensors():
                if tensor.dtype != hidden.dtype:
                    raise TypeError(
                        f"{name} is {tensor.dtype}, hidden {hidden.dtype}; they take one dtype "
                        "outside autocast"
                    )

    def check_options(self) -> None:
        if not isinstance(self.compact, bool):
            raise TypeError(f"compact is {self.compact!r}; it takes True or False")
        for name in ("chunk_bytes", "memory_budget"):
            value = getattr(self, name)
            if name == "chunk_bytes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {describe(value)}; it takes a number of bytes")
            if value < (name == "chunk_bytes"):
                raise ValueError(f"{name} is {value}; it takes a positive number of bytes")
        if not (isinstance(self.grad_filter, (int, float)) and 0 <= self.grad_filter < 1):
            raise ValueError(f"grad_filter is {self.grad_filter!r}; it takes a number in [0, 1)")

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of what makes the logits, in the order gradients are returned."""
        named: list[tuple[str, Tensor]] = [("hidden", self.hidden), ("weight", self.weight)]
        if self.bias is not None:
            named.append(("bias", self.bias))
        if self.lora is not None:
            if not (isinstance(self.lora, tuple) and len(self.lora) == 3):
                raise TypeError(f"lora is {describe(self.lora)}; it takes (A, B, scaling)")
            named += [("lora's A", self.lora[0]), ("lora's B", self.lora[1])]
        return named

    @property
    def leading_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def filter_limit(self) -> float:
        """`grad_filter` as each column is held to it."""
        return self.grad_filter * min(1.0, FILTER_CLASSES / self.num_classes)

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for _, t in self.named_tensors())

    def chunk_rows(self, num_rows: int) -> int:
        """Rows of a chunk: from the byte budget alone, never from V / D."""
        on_gpu = self.device.type == "cuda"
        budget = self.chunk_bytes or (GPU_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES)
        rows = budget // (self.num_classes * self.product_dtype.itemsize)
        if self.chunk_bytes is None:
            rows = max(GPU_CHUNK_ROWS if on_gpu else CPU_CHUNK_ROWS, rows)
        if rows >= num_rows:
            return max(1, num_rows)
        # equal chunks: a small last one would reread the weight for little
        count = -(-num_rows // max(1, rows))
        even = -(-num_rows // count)
        return even if even < 128 else min(num_rows, -(-even // 128) * 128 if rows >= 128 else even)

    def explain(self, loss, target: Tensor) -> str:
        """What `loss(self, target)` and its backward do: chunks, matrix products, bytes."""
        from segloss.linear import explain

        return explain(self, loss, target)


Source = DenseLogits | LinearLogits


def as_source(logits) -> Source:
    return logits if isinstance(logits, (DenseLogits, LinearLogits)) else DenseLogits(logits)
