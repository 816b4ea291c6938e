"""A head that is not trained: two products for any loss and any upstream gradient.

Forward stores `qw = p @ weight`, p without the target's column; backward scales its rows and adds
the target's and the listed columns' own parts.

N tokens, R rows of a chunk, D hidden size, V classes, K of them listed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import chunk_buffer, panel_slices
from segloss.kernels.common import Rows
from segloss.kernels.divergence import divergence_grad
from segloss.kernels.logit_grad import GradTerms, logit_grad
from segloss.kernels.products import GradBlock, product
from segloss.sweep.batch import Batch
from segloss.sweep.beside import LISTED, Reading
from segloss.sweep.row_sum import target_gradient
from segloss.sweep.terms import row_slices


class Frozen:
    """What forward stores for backward."""

    def __init__(self, inputs: Inputs, head: Head, slices: list[slice]):
        self.dtype = inputs.dtype
        self.out = chunk_buffer(head, slices)
        self.qw = head.hidden.new_empty(head.hidden.shape, dtype=self.dtype)
        self.pair_parts: list[Tensor] = []
        self.factored = False

    def logits(self, head: Head, here: slice) -> Rows:
        return head.take(here).logits(self.out)

    def exp_out(self, z: Rows, panel: Rows | None) -> Tensor | None:
        """Where the pass over the logits leaves their exponentials: in their own memory, if
        nothing reads them again (a Triton kernel would take a second read of the logits)."""
        self.factored = not z.data.is_cuda and panel is not z
        return z.data[0] if self.factored else None

    def keep(self, head: Head, z: Rows, stats, batch: Batch, here: slice) -> None:
        if self.factored:
            row_scale = stats.exp_scale[:, None]
            torch.mul(head.times_weight(GradBlock(z.data[0])), row_scale, out=self.qw[here])
        else:
            target = batch.sharding.own(batch.target[here])
            off_target = probabilities_off_target(z, stats, batch.valid[here], target)
            self.qw[here] = head.times_weight(GradBlock(off_target))

    def keep_pairs(self, head: Head, z: Rows, reading: Reading) -> None:
        """The gradient of each divergence, for an upstream gradient of 1, times the weight."""
        if not reading.pairs:
            return
        out, made = torch.empty_like(z.data[0]), []
        for pair in reading.pairs:
            pair.grad = torch.ones_like(pair.numbers.value)
            divergence_grad(z, [pair], out)
            made.append(head.times_weight(GradBlock(out)).to(self.dtype))
        self.pair_parts.append(torch.stack(made))

    def saved(self) -> dict[str, Any]:
        pairs = torch.cat(self.pair_parts, 1) if self.pair_parts else None
        return {"qw": self.qw, "pair_weight": pairs}

    def left(self) -> None:
        return None


def probabilities_off_target(z: Rows, stats, valid: Tensor, target: Tensor) -> Tensor:
    """p with 0 at the target, times the transform's slope, over the logits (R, V).

    The target's share goes through float32: rounded to half precision it would not cancel against
    the target's own gradient as p -> 1.
    """
    one = torch.ones_like(stats.row_max)
    terms = GradTerms(valid, target, stats.row_max, stats.log_sum, one, -one, one * 0)
    return logit_grad(z, terms, z.data[0])


def hidden_grad(inputs: Inputs, head: Head, terms: GradTerms, saved: dict) -> Tensor:
    """dhidden (N, D) without another product of the whole head:

    `prob_coef * qw + dz_y * weight[y] + (p_S (A + g)) @ weight[S]`.
    """
    if head.weight.shape[0] == 0:  # other ranks have all classes
        return torch.zeros_like(saved["qw"])
    like = Rows(head.hidden[None], head.softcap, head.scale)
    dz_y = target_gradient(like, terms, saved["log_prob"])
    prob_coef = torch.where(terms.valid, terms.prob_coef, 0)
    result = saved["qw"].to(prob_coef.dtype) * prob_coef[:, None]
    own = torch.where(terms.valid, terms.target, 0).clamp(0, head.weight.shape[0] - 1)
    for here in panel_slices(inputs, own.numel(), head.hidden.shape[1]):
        own_weight = head.weight[own[here]].to(result.dtype)
        if head.lora_b is not None:
            own_weight += head.lora_scale * product(head.lora_b[own[here]], head.lora_a)
        result[here].addcmul_(own_weight, dz_y[here, None])
    if terms.class_grad is None and terms.entry_grad is None:
        return result
    columns = terms.columns
    if columns is None:  # entries alone: only their columns matter
        columns, terms.entry_class = torch.unique(terms.entry_class, return_inverse=True)
    if columns.numel() == 0:
        return result
    panel = head.columns(columns)
    zero = torch.zeros_like(terms.prob_coef)
    only = replace(
        terms, prob_coef=zero, target_coef=zero, target_rest=zero, columns=None,
        target=torch.full_like(terms.target, -1),
    )  # fmt: skip
    slices = panel_slices(inputs, own.numel(), columns.numel())
    out = chunk_buffer(panel, slices)
    for here, part in zip(slices, row_slices(only, slices), strict=True):
        z = panel.take(here).logits(out)
        dlogits = logit_grad(z, part, z.data[0])
        result[here] += panel.times_weight(GradBlock(dlogits))
    return result


def add_listed(inputs: Inputs, head: Head, saved: dict, rest: Tensor, hidden: Tensor) -> None:
    """Add `sum_m rest_im weight[id_im]` to hidden (N, D): the own logits of the listed classes
    that are here."""
    if head.weight.shape[0] == 0:  # other ranks have all classes
        return
    own = inputs.sharding.own(saved["ids"])
    ids = own.clamp(min=0)
    z = saved[LISTED] + saved["row_max"][:, None] + saved["log_sum"][:, None]
    rest = rest * Rows(head.hidden[None], head.softcap, head.scale).slope(z)
    rest = torch.where(own >= 0, rest, 0)
    for here in panel_slices(inputs, ids.shape[0], ids.shape[1] * hidden.shape[1]):
        own = head.weight[ids[here]].to(hidden.dtype)
        if head.lora_b is not None:
            own += head.lora_scale * (head.lora_b[ids[here]] @ head.lora_a).to(hidden.dtype)
        hidden[here] += torch.bmm(rest[here, None], own)[:, 0]


def add_pairs(saved: dict, grad: Tensor, hidden: Tensor) -> None:
    """Add the divergences' part to hidden (N, D), of the gradients (N, S) of their values."""
    grad = torch.where(saved["valid"][:, None], grad, 0)
    for column, pair_weight in zip(grad.unbind(1), saved["pair_weight"], strict=True):
        hidden.addcmul_(pair_weight, column[:, None])
