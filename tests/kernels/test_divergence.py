"""Two matrices in step: the kernels against their twins and against the formulas in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grad_helpers import TERMS, Problem
from kernel_helpers import (
    assert_close,
    eighths,
    every_dtype,
    every_layout,
    every_shape,
    every_transform,
    example,
    on,
    on_both,
)
from torch import Tensor

from segloss.kernels.common import Rows
from segloss.kernels.divergence import (
    KINDS,
    Pair,
    divergence,
    divergence_grad,
    mixture,
    normalisers,
)
from segloss.kernels.logit_grad import logit_grad

every_kind = pytest.mark.parametrize("kind", KINDS)
BETA = 0.3


class Both:
    """A student's rows and a teacher's with `extra` more columns, and what is true of them."""

    def __init__(self, ex, kind: str, extra: int = 5, dtype=None, weighted: bool = False):
        n, v = ex.shape
        self.ex, self.kind, width = ex, kind, min(v, v + extra)
        other = example(n, v + extra, dtype or ex.rows.data.dtype, scale=0.7)
        self.weight = eighths(v, seed=2).abs().to(ex.dtype) if weighted else None
        self.teacher, w = other.rows, other.z[:, :width]
        if kind == "targets":
            y = other.z.softmax(-1).to(other.rows.data.dtype)
            self.teacher, w = Rows.of(y), y.double()[:, :width]
            w = w if self.weight is None else w * self.weight.double()[:width]
        self.z = ex.z[:, :width].clone().requires_grad_()
        self.value = torch.where(ex.valid, self.divergence(self.z, w), 0)

    def divergence(self, z: Tensor, w: Tensor) -> Tensor:
        log_p = z - z.logsumexp(-1, keepdim=True)
        if self.kind == "lse":
            return z.logsumexp(-1)
        if self.kind == "targets":
            return -torch.where(w == 0, 0, w * log_p).sum(-1)
        log_q = w - w.logsumexp(-1, keepdim=True)

        def kl(log_a, log_b):
            some = ~(log_a.exp() == 0)  # 0 log 0 is 0, and so is its gradient
            return (log_a.exp() * torch.where(some, log_a - log_b, 0)).sum(-1)

        if self.kind == "forward":
            return kl(log_q, log_p)
        if self.kind == "reverse":
            return kl(log_p, log_q)
        shares = torch.tensor([BETA, 1 - BETA], dtype=torch.float64).log()
        dead = (log_p == -torch.inf) & (log_q == -torch.inf)
        of_q, of_p = (torch.where(dead, 0, x) for x in (log_q, log_p))
        log_m = torch.logaddexp(of_q + shares[0], of_p + shares[1])
        return BETA * kl(log_q, log_m) + (1 - BETA) * kl(log_p, log_m)

    def pair(self, data: Tensor | None = None) -> Pair:
        rows = self.ex.rows if data is None else replace(self.ex.rows, data=data)
        teacher = None if self.kind == "lse" else self.teacher
        return Pair(rows, teacher, self.ex.valid, self.kind, BETA, self.weight)

    def upstream(self) -> Tensor:
        return eighths(self.ex.shape[0], seed=3)

    def grad(self, plain: Tensor | float = 0.0) -> Tensor:
        """dlogits of the raw logits, 0 in ignored rows; `plain` (N, V) is added."""
        total = (self.value * self.upstream()).sum()
        (dz,) = torch.autograd.grad(total, self.z)
        z = self.z.detach()
        if self.ex.rows.softcap is not None:
            dz = dz * (1 - (z / self.ex.rows.softcap).clamp(min=-1) ** 2)
        full = torch.zeros(self.ex.shape, dtype=torch.float64)
        full[:, : z.shape[1]] = torch.where(self.ex.valid[:, None], dz * self.ex.rows.scale, 0)
        return full + plain


def run(both: Both) -> tuple[Tensor, Tensor]:
    """(values, dlogits)"""
    pair = divergence(both.pair())
    pair.grad = both.upstream().to(both.ex.dtype)
    n, v = both.ex.shape
    out = torch.full((n, v), torch.nan, dtype=both.ex.rows.data.dtype)
    return pair.numbers.value, divergence_grad(both.ex.rows, [pair], out)


def check(ex, kind: str, **options) -> None:
    both = Both(ex, kind, **options)
    expected, grad = both.value.detach(), both.grad()
    finite = expected.isfinite()  # what is infinite, or has no distribution, has no gradient
    for value, dlogits in on_both(run, both):
        # both normalisers and a mean of differences of up to 30
        assert_close(value, expected, ex.dtype, size=60.0)
        assert_close(dlogits[finite], grad[finite], ex.dtype, size=60.0 * ex.rows.scale)


@every_shape
@every_kind
def test_every_shape(n, v, kind, memory):
    ex = example(n, v)
    memory.forbid_ignored(ex)
    check(ex, kind)


@every_layout
@every_kind
def test_every_layout(kind, layout, memory):
    ex = example(33, 507, layout=layout)
    memory.forbid_ignored(ex)
    check(ex, kind, weighted=kind == "targets")


@every_dtype
@every_kind
def test_every_dtype(kind, dtype):
    check(example(7, 507, dtype), kind)


@pytest.mark.parametrize("theirs", [torch.float64, torch.bfloat16], ids=str)
@every_kind
def test_a_teacher_in_another_dtype(kind, theirs):
    check(example(7, 507), kind, dtype=theirs)
    check(example(7, 507, torch.float64), kind, dtype=theirs)


@every_transform
@every_kind
def test_every_transform(kind, transform):
    for dtype in (torch.float64, torch.bfloat16):
        check(example(7, 507, dtype, **transform), kind)


@pytest.mark.parametrize("kind", ["forward", "targets"])
def test_a_teacher_with_fewer_columns(kind):
    """The last column is the likeliest of every other row: what is left out matters."""
    check(example(7, 507), kind, extra=-6, weighted=kind == "targets")


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_columns_that_one_alone_lacks(kind):
    """q = 0 where p is not, in every row; where p = 0 and q is not, forward KL is infinite."""
    ex = example(7, 507)
    both = Both(ex, kind, extra=0)
    both.teacher = replace(both.teacher, data=both.teacher.data.clone())
    both.teacher.data[..., 10] = -torch.inf
    w = both.teacher.data[0].double() * 0.7
    both.value = torch.where(ex.valid, both.divergence(both.z, w), 0)
    expected = both.grad()
    for value, dlogits in on_both(run, both):
        assert_close(value, both.value.detach(), size=60.0)
        assert_close(dlogits, expected, size=60.0)
    both.ex.rows.data[..., 11] = -torch.inf
    for value, _ in on_both(run, both):
        infinite = value[ex.valid & (w[:, 11] > -torch.inf)].isinf()
        assert infinite.all() if kind == "forward" else not infinite.any()


def test_a_known_normaliser_changes_nothing():
    both = Both(example(33, 507), "forward", extra=0)
    known = tuple(torch.where(both.ex.valid, x, 0) for x in both.ex.row_sums())
    for kind in ("forward", "reverse", "targets", "lse"):
        both.kind = kind
        plain, given = divergence(both.pair()), divergence(both.pair(), known)
        assert_close(given.numbers.value, plain.numbers.value, size=60.0)


def of_columns(pair: Pair, first: int, last: int) -> Pair:
    """A part of both matrices' columns, as another rank may have the rest."""
    rows = (replace(r, data=r.data[:, :, first:last]) for r in (pair.student, pair.teacher))
    return Pair(*rows, pair.valid, pair.kind, pair.beta)


def test_the_two_passes_of_jsd_apart():
    """The second of columns that lie apart, given the normalisers of all; one part is empty."""
    both = Both(example(33, 507), "jsd", extra=0)

    def run_apart():
        whole, first = divergence(both.pair()), normalisers(both.pair())
        names = ("student_max", "student_sum", "teacher_max", "teacher_sum")
        at = {name: getattr(first.numbers, name) for name in names}
        for name in names:
            assert_close(at[name], getattr(whole.numbers, name), size=60.0)
        parts = [of_columns(both.pair(), *ends) for ends in ((0, 200), (200, 507), (507, 507))]
        for part in parts:
            zero = torch.zeros_like(whole.numbers.value)
            part.numbers = whole.numbers._replace(value=zero.clone(), center=zero.clone(), **at)
            mixture(part)
        sums = [sum(getattr(p.numbers, n) for p in parts) for n in ("value", "center")]
        return sums, whole.numbers.center

    for (value, center), true_center in on_both(run_apart):
        assert_close(value, both.value.detach(), size=60.0)
        assert_close(center, true_center, size=60.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_column_has_no_share(kind):
    both = Both(example(7, 507), kind, extra=0)
    for student, teacher in on_both(lambda: empty_sums(both)):
        assert (student == -torch.inf).all()
        assert (teacher == (0 if kind == "targets" else -torch.inf)).all()


def empty_sums(both: Both) -> tuple[Tensor, Tensor]:
    pair = both.pair()
    pair.student = replace(pair.student, data=pair.student.data[:, :, :0])
    numbers = divergence(pair).numbers
    return numbers.student_sum, numbers.teacher_sum


@pytest.mark.parametrize("terms", [None, "everything", "everything listed"])
@pytest.mark.parametrize("in_place", [False, True])
def test_several_terms_in_one_gradient(terms, in_place):
    """Two divergences and the statistics' own terms, over the logits or beside them."""
    ex = example(9, 507)
    first, second = Both(ex, "forward"), Both(ex, "reverse", extra=0)
    problem = None if terms is None else Problem(ex, **TERMS[terms])
    expected = first.grad() + second.grad() + (0 if terms is None else problem.truth)

    def run_both():
        data = ex.rows.data.clone()
        rows = replace(ex.rows, data=data)
        pairs = [divergence(both.pair(data)) for both in (first, second)]
        for pair in pairs:
            pair.grad = first.upstream().float()
        out = data[0] if in_place else torch.empty_like(data[0])
        return divergence_grad(rows, pairs, out, None if terms is None else problem.terms)

    for dlogits in on_both(run_both):
        assert_close(dlogits, expected, size=120.0)


def test_the_gradient_may_lie_over_the_logits():
    both = Both(example(9, 507, torch.bfloat16), "forward")

    def run_over():
        data = both.ex.rows.data.clone()
        pair = divergence(both.pair(data))
        pair.grad = both.upstream().float()
        return divergence_grad(pair.student, [pair], data[0])

    expected = both.grad()
    for dlogits in on_both(run_over):
        assert_close(dlogits, expected, torch.bfloat16, size=4.0)


def test_listed_logits_are_entries():
    """Entries with a gradient of their own logit, some of them no entry at all (-1)."""
    ex = example(7, 507)
    problem = Problem(ex, entries=9)
    rest = eighths(problem.terms.entry_row.numel(), seed=5)
    terms = replace(problem.terms, entry_rest=rest.float())
    expected = problem.truth.clone()
    expected[terms.entry_row, terms.entry_class] += rest

    def run_entries(given):
        return logit_grad(ex.rows, given, torch.empty(ex.shape))

    kernel, twin = on_both(run_entries, terms)
    assert_close(kernel, expected, size=4.0)
    assert_close(twin, expected, size=4.0)
    nothing = {"entry_row": 0, "entry_class": -1, "entry_grad": torch.nan, "entry_rest": torch.nan}
    more = {n: torch.cat([torch.tensor([x]), getattr(terms, n)]) for n, x in nothing.items()}
    assert torch.equal(on("triton", run_entries, replace(terms, **more)), kernel)
