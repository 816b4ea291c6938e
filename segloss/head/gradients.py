"""The gradients of a head's tensors, from blocks of the logits' gradient.

N tokens, R and C rows and columns of a block, V classes, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import GradTerms
from segloss.kernels.products import GradBlock, filtered_products, product


class Gradients:
    """The gradients of a head's tensors, added up over blocks of logits.

    `scale` (0-dim, a power of two) was taken out of the blocks. `disjoint` says that every class
    is met in one block only, so that its slice of dweight is final and needs no float32 sum.
    `dtype` is the weight's own, which its gradient gets.
    """

    def __init__(
        self,
        head: Head,
        needed: dict[str, bool],
        scale: Tensor,
        disjoint: bool,
        dtype: torch.dtype,
    ):
        self.head, self.needed, self.scale, self.disjoint = head, needed, scale, disjoint
        self.dtype = dtype
        double = head.hidden.dtype == torch.float64
        self.accumulate = torch.float64 if double else torch.float32
        self.threshold: Tensor | float = 0.0
        self.sums: dict[str, Tensor] = {}
        self.final: Tensor | None = None  # what dweight is returned in
        self.mass: Tensor | float = 0.0
        self.dropped: Tensor | float = 0.0
        self.rank_one: list[tuple[Tensor, Tensor]] = []  # of dweight, added once at the end

    def add(self, name: str, value: Tensor, at: slice, size: int, whole: bool) -> None:
        """Add the gradient at a slice of the first dimension, `size` long.

        `whole` slices are met in one block only; otherwise a sum over blocks starts in float32.
        """
        if at.stop - at.start == size and name not in self.sums:
            self.sums[name] = value
            return
        if name not in self.sums:
            dtype = self.head.weight.dtype if whole else self.accumulate
            self.sums[name] = value.new_zeros((size, *value.shape[1:]), dtype=dtype)
        if whole:
            self.sums[name][at] = value
            return
        if self.sums[name].dtype != self.accumulate:
            self.sums[name] = self.sums[name].to(self.accumulate)
        self.sums[name][at] += value

    def sum_of(self, name: str, shape: torch.Size) -> Tensor:
        """What the gradient of a whole tensor is added to, in float32."""
        if name not in self.sums:
            self.sums[name] = self.scale.new_zeros(shape, dtype=self.accumulate)
        return self.sums[name]

    def add_weight(self, block: GradBlock, hidden: Tensor, last: bool) -> None:
        """Add what a chunk of rows adds to dweight.

        Where a product is rounded to the gradient's own dtype (bfloat16 on a CPU), the first one is
        put where the gradient will lie, and the last sum too: two chunks need no other memory.
        """
        plus = out = self.sums.get("weight")
        if plus is not None and plus.dtype == self.dtype:
            self.final = plus
        if last and self.final is not None:
            out = self.final
        elif plus is not None and plus.dtype != self.accumulate:
            out = torch.empty_like(plus, dtype=self.accumulate)
        self.sums["weight"] = block.contract(hidden, self.scale, plus, out)

    def block(self, block: GradBlock, rows: slice, classes: slice, filtering: bool) -> None:
        """Contract the gradient of a block of logits (R, C) at `rows` x `classes`."""
        head, scale, needed = self.head.take(rows).columns(classes), self.scale, self.needed
        num_rows, num_classes = self.head.hidden.shape[0], self.head.weight.shape[0]
        hidden_grad = None
        if filtering:
            hidden_grad = self.filtered(block, head, classes)
        elif needed["hidden"]:
            hidden_grad = head.times_weight(block) * scale
        if needed["hidden"]:
            self.add("hidden", hidden_grad, rows, num_rows, False)
        if needed["weight"] and not filtering:
            if self.disjoint:
                weight_grad = block.contract(head.hidden, scale)
                self.add("weight", weight_grad, classes, num_classes, True)
            else:
                self.add_weight(block, head.hidden, rows.stop == num_rows)
        if needed.get("bias"):
            self.add("bias", block.column_sums() * scale, classes, num_classes, self.disjoint)
        if needed.get("lora_b"):
            inner = head.hidden @ head.lora_a.T
            grad = block.contract(inner, scale * head.lora_scale)
            self.add("lora_b", grad, classes, num_classes, self.disjoint)
        if needed.get("lora_a"):
            inner = block.times(head.lora_b).to(head.lora_a.dtype)
            grad = product(inner.T, head.hidden, scale * head.lora_scale).to(self.accumulate)
            rank = slice(0, head.lora_a.shape[0])
            self.add("lora_a", grad, rank, rank.stop, False)

    def filtered(self, block: GradBlock, head: Head, classes: slice) -> Tensor:
        """dhidden (R, D) of a block with its small columns merged; dweight is added."""
        weight_grad = None
        if self.needed["weight"] and self.disjoint:
            weight_grad = torch.zeros_like(head.weight, dtype=self.accumulate)
        elif self.needed["weight"]:
            weight_grad = self.sum_of("weight", head.weight.shape)
        done = filtered_products(
            block.values, head.hidden, head.full_weight(), self.scale, self.threshold, weight_grad
        )
        self.mass, self.dropped = self.mass + done.mass, self.dropped + done.merged
        if weight_grad is not None and self.disjoint:
            weight_grad.addmm_(done.share.T, done.moment)
            self.add("weight", weight_grad, classes, self.head.weight.shape[0], True)
        elif weight_grad is not None:
            self.rank_one.append((done.share, done.moment))
        return done.hidden_grad

    def result(self, inputs: Inputs, rows: Tensor | None) -> tuple:
        """Gradients in the tensors' order, dtypes and shapes."""
        if self.mass:
            inputs.options.report["dropped_mass"] = float(self.dropped / self.mass)
        if self.rank_one:
            share, moment = (torch.cat(part) for part in zip(*self.rank_one, strict=True))
            self.sums["weight"].addmm_(share.T, moment)
        grads: list[Tensor | None] = []
        for name, tensor in inputs.tensors.items():
            total = self.sums.get(name)
            if not self.needed[name]:
                grads.append(None)
            elif total is None:  # no valid token: nothing was ever added
                grads.append(torch.zeros_like(tensor))
            else:
                total = total.to(tensor.dtype)
                if name == "hidden" and rows is not None:
                    full = total.new_zeros(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
                    total = full.index_copy_(0, rows, total)
                grads.append(total.view(tensor.shape))
        return tuple(grads)


def target_gradient(head: Head, terms: GradTerms, log_prob: Tensor) -> Tensor:
    """dL/dlogit at the targets (N,), 0 if ignored, without class sums' and entries' part."""
    z_y = log_prob + terms.row_max + terms.log_sum
    slope = Rows(head.hidden[None], head.softcap, head.scale).slope(z_y)
    p_y = log_prob.exp()
    dz_y = (p_y * (terms.prob_coef + terms.target_coef) + terms.target_rest) * slope
    return torch.where(terms.valid, dz_y, 0)


def factored_block(head: Head, terms: GradTerms, values: Tensor, log_prob: Tensor) -> GradBlock:
    """dlogits from the exponentials that `row_stats` left in `values`."""
    row_scale = torch.where(terms.valid, terms.prob_coef * torch.exp(-terms.log_sum), 0)
    target = torch.where(terms.valid, terms.target, 0)
    return GradBlock(values, row_scale[:, None], target, target_gradient(head, terms, log_prob))
