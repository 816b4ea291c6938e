"""Gradients of logits as tests of kernels put them together: term by term, and in float64."""

from __future__ import annotations

import torch
from kernel_helpers import eighths, samples, some_columns

from segloss.kernels.logit_grad import GradTerms, logit_grad

# The terms that compile to code of their own. Entries are the Lovász candidates.
TERMS = {
    "rows": {},
    "entropy": {"entropy": True},
    "smoothing": {"smoothing": True},
    "weighted smoothing": {"smoothing": True, "weighted": True},
    "all classes": {"classes": "all"},
    "listed classes": {"classes": 40},
    "weighted rows": {"classes": "all", "row_weight": True},
    "per sample": {"classes": 40, "num_samples": 4, "row_weight": True},
    "all per sample": {"classes": "all", "num_samples": 4},
    "entries": {"entries": 300},
    "entries of listed": {"classes": 300, "entries": 300},
}
EVERYTHING = {"entropy": True, "smoothing": True, "weighted": True, "row_weight": True}
TERMS["everything"] = EVERYTHING | {"classes": "all", "num_samples": 4, "entries": 20}
TERMS["everything listed"] = EVERYTHING | {"classes": 300, "num_samples": 4, "entries": 20}


class Problem:
    """Terms of a gradient, as the kernel takes them and as the whole matrix they make in float64.

    What belongs to an ignored row is NaN, and must not get through.
    """

    def __init__(
        self,
        ex,
        entropy=False,
        smoothing=False,
        weighted=False,
        classes=None,
        num_samples=1,
        row_weight=False,
        entries=0,
    ):
        n, v = ex.shape
        self.ex, self.seed = ex, 10
        is_target = torch.arange(v) == ex.target[:, None]
        finite = ex.z > -torch.inf
        log_p = torch.where(finite, ex.log_p, ex.lse[:, None] * 0)  # 0 log 0 is 0
        p = torch.where(finite, ex.log_p.exp(), ex.lse[:, None] * 0)

        u, v_coef = self.per_row(), self.per_row()
        row_max, log_sum = ex.row_sums()
        p_target = (p * is_target).sum(-1)
        self.terms = GradTerms(
            valid=ex.valid,
            target=ex.target,
            row_max=row_max,
            log_sum=log_sum,
            prob_coef=self.stored(u),
            target_coef=self.stored(v_coef),
            target_rest=self.stored(v_coef * (1 - p_target)),
        )
        coef = u[:, None].expand(n, v)
        rest = is_target * v_coef[:, None]
        if entropy:
            height, h = -(p * log_p).sum(-1), self.per_row()
            coef = coef - h[:, None] * (log_p + height[:, None])
            self.terms.entropy, self.terms.entropy_grad = self.stored(height), self.stored(h)
        if smoothing:
            t = self.per_row()
            w = eighths(v, seed=3) if weighted else torch.ones(v, dtype=torch.float64)
            rest = rest + finite * t[:, None] * w
            self.terms.sum_grad = self.stored(t)
            self.terms.column_weight = w.float() if weighted else None
        columns = torch.arange(v)
        if classes is not None:
            if classes != "all":
                columns = self.terms.columns = some_columns(v, min(classes, v))
            sample = self.terms.sample = samples(ex, num_samples)
            class_grad = eighths(num_samples, columns.numel(), seed=4)
            a = torch.zeros(n, v, dtype=torch.float64)
            a[:, columns] = class_grad[sample]
            if row_weight:
                weight = self.per_row().abs()
                a, self.terms.row_weight = a * weight[:, None], self.stored(weight)
            coef = coef + a
            self.terms.class_grad = class_grad.to(ex.dtype)
        if entries:
            row, k, g = self.pick(columns, entries)
            coef = coef.index_put((row, columns[k]), g, accumulate=True)
            self.terms.entry_row, self.terms.entry_class = row, k
            self.terms.entry_grad = g.to(ex.dtype)
        slope = torch.full_like(ex.z, ex.rows.scale)
        if ex.rows.softcap is not None:
            slope = slope * (1 - (ex.z / ex.rows.softcap).clamp(min=-1) ** 2)
        dz = (p * coef + rest) * slope
        dz = torch.where(ex.lse.isnan()[:, None], torch.nan, dz)
        self.truth = torch.where(ex.valid[:, None], dz, 0)

    def per_row(self):
        self.seed += 1
        return eighths(self.ex.shape[0], seed=self.seed)

    def stored(self, values):
        return values.to(self.ex.dtype).where(self.ex.valid, torch.nan)

    def pick(self, columns, num):
        """Entries of valid rows: by row, distinct, each row's own class and the last among them."""
        ex = self.ex
        wanted = torch.zeros(ex.shape[0], columns.numel(), dtype=torch.bool)
        generator = torch.Generator().manual_seed(num)
        wanted.view(-1)[torch.randperm(wanted.numel(), generator=generator)[:num]] = True
        wanted |= columns == ex.target[:, None]
        wanted[:, -1] = True
        row, k = (wanted & ex.valid[:, None]).nonzero().unbind(1)
        return row, k, eighths(row.numel(), seed=5)


def run(ex, terms):
    dlogits = torch.full(ex.shape, torch.nan, dtype=ex.rows.data.dtype)
    assert logit_grad(ex.rows, terms, dlogits) is dlogits
    return dlogits
