"""Hidden states and a head that are never multiplied out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segloss.checks import FLOATS, check_data, check_transform, describe
from segloss.head.explain import explain
from segloss.head.fused import row_sum
from segloss.head.inputs import Inputs, Options
from segloss.head.matrices import Head
from segloss.head.rows import chunk_slices, kept_rows
from segloss.head.sweep import sweep
from segloss.kernels.common import Rows
from segloss.sharding import Sharding, VocabShard
from segloss.sources.layout import Layout, linear_layout, refuse_rows
from segloss.sweep.batch import Batch
from segloss.sweep.request import Request, RowSum, Sweep, TokenStats
from segloss.sweep.source import Source, Spread

PLAIN_OPTIONS = ("softcap", "scale", "compact", "chunk_bytes", "memory_budget", "grad_filter")


@dataclass(frozen=True)
class LinearLogits(Source):
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
            otherwise be computed again (region and ranking losses, reduction="none"); None keeps
            one chunk's, in memory that forward needs anyway, 0 none.
        grad_filter: columns of a block of 256 rows in which every |dlogits| (before the mean and
            the upstream gradient) is below this are multiplied as one rank-1 term; 0 for none.
            With more than 65,536 classes the limit falls as 65,536 / V.
        vocab: `VocabShard` where weight, bias and B are a slice of the vocabulary, others of which
            lie on other ranks.

    DTensors say by their placements how they are sharded, on each dimension of their one mesh:

        weight Shard(0), hidden Replicate()            the vocabulary
        weight Shard(0), hidden Shard(leading dim)     the vocabulary; hidden is gathered, its
                                                       gradient scattered (sequence parallel)
        weight Replicate(), hidden Shard(leading dim)  the tokens: target is of those here, or a
                                                       DTensor like hidden

    bias and B lie as weight does, A is replicated. The loss is a plain tensor, the same on all
    ranks, each of which gets the gradient of it.

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
    memory_budget: int | None = None
    grad_filter: float = 0.0
    vocab: VocabShard | None = None
    layout: Layout = field(init=False, repr=False)
    # of the matrix products: autocast's where it is on
    product_dtype: torch.dtype = field(init=False, repr=False)
    # filled by backward: "dropped_mass", the share of |dlogits| that grad_filter merged
    report: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        check_transform(self.softcap, self.scale)
        for name, tensor in self.named_tensors():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {describe(tensor)}; it takes a tensor")
            check_data(name, tensor)
            if tensor.dtype not in FLOATS:
                raise TypeError(
                    f"{name} is {describe(tensor)}; it takes float64, float32, bfloat16 or float16"
                )
            if tensor.device != self.hidden.device or tensor.device.type == "meta":
                raise ValueError(
                    f"{name} is on {tensor.device}; it takes the device of hidden, a real one "
                    f"({self.hidden.device})"
                )
        object.__setattr__(self, "layout", linear_layout(self.named_tensors(), self.vocab))
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
        empty = weight.shape[0] == 0 and self.vocab is None
        if weight.dim() != 2 or weight.shape[1] != width or empty:
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
            if value is None:
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
        return self.layout.leading_shape(self.hidden.shape)

    @property
    def num_classes(self) -> int:
        return self.layout.num_classes

    @property
    def sharding(self) -> Sharding:
        return self.layout.sharding

    @property
    def is_plain(self) -> bool:
        return self.layout.is_plain

    def token_group(self, group) -> Any:
        return self.layout.token_group(group)

    def like_target(self, name: str, x) -> Any:
        return self.layout.like_target(name, x)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and losses."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def inputs(self, crossing: bool = True) -> Inputs:
        """What the engine is given; without `crossing` nothing is gathered or asked for."""
        layout = self.layout
        sharding = layout.sharding if crossing else layout.assumed
        hidden = layout.hidden(self.hidden) if crossing else self.hidden
        tensors = {"hidden": hidden, "weight": layout.columns(self.weight, sharding)}
        if self.bias is not None:
            tensors["bias"] = layout.columns(self.bias, sharding)
        lora_scale = 0.0
        if self.lora is not None:
            a, b, lora_scale = self.lora
            tensors |= {"lora_a": layout.replicated(a), "lora_b": layout.columns(b, sharding)}
        options = Options(
            self.product_dtype,
            self.softcap,
            self.scale,
            lora_scale,
            self.compact,
            self.chunk_bytes,
            self.memory_budget,
            self.grad_filter,
            None if sharding.is_whole else sharding,
            self.report,
        )
        return Inputs(tensors, options)

    def sweep(self, batch: Batch, request: Request) -> Sweep:
        return sweep(self.inputs(), batch, request)

    @property
    def waits(self) -> bool:
        return self.compact

    @property
    def forms_gradients(self) -> bool:
        tensors = (tensor for _, tensor in self.named_tensors())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def row_sum(self, batch: Batch, plan: RowSum) -> tuple[Tensor, TokenStats]:
        return row_sum(self.inputs(), batch, plan)

    def rows(self, index: Tensor) -> Tensor:
        refuse_rows(self.layout)
        named, dtype = self.inputs().tensors, self.product_dtype
        named = {name: tensor.to(dtype) for name, tensor in named.items() if name != "hidden"}
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[index].to(dtype)
        z = F.linear(hidden, named["weight"], named.get("bias"))
        if self.lora is not None:
            z = z + self.lora[2] * F.linear(F.linear(hidden, named["lora_a"]), named["lora_b"])
        return z

    def block(self, rows: Tensor | slice, classes: slice) -> Rows:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            inputs = self.inputs()
            hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
            inputs = replace(inputs, tensors=inputs.tensors | {"hidden": hidden})
            return Head.of(inputs, None).columns(classes).logits()

    def settled(self) -> LinearLogits:
        """The same without gradient, its tensors in the products' dtype: outside autocast too."""
        tensors, options = self.packed()
        made = {name: t.detach().to(self.product_dtype) for name, t in tensors.items()}
        with torch.autocast(self.device.type, enabled=False):
            return self.unpacked(made, options)

    def block_rows(self, num_rows: int) -> int:
        return self.inputs().chunk_rows(num_rows, trained=False) if num_rows else 1

    def plan(self, batch: Batch, row_sum: bool, all_classes: bool, peaks: bool) -> str:
        return explain(self.inputs(crossing=False), batch, row_sum, all_classes, peaks)

    def spread(self, batch: Batch, fused: bool) -> Spread:
        inputs, layout = self.inputs(crossing=False), self.layout
        rows = kept_rows(inputs, batch)
        num_rows = batch.target.numel() if rows is None else rows.numel()
        needed = inputs.needed()
        return Spread(
            num_rows,
            any(needed.values()),
            layout.vocabulary,
            len(chunk_slices(inputs, num_rows, needed["weight"], fused)),
            layout.crossings(
                self.hidden,
                {name: t for name, t in inputs.tensors.items() if needed[name]},
                batch.target.numel(),
            ),
            self.grad_filter > 0,
        )

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inputs = self.inputs()
        options = {name: getattr(self, name) for name in PLAIN_OPTIONS}
        if self.lora is not None:
            options["lora_scale"] = self.lora[2]
        return inputs.tensors, options

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> LinearLogits:
        options = dict(options)
        if "lora_a" in tensors:
            options["lora"] = (tensors["lora_a"], tensors["lora_b"], options.pop("lora_scale"))
        return cls(tensors["hidden"], tensors["weight"], tensors.get("bias"), **options)
