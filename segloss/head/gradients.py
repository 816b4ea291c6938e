"""The gradients of a head's tensors, from blocks of the logits' gradient.

N tokens, R and C rows and columns of a block, V classes, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.kernels.common import Rows, widest
from segloss.kernels.logit_grad import GradTerms
from segloss.kernels.products import GradBlock, filtered_products, product, times, unscaled
from segloss.sweep.row_sum import row_scale, target_gradient


class Gradients:
    """The gradients of a head's tensors, added up over blocks of logits.

    A block is some rows of all classes, or some classes of some rows. What one product makes final
    is rounded by it and written once; sums are float32. `groups` says over how many groups of rows
    dweight is added up: two of them need no memory but its own.

    `held`: an upstream factor is still to come, so that float16 gradients stay in float32, where
    1 / N does not make most of them 0. `scale` was taken out of the blocks and is put back here.
    """

    def __init__(
        self,
        inputs: Inputs,
        head: Head,
        needed: dict[str, bool],
        groups: int,
        scale: Tensor | float = 1.0,
        held: bool = False,
    ):
        self.inputs, self.head, self.needed, self.groups = inputs, head, needed, groups
        self.scale, self.held = scale, held
        self.filtering = inputs.options.grad_filter > 0
        self.dtypes = {name: tensor.dtype for name, tensor in inputs.tensors.items()}
        if held:
            wide = torch.bfloat16  # beside float16 it makes float32, beside any other nothing
            self.dtypes = {n: torch.promote_types(d, wide) for n, d in self.dtypes.items()}
        double = head.hidden.dtype == torch.float64
        self.accumulate = torch.float64 if double else torch.float32
        self.threshold: Tensor | float = 0.0
        self.hidden: dict[int, Tensor] = {}  # rows of dhidden, without `scale`, by the first
        self.sums: dict[str, Tensor] = {}  # of the other tensors
        self.first_rows = 0  # of the group of rows that dweight began with
        self.lies_over = False  # whether dweight is written over these rows' dlogits
        self.final: Tensor | None = None  # what dweight is returned in
        self.mass: Tensor | float = 0.0
        self.dropped: Tensor | float = 0.0
        self.rank_one: list[tuple[Tensor, Tensor]] = []  # of dweight, added once at the end

    def block(self, block: GradBlock, rows: slice, classes: slice) -> None:
        """Contract the gradient of a block of logits (R, C) at `rows` x `classes`."""
        if classes.start == classes.stop:  # other ranks have them all
            return
        head, needed, inner = self.head.take(rows).columns(classes), self.needed, None
        if needed.get("lora_a") or (needed["hidden"] and not self.filtering):
            inner = head.times_lora_b(block)
        if self.filtering:
            self.filtered(block, head, rows, classes)
        elif needed["hidden"]:
            self.add_hidden(block, head, inner, rows, classes)
        if needed.get("bias"):
            self.add("bias", block.column_sums(), classes)
        if needed.get("lora_b"):
            low = head.hidden @ head.lora_a.T
            self.add("lora_b", block.contract(low, head.lora_scale), classes)
        if needed.get("lora_a"):
            grad = product(inner.T, head.hidden, head.lora_scale)
            self.add("lora_a", grad, slice(0, head.lora_a.shape[0]))
        if needed["weight"] and not self.filtering:  # last: it may lie over the block
            self.add_weight(block, head.hidden, rows, classes)

    def covers_all(self, classes: slice) -> bool:
        return classes.stop - classes.start == self.head.weight.shape[0]

    def add(self, name: str, value: Tensor, at: slice) -> None:
        """Add to a small gradient at a slice of its first dimension, in float32."""
        if name not in self.sums:
            shape = self.inputs.tensors[name].shape
            self.sums[name] = value.new_zeros(shape, dtype=self.accumulate)
        self.sums[name][at] += times(value, self.scale)

    def weight_memory(self) -> Tensor:
        """dweight (V, D) before there is any of it: dlogits may lie there, those of a block of
        classes in the place of these classes."""
        memory = torch.empty_like(self.head.weight, memory_format=torch.contiguous_format)
        self.sums["weight"], self.lies_over = memory, True
        return memory

    def add_hidden(self, block, head: Head, inner, rows: slice, classes: slice) -> None:
        """With all classes a row of dhidden is final, otherwise a sum over blocks of them."""
        dtype = self.dtypes["hidden"]
        if not self.covers_all(classes):
            part = head.times_weight(block, inner, self.hidden.get(rows.start))
            self.hidden[rows.start] = part.to(self.accumulate)
            return
        part = head.times_weight(block, inner, rounded=dtype == head.hidden.dtype)
        self.hidden[rows.start] = part.to(dtype) if unscaled(self.scale) else part

    def add_weight(self, block: GradBlock, hidden: Tensor, rows: slice, classes: slice) -> None:
        """Classes of dweight, or all of them.

        Of two groups of rows the first product lies where the gradient will, and the sum too. More
        are added up in float32; the last sum is put where the first product was, if it can be.
        """
        dtype, plus = self.dtypes["weight"], self.sums.get("weight")
        if plus is None:
            self.first_rows = rows.start
        if not self.covers_all(classes):
            if plus is None:
                plus = self.sums["weight"] = torch.empty_like(self.head.weight, dtype=dtype)
            out, first = plus[classes], rows.start == self.first_rows
            if first and self.lies_over:
                out.copy_(block.contract(hidden, self.scale))
            else:
                block.contract(hidden, self.scale, None if first else out, out)
            return
        if plus is None:
            final = self.groups <= 2 or dtype == self.accumulate
            out = torch.empty_like(self.head.weight, dtype=dtype) if final else None
            self.sums["weight"] = block.contract(hidden, self.scale, None, out)
            return
        out = plus
        if plus.dtype == dtype:
            self.final = plus
        last = self.groups <= 2 or rows.stop == self.head.hidden.shape[0]
        if last and self.final is not None:
            out = self.final
        elif plus.dtype != self.accumulate:
            out = torch.empty_like(plus, dtype=self.accumulate)
        self.sums["weight"] = block.contract(hidden, self.scale, plus, out)

    def filtered(self, block: GradBlock, head: Head, rows: slice, classes: slice) -> None:
        """dhidden and dweight of a block with its small columns merged."""
        into, whole = None, self.covers_all(classes)
        if self.needed["weight"]:
            into = self.sums.get("weight") if whole else None
            if into is None:
                into = torch.zeros_like(head.weight, dtype=self.accumulate)
        done = filtered_products(
            block.values, head.hidden, head.full_weight(), 1.0, self.threshold, into
        )
        self.mass, self.dropped = self.mass + done.mass, self.dropped + done.merged
        if self.needed["hidden"]:
            plus = self.hidden.get(rows.start)
            self.hidden[rows.start] = (
                done.hidden_grad if plus is None else plus.add_(done.hidden_grad)
            )
        if into is None:
            return
        if whole:
            self.sums["weight"] = into
            self.rank_one.append((done.share, done.moment))
            return
        if "weight" not in self.sums:
            self.first_rows = rows.start
            dtype = self.dtypes["weight"]
            self.sums["weight"] = torch.empty_like(self.head.weight, dtype=dtype)
        into = times(into.addmm_(done.share.T, done.moment), self.scale)
        slot = self.sums["weight"][classes]
        slot.copy_(into if rows.start == self.first_rows else into + slot)

    def result(self, rows: Tensor | None) -> tuple:
        """Gradients in the tensors' order and shapes; in their dtypes unless they are `held`, where
        a float32 sum stays one until the last factor is known."""
        if self.filtering:
            self.report()
        if self.rank_one:
            share, moment = (torch.cat(part) for part in zip(*self.rank_one, strict=True))
            whole = self.sums["weight"].addmm_(share.T, moment)
            if not unscaled(self.scale):
                whole *= self.scale
        if self.hidden:
            dtype = self.dtypes["hidden"]
            parts = [times(self.hidden[i], self.scale).to(dtype) for i in sorted(self.hidden)]
            self.sums["hidden"] = parts[0] if len(parts) == 1 else torch.cat(parts)
        grads: list[Tensor | None] = []
        for name, tensor in self.inputs.tensors.items():
            total = self.sums.get(name)
            if not self.needed[name]:
                grads.append(None)
            elif total is None:  # no valid token: nothing was ever added
                grads.append(torch.zeros_like(tensor))
            else:
                total = total if self.held else total.to(tensor.dtype)
                if name == "hidden" and rows is not None:
                    full = total.new_zeros(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
                    total = full.index_copy_(0, rows, total)
                grads.append(total.view(tensor.shape))
        return tuple(grads)

    def report(self) -> None:
        """Say what share of |dlogits| was merged, over all ranks' columns."""
        options, hidden = self.inputs.options, self.head.hidden
        both = hidden.new_zeros(2, dtype=widest(hidden.device))
        both[0], both[1] = self.mass, self.dropped
        mass, dropped = self.inputs.sharding.sum(both).tolist()
        if mass:
            options.report["dropped_mass"] = dropped / mass


def factored_block(z: Rows, terms: GradTerms, log_prob: Tensor, exp_scale: Tensor) -> GradBlock:
    """dlogits from the exponentials that `row_stats` left over the logits z."""
    target = torch.where(terms.valid & (terms.target >= 0), terms.target, 0)
    own = target_gradient(z, terms, log_prob)
    return GradBlock(z.data[0], row_scale(terms, exp_scale), target, own)
