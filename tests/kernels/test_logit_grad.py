"""The one backward: its three passes against the twin and against the formula in float64."""

from dataclasses import replace

import pytest
import torch
from grad_helpers import TERMS, Problem, run
from kernel_helpers import (
    assert_close,
    every_dtype,
    every_layout,
    every_shape,
    every_transform,
    example,
    on_both,
    samples,
)

from segloss.kernels.logit_grad import GradTerms, logit_grad

every_term = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


def check(ex, **options):
    problem = Problem(ex, **options)
    kernel, twin = on_both(run, ex, problem.terms)
    # a coefficient is a sum of up to four numbers of up to 4, and a target's is not multiplied by p
    size = 4.0 * ex.rows.scale
    assert_close(kernel, problem.truth, ex.dtype, size)
    assert_close(twin, problem.truth, ex.dtype, size)
    assert_close(kernel, twin, ex.dtype, size)
    return kernel


@every_shape
def test_every_shape(n, v, memory):
    """The rows pass, the listed columns and the entries on top."""
    ex = example(n, v, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, classes=5, entries=9 if n else 0)


@every_term
def test_every_term(terms):
    """More listed columns than a block of 256, and more entries."""
    check(example(9, 507, poisoned=True), **terms)


@pytest.mark.parametrize("name", ["everything", "everything listed"])
def test_more_columns_than_a_tile(name):
    check(example(7, 4099, poisoned=True), **TERMS[name])


@every_layout
@pytest.mark.parametrize("name", ["everything", "everything listed"])
def test_every_layout(name, layout, memory):
    ex = example(33, 507, layout=layout, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, **TERMS[name])


@every_dtype
@pytest.mark.parametrize("name", ["everything", "everything listed"])
def test_every_dtype(name, dtype):
    assert check(example(7, 507, dtype, poisoned=True), **TERMS[name]).dtype == dtype


@every_transform
@pytest.mark.parametrize("name", ["rows", "everything", "everything listed"])
def test_every_transform(name, transform):
    for dtype in (torch.float64, torch.bfloat16):
        check(example(7, 507, dtype, poisoned=True, **transform), **TERMS[name])


def test_a_confident_target_keeps_its_digits():
    """p = 1 - 1e-7: `v - v p` would cancel to nothing in float32, `v (1 - p)` does not."""
    logits = torch.zeros(1, 64)
    logits[0, 5] = 20.0
    ex = example(1, 64)
    ex = replace(ex, rows=replace(ex.rows, data=logits[None]), z=logits.double())
    ex = replace(ex, target=torch.tensor([5]))
    p = ex.log_p.exp()[0, 5]
    one = torch.ones(1)
    terms = GradTerms(ex.valid, ex.target, *ex.row_sums(), -one, one, one * (1 - p).float())
    for dlogits in on_both(run, ex, terms):
        assert_close(dlogits[0, 5], 1 - p, size=0.0)


@every_term
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_may_lie_over_the_logits(dtype, terms):
    problem = Problem(example(9, 507, dtype), **terms)

    def run_over(ex, terms):
        data = ex.rows.data.clone()
        return logit_grad(replace(ex.rows, data=data), terms, data[0])

    for dlogits in on_both(run_over, problem.ex, problem.terms):
        assert_close(dlogits, problem.truth, dtype, size=4.0)


@pytest.mark.parametrize("wrong", [-1, 507, 2**40])
def test_a_target_elsewhere_adds_nothing(wrong):
    """-1 where a block of the vocabulary does not hold the target; anything on a GPU."""
    ex = example(7, 507)
    expected = Problem(replace(ex, target=torch.where(ex.valid, 508, -100)), **TERMS["everything"])
    terms = replace(expected.terms, target=torch.where(ex.valid, wrong, -100))
    for dlogits in on_both(run, ex, terms):
        assert_close(dlogits, expected.truth, size=4.0)


def test_no_listed_column_and_no_entry():
    ex = example(7, 507)
    expected = Problem(ex)
    nothing = torch.zeros(0, dtype=torch.int64)
    terms = replace(
        expected.terms,
        sample=samples(ex, 1),
        class_grad=torch.zeros(1, 0),
        columns=nothing,
        entry_row=nothing,
        entry_class=nothing,
        entry_grad=torch.zeros(0),
    )
    for dlogits in on_both(run, ex, terms):
        assert_close(dlogits, expected.truth, size=4.0)
