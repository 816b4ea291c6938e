"""Statistics and gradients of `hidden @ weight.T` a chunk at a time: the logits are never stored.

N tokens (the valid ones, with `compact`), D hidden size, V classes, K classes present, R rows of a
chunk, r rank of a LoRA adapter. One product of the head costs 2 N D V operations; three ways:

    fused      token losses with a scalar value: gradients formed while a chunk's logits are there
    frozen     only hidden needs a gradient: `p @ weight` is stored, any upstream gradient works
    recompute  everything else: backward makes the logits again, a block of the vocabulary at a time
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from segloss.batch import Batch
from segloss.distributed import reduce_over
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows, cdiv
from segloss.kernels.logit_grad import GradTerms, logit_grad
from segloss.kernels.products import GradBlock, filtered_products, product
from segloss.kernels.row_stats import row_stats
from segloss.logits import LinearLogits
from segloss.statistics import (
    Request,
    Sweep,
    TokenStats,
    attach,
    class_ids,
    grad_terms,
    only_once,
    thresholds,
)

ROW_OUTPUTS = ("log_prob", "lse", "entropy", "logit_sum")
ROW_STATS = (*ROW_OUTPUTS, "argmax", "weight_sum", "num_finite")


# ------------------------------------------------------------------------------------- the head


@dataclass
class Head:
    """The matrices of a LinearLogits in the products' dtype, its hidden states compacted."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, D)
    lora_b: Tensor | None  # (V, r)
    lora_scale: float
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, source: LinearLogits, rows: Tensor | None, valid: Tensor | None = None) -> Head:
        """`rows` (N,): the tokens whose hidden states are used, None for all.

        `valid` (N,): which of them count, None for all.
        """
        named, dtype = dict(source.named_tensors()), source.product_dtype
        hidden = named["hidden"].reshape(-1, source.hidden.shape[-1])
        if rows is not None:
            hidden = hidden[rows]
        elif valid is not None and not source.compact:
            hidden = torch.where(valid[:, None], hidden, 0)  # 0 * NaN would reach dweight

        def cast(name: str) -> Tensor | None:
            return named[name].to(dtype) if name in named else None

        return cls(
            hidden.to(dtype),
            named["weight"].to(dtype),
            cast("bias"),
            cast("lora's A"),
            cast("lora's B"),
            source.lora[2] if source.lora is not None else 0.0,
            source.softcap,
            source.scale,
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

    def times_weight(self, block: GradBlock) -> Tensor:
        """`dlogits @ (weight + scaling B A)`, (N, D)."""
        result = block.times(self.weight)
        if self.lora_a is not None:
            inner = block.times(self.lora_b).to(self.lora_a.dtype)
            result = result + self.lora_scale * product(inner, self.lora_a)
        return result


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
        if needed.get("lora's B"):
            inner = head.hidden @ head.lora_a.T
            grad = block.contract(inner, scale * head.lora_scale)
            self.add("lora's B", grad, classes, num_classes, self.disjoint)
        if needed.get("lora's A"):
            inner = block.times(head.lora_b).to(head.lora_a.dtype)
            grad = product(inner.T, head.hidden, scale * head.lora_scale).to(self.accumulate)
            rank = slice(0, head.lora_a.shape[0])
            self.add("lora's A", grad, rank, rank.stop, False)

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

    def result(self, source: LinearLogits, tensors: tuple, rows: Tensor | None) -> tuple:
        """Gradients in the tensors' order, dtypes and shapes."""
        if self.mass:
            source.report["dropped_mass"] = float(self.dropped / self.mass)
        if self.rank_one:
            share, moment = (torch.cat(part) for part in zip(*self.rank_one, strict=True))
            self.sums["weight"].addmm_(share.T, moment)
        grads: list[Tensor | None] = []
        for (name, _), tensor in zip(source.named_tensors(), tensors, strict=True):
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


# ------------------------------------------------------------------------------------ the sweep


def kept_rows(source: LinearLogits, batch: Batch) -> Tensor | None:
    """Tokens whose logits are made at all (N,), None for every one."""
    if not source.compact or (not batch.target.is_cuda and bool(batch.valid.all())):
        return None
    return batch.valid.nonzero()[:, 0]


def compact_batch(batch: Batch, rows: Tensor | None) -> Batch:
    if rows is None:
        return batch
    weight = batch.token_weight
    return replace(
        batch,
        shape=torch.Size([rows.numel()]),
        target=batch.target[rows],
        valid=batch.valid[rows],
        token_weight=None if weight is None else weight[rows],
    )


def spread(values: Tensor | None, rows: Tensor | None, size: int, fill: int = 0) -> Tensor | None:
    """Values of the kept rows back at their tokens, `fill` elsewhere."""
    if values is None or rows is None:
        return values
    return values.new_full((size,), fill).index_copy_(0, rows, values)


def chunk_slices(source: LinearLogits, num_rows: int) -> list[slice]:
    """Row slices of the chunks; an empty one where there are no rows."""
    step = source.chunk_rows(num_rows)
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(1, num_rows), step)]


def rows_within_budget(source: LinearLogits, slices: list[slice]) -> int:
    """Rows of the first chunks, as many as fit `memory_budget` together."""
    row_bytes = source.num_classes * source.product_dtype.itemsize
    return max((s.stop for s in slices if s.stop * row_bytes <= source.memory_budget), default=0)


def sources_needed(source: LinearLogits) -> dict[str, bool]:
    enabled = torch.is_grad_enabled()
    return {name: enabled and tensor.requires_grad for name, tensor in source.named_tensors()}


def is_frozen(needed: dict[str, bool]) -> bool:
    return needed["hidden"] and not any(on for name, on in needed.items() if name != "hidden")


def sweep_linear(source: LinearLogits, batch: Batch, request: Request) -> Sweep:
    """One product of the head, its chunks read while they are there; gradients come later."""
    needed = sources_needed(source)
    frozen = is_frozen(needed)
    num_tokens = batch.target.numel()
    tensors = tuple(tensor for _, tensor in source.named_tensors())
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        rows = kept_rows(source, batch)
        inner = compact_batch(batch, rows)
        head = Head.of(source, rows, inner.valid)
        ids = class_ids(request, batch)
        row_ids = {n: compacted(ids.get(n), rows) for n in ("sample", "own")}
        collected: list = []
        per_class = ClassTotals(source, request, ids, row_ids["sample"], inner)
        qw = []
        num_rows = head.hidden.shape[0]
        slices = chunk_slices(source, num_rows)
        keeps = any(needed.values()) and not frozen
        num_kept = rows_within_budget(source, slices) if keeps else 0
        kept = head.hidden.new_empty(num_kept, source.num_classes)
        out = chunk_buffer(head, [s for s in slices if s.stop > num_kept])
        for here in slices:
            keep = here.stop <= num_kept
            z = head.take(here).logits(kept[here].view(-1) if keep else out)
            panel = per_class.panel(z)
            factored = frozen and not z.data.is_cuda and panel is not z
            stats = row_stats(
                z,
                inner.target[here],
                batch.ignore_index,
                entropy=request.entropy,
                argmax=request.argmax,
                column_sums=request.column_sums,
                column_weight=request.column_weight,
                exp_out=z.data[0] if factored else None,
            )
            collected.append(stats)
            per_class.add(panel, stats, here)
            if factored:
                row_scale = torch.exp(-stats.log_sum)[:, None]
                qw.append(head.times_weight(GradBlock(z.data[0])).to(source.dtype) * row_scale)
            elif frozen:
                off_target = probabilities_off_target(z, stats, inner, here)
                qw.append(head.times_weight(GradBlock(off_target)).to(source.dtype))
        stacked: dict[str, Tensor] = {
            name: torch.cat([getattr(c, name) for c in collected])
            for name in (*ROW_STATS, "row_max", "log_sum")
            if name != "lse" and getattr(collected[0], name) is not None
        }
        stacked["lse"] = stacked["row_max"] + stacked["log_sum"]
        values: dict[str, Any] = {
            name: spread(stacked.get(name), rows, num_tokens, -1 if name == "argmax" else 0)
            for name in ROW_STATS
        }
        sweep = Sweep(**values, **ids)
        per_class.store(sweep)
        if request.rankings:
            tau = thresholds(request, batch, sweep)
            found = panel_candidates(source, head, stacked, sweep.present, row_ids, tau)
            sweep.candidate_row, sweep.candidate_class, sweep.candidate_prob = found
            if rows is not None:
                sweep.candidate_row = rows[sweep.candidate_row]
    names = (*ROW_OUTPUTS, "prob_sum", "candidate_prob", "peak_prob")
    outputs = {name: getattr(sweep, name) for name in names}
    saved = {
        "rows": rows,
        "target": inner.target,
        "valid": inner.valid,
        "row_max": stacked["row_max"],
        "log_sum": stacked["log_sum"],
        "column_weight": request.column_weight,
        "row_weight": inner.token_weight,
        "sample": row_ids["sample"],
        "classes": sweep.classes,
        "present": sweep.present,
        "candidate_row": sweep.candidate_row,
        "candidate_class": sweep.candidate_class,
        "peak_row": renumbered(per_class.peak_row, rows),
        "qw": torch.cat(qw) if qw else None,
        "logits": kept if num_kept else None,
    }  # fmt: skip
    rule = functools.partial(grad_linear, options=without_data(source))
    return replace(sweep, **attach(rule, outputs, saved, tensors))


def renumbered(index: Tensor | None, table: Tensor | None) -> Tensor | None:
    """`table[index]`, -1 where index is -1."""
    if index is None or table is None or table.numel() == 0:
        return index
    return torch.where(index < 0, -1, table[index.clamp(min=0)])


def compacted(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return values if values is None or rows is None else values[rows]


def without_data(source: LinearLogits) -> dict:
    """The source's options: what a rule keeps, so that tensors live in the saved ones only."""
    options = {n: v for n, v in vars(source).items() if n not in ("hidden", "weight", "bias")}
    options["lora"] = None if source.lora is None else source.lora[2]
    options["bias"] = source.bias is not None
    return options


def with_data(options: dict, tensors: tuple) -> LinearLogits:
    """The source of `options` with its tensors back."""
    hidden, weight, *rest = tensors
    bias = rest.pop(0) if options["bias"] else None
    lora = None if options["lora"] is None else (*rest, options["lora"])
    source = object.__new__(LinearLogits)  # checked when it was first made
    for name, value in {**options, "bias": bias, "lora": lora}.items():
        object.__setattr__(source, name, value)
    object.__setattr__(source, "hidden", hidden)
    object.__setattr__(source, "weight", weight)
    return source


def chunk_buffer(head: Head, slices: list[slice]) -> Tensor:
    """One flat buffer for every chunk's logits: fresh pages cost more than the products spare."""
    size = max((s.stop - s.start for s in slices), default=0) * head.weight.shape[0]
    return head.hidden.new_empty(size)


def probabilities_off_target(z: Rows, stats, batch: Batch, here: slice) -> Tensor:
    """p with 0 at the target, times the transform's slope, over the logits (R, V).

    The target's share goes through float32: rounded to half precision it would not cancel against
    the target's own gradient as p -> 1.
    """
    one = torch.ones_like(stats.row_max)
    terms = GradTerms(
        batch.valid[here], batch.target[here], stats.row_max, stats.log_sum, one, -one, one * 0
    )
    return logit_grad(z, terms, z.data[0])


class ClassTotals:
    """Class statistics of a sweep, added up chunk by chunk."""

    def __init__(self, source, request: Request, ids: dict, sample: Tensor | None, batch: Batch):
        self.request, self.ids, self.sample, self.batch = request, ids, sample, batch
        self.num_samples = ids.get("num_samples", 1)
        self.prob_sum = self.peak = self.peak_row = None
        classes = ids.get("classes")
        width = source.num_classes if classes is None else classes.numel()
        new = functools.partial(torch.zeros, dtype=source.dtype, device=source.device)
        if request.prob_sums:
            self.prob_sum = new(self.num_samples, width)
        if request.peaks:
            self.peak = new(self.num_samples, source.num_classes).fill_(-torch.inf)
            self.peak_row = torch.full_like(self.peak, -1, dtype=torch.int64)

    def panel(self, z: Rows) -> Rows | None:
        """The logits these statistics read: z, a copy of its listed columns, or nothing."""
        classes = self.ids.get("classes")
        if self.peak is not None or (self.prob_sum is not None and classes is None):
            return z
        if self.prob_sum is None:
            return None
        return replace(z, data=z.data[:, :, classes])

    def add(self, panel: Rows | None, stats, here: slice) -> None:
        if panel is None:
            return
        at = (panel, stats.row_max, stats.log_sum)
        if self.prob_sum is not None:
            weight = None if self.batch.token_weight is None else self.batch.token_weight[here]
            # beside peaks the panel is all of z; otherwise its columns are the classes themselves
            classes = self.ids.get("classes") if self.peak is not None else None
            self.prob_sum += class_sums(*at, classes, self.sample[here], self.num_samples, weight)
        if self.peak is not None:
            peak, peak_row = class_peaks(*at, self.sample[here], self.num_samples)
            higher = (peak > self.peak) | peak.isnan()
            self.peak = torch.where(higher, peak, self.peak)
            self.peak_row = torch.where(higher, peak_row + here.start, self.peak_row)

    def store(self, sweep: Sweep) -> None:
        sweep.prob_sum = self.prob_sum
        if self.peak is not None:
            sweep.peak_prob = self.peak.exp()
            finite = (self.peak.amax(0) != -torch.inf).long()
            sweep.finite = reduce_over(finite, self.batch.group, "max") > 0


def panel_slices(source: LinearLogits, num_rows: int, width: int) -> list[slice]:
    """Row slices of a panel of `width` columns, under the bytes of a chunk."""
    step = max(1, source.chunk_rows(num_rows) * source.num_classes // max(1, width))
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(1, num_rows), step)]


def panel_candidates(source, head: Head, stats: dict, present, row_ids, tau) -> tuple:
    """Lovász candidates from the present columns alone."""
    panel = head.columns(present)
    columns = torch.arange(present.numel(), device=present.device)
    found = []
    slices = panel_slices(source, head.hidden.shape[0], present.numel())
    out = chunk_buffer(panel, slices)
    for here in slices:
        z = panel.take(here).logits(out)
        part = candidates(
            z,
            stats["row_max"][here],
            stats["log_sum"][here],
            columns,
            row_ids["sample"][here],
            row_ids["own"][here],
            tau,
        )
        found.append((part.row + here.start, part.class_index, part.prob))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


# ------------------------------------------------------------------------------------- backward


def grad_linear(tensors, saved, grads, needed, *, options: dict) -> tuple:
    """Gradients of hidden, weight and the rest, from those of the statistics."""
    source = with_data(options, tensors)
    needed = dict(zip([name for name, _ in source.named_tensors()], needed, strict=True))
    rows = saved.get("rows")
    head = Head.of(source, rows, saved["valid"])
    if rows is not None:
        grads = {name: grad[rows] if name in ROW_OUTPUTS else grad for name, grad in grads.items()}
        saved = dict(saved)
        for name in ROW_OUTPUTS:
            if name in saved:
                saved[name] = saved[name][rows]
        place = torch.zeros(int(rows[-1]) + 1 if rows.numel() else 0, dtype=torch.int64,
                            device=rows.device)  # fmt: skip
        place[rows] = torch.arange(rows.numel(), device=rows.device)
        for name in ("candidate_row", "peak_row"):
            if name in saved:
                saved[name] = renumbered(saved[name], place)
    terms = grad_terms(saved, grads)
    subtract_dots(source, head, terms)
    scale = rescale(terms)
    plain = terms.entropy_grad is None and terms.sum_grad is None
    covers_all = terms.class_grad is not None and terms.columns is None
    total = Gradients(head, needed, scale, disjoint=True, dtype=source.weight.dtype)
    if "qw" in saved and plain and not covers_all:
        total.sums["hidden"] = frozen_grad(source, head, terms, saved) * scale
    else:
        total.threshold = source.filter_limit
        recompute_grad(source, head, terms, total, saved.get("logits"))
    return total.result(source, tensors, rows)


def rescale(terms: GradTerms) -> Tensor:
    """Take a power of two out of all terms, so that the largest is about 1: it goes back in after
    the products. Folded into half-precision dlogits, 1 / N would flush most of them to 0."""
    parts = ("prob_coef", "target_coef", "entropy_grad", "sum_grad", "class_grad", "entry_grad")
    present = [p for p in (getattr(terms, name) for name in parts) if p is not None and p.numel()]
    largest = torch.stack([p.abs().amax() for p in present] or [terms.prob_coef.sum()]).amax()
    usable = (largest > 0) & (largest < torch.inf)
    scale = torch.exp2(torch.ceil(torch.log2(torch.where(usable, largest, 1))))
    for name in (*parts, "target_rest"):
        value = getattr(terms, name)
        if value is not None:
            setattr(terms, name, value / scale)
    return scale


def subtract_dots(source: LinearLogits, head: Head, terms: GradTerms) -> None:
    """The class sums' part of `s_i`, from a panel of their columns."""
    if terms.class_grad is None or terms.class_grad.numel() == 0:
        return
    panel = head if terms.columns is None else head.columns(terms.columns)
    dots = torch.zeros_like(terms.prob_coef)
    slices = panel_slices(source, head.hidden.shape[0], panel.weight.shape[0])
    out = chunk_buffer(panel, slices)
    for here in slices:
        z = panel.take(here).logits(out)
        at = (z, terms.row_max[here], terms.log_sum[here])
        dots[here] = row_dots(*at, None, terms.sample[here], terms.class_grad)
    if terms.row_weight is not None:
        dots = dots * terms.row_weight
    terms.prob_coef = terms.prob_coef - dots


def frozen_grad(source: LinearLogits, head: Head, terms: GradTerms, saved: dict) -> Tensor:
    """dhidden (N, D) without another product of the whole head:

    `prob_coef * qw + dz_y * weight[y] + (p_S (A + g)) @ weight[S]`.
    """
    dz_y = target_gradient(head, terms, saved["log_prob"])
    prob_coef = torch.where(terms.valid, terms.prob_coef, 0)
    result = saved["qw"].to(prob_coef.dtype) * prob_coef[:, None]
    own = torch.where(terms.valid, terms.target, 0).clamp(0, head.weight.shape[0] - 1)
    for here in panel_slices(source, own.numel(), head.hidden.shape[1]):
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
    slices = panel_slices(source, own.numel(), columns.numel())
    out = chunk_buffer(panel, slices)
    for here in slices:
        z = panel.take(here).logits(out)
        part = row_slice(only, here)
        dlogits = logit_grad(z, part, torch.empty_like(z.data[0]))
        result[here] += panel.times_weight(GradBlock(dlogits))
    return result


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


def row_slice(terms: GradTerms, here: slice) -> GradTerms:
    """The terms of some rows."""
    per_row = (
        "valid", "target", "row_max", "log_sum", "prob_coef", "target_coef", "target_rest",
        "entropy", "entropy_grad", "sum_grad", "sample", "row_weight",
    )  # fmt: skip
    part = {name: getattr(terms, name) for name in per_row}
    part = {name: None if value is None else value[here] for name, value in part.items()}
    if terms.entry_row is not None:
        bounds = torch.tensor([here.start, here.stop], device=terms.entry_row.device)
        entries = slice(*torch.searchsorted(terms.entry_row, bounds).tolist())
        part["entry_row"] = terms.entry_row[entries] - here.start
        part["entry_class"] = terms.entry_class[entries]
        part["entry_grad"] = terms.entry_grad[entries]
    return replace(terms, **part)


def column_slice(terms: GradTerms, first: int, last: int) -> GradTerms:
    """The terms of a block of the vocabulary; a target outside it becomes -1."""
    inside = (terms.target >= first) & (terms.target < last)
    part: dict = {"target": torch.where(inside, terms.target - first, -1)}
    if terms.column_weight is not None:
        part["column_weight"] = terms.column_weight[first:last]
    entry_class = terms.entry_class
    if terms.class_grad is not None and terms.columns is None:
        part["class_grad"] = terms.class_grad[:, first:last].contiguous()
    elif terms.class_grad is not None:
        bounds = torch.tensor([first, last], device=terms.columns.device)
        here = slice(*torch.searchsorted(terms.columns, bounds).tolist())
        part["columns"] = terms.columns[here] - first
        part["class_grad"] = terms.class_grad[:, here].contiguous()
    if entry_class is not None:
        column = entry_class if terms.columns is None else terms.columns[entry_class]
        chosen = ((column >= first) & (column < last)).nonzero()[:, 0]
        shift = first if terms.columns is None else here.start
        part["entry_class"] = entry_class[chosen] - shift
        part["entry_row"] = terms.entry_row[chosen]
        part["entry_grad"] = terms.entry_grad[chosen]
    return replace(terms, **part)


def recompute_grad(
    source: LinearLogits, head: Head, terms: GradTerms, total: Gradients, kept: Tensor | None
) -> None:
    """A block of the vocabulary at a time, all rows at once: each slice of dweight is contracted
    over every row by one product and needs no float32 copy of the whole."""
    num_rows, num_classes = head.hidden.shape[0], head.weight.shape[0]
    width = max(1, source.chunk_rows(num_rows) * num_classes // max(1, num_rows))
    width = num_classes if width >= num_classes else max(1, width // 128 * 128 or width)
    out = head.hidden.new_empty(num_rows * min(width, num_classes))
    every = slice(0, num_rows)
    rewrites = terms.class_grad is not None or terms.entry_grad is not None
    for first in range(0, num_classes, width):
        classes = slice(first, min(first + width, num_classes))
        z = recomputed_logits(head.columns(classes), kept, classes, out)
        part = column_slice(terms, classes.start, classes.stop)
        # the later passes of a Triton kernel read the logits again
        dlogits = torch.empty_like(z.data[0]) if rewrites and z.data.is_cuda else z.data[0]
        logit_grad(z, part, dlogits)
        total.block(GradBlock(dlogits), every, classes, source.grad_filter > 0)


def recomputed_logits(head: Head, kept: Tensor | None, classes: slice, out: Tensor) -> Rows:
    """Logits (N, C) of a vocabulary block, the rows kept from forward copied."""
    if kept is None:
        return head.logits(out)
    width = classes.stop - classes.start
    z = out[: head.hidden.shape[0] * width].view(-1, width)
    z[: kept.shape[0]] = kept[:, classes]
    if kept.shape[0] < z.shape[0]:
        head.take(slice(kept.shape[0], None)).logits(z[kept.shape[0] :].view(-1))
    return Rows.of(z, head.softcap, head.scale)


# ------------------------------------------------------------------------ gradients in forward


@dataclass
class FusedPlan:
    """A sum of token losses whose every factor is known before the logits are."""

    terms: list  # of (coefficient tensor (), TokenLoss)
    request: Request
    denominator: Tensor  # of the first term, ()


def fused_loss(source: LinearLogits, batch: Batch, plan: FusedPlan) -> tuple[Tensor, TokenStats]:
    """(loss (), detached per-token statistics (N,)), three products or fewer in all."""
    tensors = tuple(tensor for _, tensor in source.named_tensors())
    with torch.autocast(source.device.type, enabled=False):
        loss, *stats = _FusedTokenLoss.apply(without_data(source), batch, plan, *tensors)
    return loss, TokenStats(*stats)


def fused_forward(source: LinearLogits, batch: Batch, plan: FusedPlan, needed: dict):
    """The loss, the row statistics, and the gradients of the tensors."""
    rows = kept_rows(source, batch)
    inner = compact_batch(batch, rows)
    head = Head.of(source, rows, inner.valid)
    weights = inner.weights()
    scale = power_of_two(plan, weights)
    total = Gradients(head, needed, scale, disjoint=False, dtype=source.weight.dtype)
    total.threshold = source.filter_limit / (plan.denominator * scale)
    num_rows = head.hidden.shape[0]
    loss = torch.zeros((), dtype=source.dtype, device=source.device)
    request = plan.request
    collected = []
    slices = chunk_slices(source, num_rows)
    out = chunk_buffer(head, slices)
    whole = slice(0, head.weight.shape[0])
    filtering = source.grad_filter > 0
    # smoothing adds to every column and a filter reads dlogits itself; on a GPU the exponentials
    # would take a second read anyway, and the target's part a synchronisation
    factored = not (filtering or request.column_sums or out.is_cuda)
    for here in slices:
        z = head.take(here).logits(out)
        target, valid = inner.target[here], inner.valid[here]
        stats = row_stats(
            z,
            target,
            batch.ignore_index,
            entropy=request.entropy,
            argmax=request.argmax,
            column_sums=request.column_sums,
            column_weight=request.column_weight,
            exp_out=z.data[0] if factored else None,
        )
        leaves = {
            "log_prob": stats.log_prob,
            "lse": stats.row_max + stats.log_sum,
            "logit_sum": stats.logit_sum,
        }
        leaves = {n: v.requires_grad_() for n, v in leaves.items() if v is not None}
        rest = {n: getattr(stats, n) for n in ("weight_sum", "num_finite")}
        token_stats = TokenStats(**leaves, **rest)
        with torch.enable_grad():
            part = chunk_value(plan, token_stats, target, valid, weights[here])
            grads = torch.autograd.grad(part, list(leaves.values()), allow_unused=True)
        loss += part.detach()
        named = {n: g / scale for n, g in zip(leaves, grads, strict=True) if g is not None}
        saved = {
            "valid": valid,
            "target": target,
            "row_max": stats.row_max,
            "log_sum": stats.log_sum,
            "log_prob": stats.log_prob.detach(),
            "column_weight": request.column_weight,
        }
        terms = grad_terms(saved, named)
        if factored:
            block = factored_block(head, terms, z.data[0], saved["log_prob"])
        else:
            block = GradBlock(logit_grad(z, terms, z.data[0]))
        total.block(block, here, whole, filtering)
        collected.append(
            (stats.log_prob.detach(), leaves["lse"].detach(), stats.entropy, stats.argmax)
        )
    grads = total.result(source, tuple(t for _, t in source.named_tensors()), rows)
    num_tokens = batch.target.numel()
    columns = [
        None if column[0] is None else torch.cat(column) for column in zip(*collected, strict=True)
    ]
    fills = (0, 0, 0, -1)
    per_token = [spread(c, rows, num_tokens, f) for c, f in zip(columns, fills, strict=True)]
    return loss, per_token, grads


def chunk_value(plan: FusedPlan, stats: TokenStats, target, valid, weights) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for coefficient, loss in plan.terms:
        value = torch.where(valid, loss.token_values(stats, target, valid), 0)
        total = total + coefficient * (value * weights).sum()
    return total


def power_of_two(plan: FusedPlan, weights: Tensor) -> Tensor:
    """About the largest factor of a token's gradient, as a power of two (exact to divide by)."""
    largest = sum(coefficient.abs() for coefficient, _ in plan.terms)
    if weights.numel():
        largest = largest * weights.amax()
    usable = (largest > 0) & (largest < torch.inf)
    return torch.exp2(torch.ceil(torch.log2(torch.where(usable, largest, 1))))


class _FusedTokenLoss(torch.autograd.Function):
    """Gradients are formed in forward and handed over, not copied, by the first backward; a second
    backward through the same graph makes them again."""

    @staticmethod
    def forward(ctx, options, batch, plan, *tensors):
        source = with_data(options, tensors)
        names = [name for name, _ in source.named_tensors()]
        needed = dict(zip(names, ctx.needs_input_grad[3:], strict=True))
        loss, stats, grads = fused_forward(source, batch, plan, needed)
        ctx.again = options, batch, plan, needed
        ctx.grads = grads
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return (loss, *stats)

    @staticmethod
    def backward(ctx, grad, *_):
        tensors = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            options, batch, plan, needed = ctx.again
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                _, _, grads = fused_forward(with_data(options, tensors), batch, plan, needed)
        if grad.is_cuda or grad != 1:  # a look at a GPU's value would synchronise
            with torch.no_grad():
                grads = tuple(None if g is None else g.mul_(grad) for g in grads)
        return (None, None, None, *only_once(grads))


# -------------------------------------------------------------------------------------- explain


def explain(source: LinearLogits, loss, target: Tensor) -> str:
    """Plan of `loss(source, target)` and its backward in words and bytes."""
    from segloss.batch import make_batch

    batch = make_batch(source, target, ignore_index=loss.ignore_index)
    rows = kept_rows(source, batch)
    num_rows = batch.target.numel() if rows is None else rows.numel()
    needed = sources_needed(source)
    num_classes, width = source.weight.shape
    itemsize = source.product_dtype.itemsize
    chunk = source.chunk_rows(num_rows) if num_rows else 0
    chunks = cdiv(num_rows, chunk) if num_rows else 0
    one = 2 * num_rows * width * num_classes
    mode, products, extra = plan_of(source, loss, needed, num_rows, chunks)
    peak = chunk * num_classes * itemsize + sum(size for _, size in extra)
    lines = [
        f"tokens     {num_rows} of {batch.target.numel()} (ignored ones left out)",
        f"mode       {mode}",
        f"products   {products:.3g} x 2NDV = {products * one:.3g} FLOP",
        f"chunks     {chunks} of {chunk} rows, "
        f"{megabytes(chunk * num_classes * itemsize)} of logits",
        *(f"{name:<10} {megabytes(size)}" for name, size in extra),
        f"peak       {megabytes(peak)} above inputs and gradients "
        f"(all logits would take {megabytes(num_rows * num_classes * itemsize)})",
    ]
    return "\n".join(lines)


def plan_of(source, loss, needed: dict, num_rows: int, chunks: int) -> tuple[str, float, list]:
    """(mode, products of the head, [(what, bytes)] beyond a chunk's logits)."""
    from segloss.losses.base import fusible

    num_classes, width = source.weight.shape
    itemsize = source.product_dtype.itemsize
    extra: list[tuple[str, int]] = []
    if not any(needed.values()):
        return "no gradient: statistics only", 1, extra
    if fusible(loss):
        if needed["weight"] and (size := dweight_bytes(source, chunks)):
            extra.append(("dweight", size))
        products = 1 + needed["hidden"] + needed["weight"]
        return "fused: gradients formed in forward", products, extra
    if is_frozen(needed):
        extra.append(("p @ weight", num_rows * width * itemsize))
        return "frozen head: p @ weight stored in forward", 2, extra
    extra.append(("dhidden", 4 * num_rows * width))
    num_kept = rows_within_budget(source, chunk_slices(source, num_rows))
    if num_kept:
        extra.append(("kept", num_kept * num_classes * itemsize))
    products = 2 + needed["hidden"] + needed["weight"] - num_kept / max(1, num_rows)
    return "recompute: logits made again in backward", products, extra


def dweight_bytes(source: LinearLogits, chunks: int) -> int:
    """What adding up dweight over chunks takes beside the gradient itself."""
    on_gpu, product, own = source.weight.is_cuda, source.product_dtype, source.weight.dtype
    two_fit = not on_gpu and product == own == torch.bfloat16
    if not source.grad_filter and chunks <= (2 if two_fit else 1):
        return 0
    wide = max(4, product.itemsize)
    # the sum, unless it is the gradient; a GPU makes what a chunk adds to it as large again
    return ((own.itemsize < wide) + on_gpu) * wide * source.weight.numel()


def megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
