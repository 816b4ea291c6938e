"""Offsets beyond 2**31 elements. The far tensors take address space, but next to no memory: only
the pages of the rows that a kernel touches come into being."""

from dataclasses import fields

import pytest
import torch
import triton
import triton.language as tl
from grad_helpers import TERMS, Problem, run
from kernel_helpers import example, on, some_columns
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from segloss.kernels import candidates as candidates_family
from segloss.kernels import class_stats, logit_grad, row_stats
from segloss.kernels.common import KernelRows, Rows, row_offset

V = 4099
N = 2**19 + 1  # the last row starts at 524288 * 4099 > 2**31
LAST = N - 1


@triton.jit
def row_offset_kernel(out, rows):
    row = tl.program_id(0)
    tl.store(out + row, row_offset(rows, row))


STRIDES = [(2**31 - 1, 2**30), (2**33, 2**31), (0, 2**40), (-(2**32), 1)]


@pytest.mark.parametrize("stride_b, stride_t", STRIDES)
def test_a_row_s_offset_is_of_64_bits(stride_b, stride_t):
    """Program ids and most strides are of 32 bits; their product must not be."""
    out = torch.empty(9, dtype=torch.int64)
    rows = KernelRows(out, 3, V, stride_b, stride_t, 1, softcap=None, scale=None, dtype=None)
    row_offset_kernel[(9,)](out, rows)
    assert out.tolist() == [b * stride_b + t * stride_t for b in range(3) for t in range(3)]


class LastRow:
    """A kernel of one program per row, of which only the last row's runs."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        if grid[0] != N:
            return self.kernel[grid]
        program_id = InterpreterBuilder.create_get_program_id

        def of_last_row(builder, axis):
            index = program_id(builder, axis)
            return TensorHandle(index.data + LAST, index.dtype) if axis == 0 else index

        def launch(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(InterpreterBuilder, "create_get_program_id", of_last_row)
                self.kernel[(1, *grid[1:])](*args, **options)

        return launch


@pytest.fixture(autouse=True)
def last_row_only(monkeypatch):
    for module, *names in (
        (row_stats, "row_stats_kernel"),
        (class_stats, "row_dots_kernel"),
        (candidates_family, "candidates_kernel"),
        (logit_grad, "grad_rows_kernel", "grad_entries_kernel"),
    ):
        for name in names:
            monkeypatch.setattr(module, name, LastRow(getattr(module, name)))


@pytest.fixture(scope="module")
def near():
    """The last row by itself."""
    return example(1, V, torch.float16)


@pytest.fixture(scope="module")
def far(near):
    """The same row, after 2**31 logits that nobody wrote."""
    logits = torch.empty(N, V, dtype=torch.float16)
    logits[LAST] = near.rows.data[0, 0]
    return Rows.of(logits)


def per_row(value, other=0):
    """(N,) with `value` (1,) at the last row."""
    return torch.cat([value.new_full((LAST,), other), value])


def both(function, near, far, *args, **options):
    """What a kernel makes of the row by itself and in the last place; args (1,) are per row."""
    sums = near.row_sums()
    alone = on("triton", function, near.rows, *sums, *args, **options)
    args = [per_row(x, -1) if getattr(x, "shape", None) == (1,) else x for x in args]
    return alone, on("triton", function, far, *map(per_row, sums), *args, **options)


ROW = torch.zeros(1, dtype=torch.int64)  # sample 0, class 0


def test_row_statistics(near, far):
    alone = on("triton", row_stats.row_stats, near.rows, near.target, -100, entropy=True)
    target = per_row(near.target, -100)
    last = on("triton", row_stats.row_stats, far, target, -100, entropy=True)
    for a, b in zip(last, alone, strict=True):
        assert a is None or torch.equal(a[LAST:], b)


def test_class_sums(near, far):
    alone, last = both(class_stats.class_sums, near, far, some_columns(V, 5), ROW, 1)
    assert alone.any() and torch.equal(last, alone)


def test_row_dots(near, far):
    class_grad = torch.ones(1, V)
    alone, last = both(class_stats.row_dots, near, far, None, ROW, class_grad)
    assert alone.all() and torch.equal(last[LAST:], alone)


def test_class_peaks(near, far):
    alone, last = both(class_stats.class_peaks, near, far, ROW, 1)
    assert torch.equal(last[0], alone[0])
    assert torch.equal(last[1], torch.where(alone[1] == 0, LAST, -1)) and (alone[1] == 0).any()


def test_candidates(near, far, monkeypatch):
    # the rows whose programs do not run have no candidates
    monkeypatch.setattr(
        Rows, "new", lambda rows, *shape, dtype=None: torch.zeros(shape, dtype=dtype or rows.dtype)
    )
    tau = torch.full((1, V), 1e-5)
    columns = torch.arange(V)
    alone, last = both(candidates_family.candidates, near, far, columns, ROW, ROW, tau)
    assert alone.row.numel() and (last.row == LAST).all()
    assert torch.equal(last.class_index, alone.class_index) and torch.equal(last.prob, alone.prob)


@pytest.mark.parametrize("name", ["everything", "everything listed"])
def test_gradient(name, near, far):
    """The gradient of the logits is as far from its first element as the logits are."""
    terms = Problem(near, **TERMS[name]).terms
    alone = on("triton", run, near, terms)
    for field in fields(terms):
        value = getattr(terms, field.name)
        if value is not None and value.shape == (1,):
            setattr(terms, field.name, per_row(value))
    terms.entry_row = terms.entry_row + LAST
    dlogits = torch.empty(N, V, dtype=torch.float16)
    on("triton", logit_grad.logit_grad, far, terms, dlogits)
    assert alone.any() and torch.equal(dlogits[LAST], alone[0])
