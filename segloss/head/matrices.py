"""The matrices of a head, and the logits of some of its rows and columns.

N tokens (the kept ones), D hidden size, V classes, r rank of a LoRA adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.kernels.common import Rows
from segloss.kernels.products import GradBlock, product


@dataclass
class Head:
    """The matrices of a head in the products' dtype, its hidden states compacted."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    lora_a: Tensor | None = None  # (r, D)
    lora_b: Tensor | None = None  # (V, r)
    lora_scale: float = 0.0
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, inputs: Inputs, rows: Tensor | None, valid: Tensor | None = None) -> Head:
        """`rows` (N,): the tokens whose hidden states are used, None for all.

        `valid` (N,): which of them count, None for all.
        """
        options = inputs.options
        hidden = inputs.hidden.reshape(-1, inputs.hidden.shape[-1])
        if rows is not None:
            hidden = hidden[rows]
        elif valid is not None and not options.compact:
            hidden = torch.where(valid[:, None], hidden, 0)  # 0 * NaN would reach dweight
        others = ("weight", "bias", "lora_a", "lora_b")
        given = {n: t.to(options.product_dtype) for n, t in inputs.tensors.items() if n in others}
        return cls(
            hidden.to(options.product_dtype),
            lora_scale=options.lora_scale,
            softcap=options.softcap,
            scale=options.scale,
            **given,
        )

    def columns(self, classes: Tensor | slice) -> Head:
        """The head of some classes only."""
        return replace(
            self,
            weight=self.weight[classes],
            bias=None if self.bias is None else self.bias[classes],
            lora_b=None if self.lora_b is None else self.lora_b[classes],
        )

    def take(self, rows: Tensor | slice) -> Head:
        return replace(self, hidden=self.hidden[rows])

    def logits(self, out: Tensor | None = None) -> Rows:
        """Rows of `hidden @ weight.T` and what belongs to it; `out` (>= N * V,) holds them."""
        hidden, num_classes = self.hidden, self.weight.shape[0]
        if out is not None:
            out = out[: hidden.shape[0] * num_classes].view(hidden.shape[0], num_classes)
        z = torch.mm(hidden, self.weight.T, out=out)
        if self.bias is not None:
            z += self.bias
        if self.lora_a is not None:
            z.addmm_(hidden @ self.lora_a.T, self.lora_b.T, alpha=self.lora_scale)
        return Rows.of(z, self.softcap, self.scale)

    def full_weight(self) -> Tensor:
        """`weight + scaling B A`, (V, D)."""
        if self.lora_a is None:
            return self.weight
        return torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.lora_scale)

    def times_lora_b(self, block: GradBlock) -> Tensor | None:
        """`dlogits @ B` (N, r), which both dhidden and dA need."""
        return None if self.lora_a is None else block.times(self.lora_b).to(self.lora_a.dtype)

    def times_weight(
        self,
        block: GradBlock,
        inner: Tensor | None = None,
        plus: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:
        """`dlogits @ (weight + scaling B A) + plus`, (N, D); `inner` from `times_lora_b`."""
        result = block.times(self.weight, plus, rounded=rounded and self.lora_a is None)
        if self.lora_a is not None:
            inner = self.times_lora_b(block) if inner is None else inner
            result = result + self.lora_scale * product(inner, self.lora_a)
        return result
