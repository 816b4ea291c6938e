"""What a sweep of a head reads of single columns: class sums, peaks, Lovász candidates.

R rows of a chunk, K classes, B samples, V classes in all.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import chunk_buffer, panel_slices
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import GradTerms
from segloss.sweep.batch import Batch
from segloss.sweep.classes import store_totals
from segloss.sweep.request import Request, Sweep


class ClassTotals:
    """Class statistics of a sweep, added up chunk by chunk."""

    def __init__(
        self, inputs: Inputs, request: Request, ids: dict, sample: Tensor | None, batch: Batch
    ):
        self.request, self.ids, self.sample, self.batch = request, ids, sample, batch
        self.num_samples = ids.get("num_samples", 1)
        self.prob_sum = self.peak = self.peak_row = None
        self.sharding = inputs.sharding
        # those of the looked-at classes that are here; None for all
        self.columns = self.sharding.columns(ids.get("classes"))
        width = inputs.num_classes if self.columns is None else self.columns.numel()
        new = functools.partial(torch.zeros, dtype=inputs.dtype, device=inputs.device)
        if request.prob_sums:
            self.prob_sum = new(self.num_samples, width)
        if request.peaks:
            self.peak = new(self.num_samples, inputs.num_classes).fill_(-torch.inf)
            self.peak_row = torch.full_like(self.peak, -1, dtype=torch.int64)

    def panel(self, z: Rows) -> Rows | None:
        """The logits these statistics read: z, a copy of its listed columns, or nothing."""
        if self.peak is not None or (self.prob_sum is not None and self.columns is None):
            return z
        if self.prob_sum is None:
            return None
        return replace(z, data=z.data[:, :, self.columns])

    def add(self, panel: Rows | None, stats, here: slice) -> None:
        if panel is None:
            return
        at = (panel, stats.row_max, stats.log_sum)
        if self.prob_sum is not None:
            weight = None if self.batch.token_weight is None else self.batch.token_weight[here]
            # beside peaks the panel is all of z; otherwise its columns are the classes themselves
            columns = self.columns if self.peak is not None else None
            self.prob_sum += class_sums(*at, columns, self.sample[here], self.num_samples, weight)
        if self.peak is not None:
            peak, peak_row = class_peaks(*at, self.sample[here], self.num_samples)
            higher = (peak > self.peak) | peak.isnan()
            self.peak = torch.where(higher, peak, self.peak)
            self.peak_row = torch.where(higher, peak_row + here.start, self.peak_row)

    def store(self, sweep: Sweep) -> None:
        store_totals(sweep, self.batch, self.prob_sum, self.peak)
        if self.peak is not None:
            self.peak_row = self.sharding.spread(self.peak_row, -1)


def panel_candidates(inputs: Inputs, head: Head, stats: dict, present, row_ids, tau) -> tuple:
    """Lovász candidates from the present columns alone."""
    sharding = inputs.sharding
    at = sharding.place(present)
    listed = sharding.columns(present)
    own, tau = sharding.within(row_ids["own"], at), tau[:, at]
    panel = head.columns(listed)
    columns = torch.arange(listed.numel(), device=present.device)
    found = []
    slices = panel_slices(inputs, head.hidden.shape[0], listed.numel())
    out = chunk_buffer(panel, slices)
    for here in slices:
        z = panel.take(here).logits(out)
        part = candidates(
            z,
            stats["row_max"][here],
            stats["log_sum"][here],
            columns,
            row_ids["sample"][here],
            own[here],
            tau,
        )
        found.append((part.row + here.start, part.class_index + at.start, part.prob))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def subtract_dots(inputs: Inputs, head: Head, terms: GradTerms) -> None:
    """The class sums' part of `s_i`, from a panel of their columns."""
    if terms.class_grad is None or terms.class_grad.numel() == 0:
        return
    panel = head if terms.columns is None else head.columns(terms.columns)
    dots = torch.zeros_like(terms.prob_coef)
    slices = panel_slices(inputs, head.hidden.shape[0], panel.weight.shape[0])
    out = chunk_buffer(panel, slices)
    for here in slices:
        z = panel.take(here).logits(out)
        at = (z, terms.row_max[here], terms.log_sum[here])
        dots[here] = row_dots(*at, None, terms.sample[here], terms.class_grad)
    if terms.row_weight is not None:
        dots = dots * terms.row_weight
    terms.prob_coef = terms.prob_coef - dots
