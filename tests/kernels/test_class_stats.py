"""The class kernels (sums, their way back to rows, maxima) against twins and float64."""

import pytest
import torch
from kernel_helpers import (
    assert_close,
    eighths,
    every_dtype,
    every_layout,
    every_shape,
    every_transform,
    example,
    on_both,
    samples,
    some_columns,
)

from segloss.kernels.class_stats import class_peaks, class_sums, row_dots

# Fewer columns than a block, and more than one: blocks are 64 columns for sums and 512 for dots.
LISTS = {"all": None, "few": 5, "many": 600}


def columns_of(ex, k):
    return None if k is None else some_columns(ex.shape[1], min(k, ex.shape[1]))


def probabilities(ex, columns):
    p = ex.log_p.exp()
    return p if columns is None else p[:, columns]


def never_read(values, ex):
    """Per-row numbers of ignored rows, which must not get through."""
    return values.to(ex.dtype).where(ex.valid, torch.nan)


def check(function, truth, ex, *args, size=None):
    kernel, twin = on_both(function, ex.rows, *ex.row_sums(), *args)
    assert_close(kernel, truth, size=size)
    assert_close(twin, truth, size=size)
    assert_close(kernel, twin, size=size)


# --------------------------------------------------------------------------------------- sums


def check_sums(ex, columns, num_samples, row_weight=None):
    sample = samples(ex, num_samples)
    p = probabilities(ex, columns)
    if row_weight is not None:
        p = p * row_weight[:, None]
        row_weight = never_read(row_weight, ex)
    p = p[ex.valid]
    truth = p.new_zeros(num_samples, p.shape[1]).index_add(0, sample[ex.valid], p)
    # from one row to 33 weights of up to 2: rounding is that of the sizes, whatever cancels
    check(class_sums, truth, ex, columns, sample, num_samples, row_weight, size=1.0)


@every_shape
def test_sums_every_shape(n, v, memory):
    ex = example(n, v)
    memory.forbid_ignored(ex)
    check_sums(ex, None, 1)


@every_layout
@pytest.mark.parametrize("k", LISTS.values(), ids=LISTS)
def test_sums_every_layout(layout, k, memory):
    ex = example(33, 1031, layout=layout)
    memory.forbid_ignored(ex)
    check_sums(ex, columns_of(ex, k), 4, eighths(33, seed=2))


@every_dtype
def test_sums_every_dtype(dtype):
    check_sums(example(33, 507, dtype), None, 1)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_every_transform(transform, dtype):
    check_sums(example(7, 507, dtype, **transform), None, 1)


@pytest.mark.parametrize("k", LISTS.values(), ids=LISTS)
def test_sums_of_nan_and_of_nothing(k):
    """NaN reaches the sums of its own sample only; without rows, samples or columns there are
    zeros of the right shape, or nothing."""
    ex = example(7, 507, poisoned=True)
    columns, sample = columns_of(ex, k), samples(ex, 4)
    for sums in on_both(class_sums, ex.rows, *ex.row_sums(), columns, sample, 4):
        assert torch.equal(sums.isnan().all(1), torch.arange(4) == 3)
        assert torch.equal(sums.isnan().any(1), torch.arange(4) == 3)
    for some_samples, some in ((4, columns), (0, columns), (1, torch.zeros(0, dtype=torch.int64))):
        nobody = torch.full_like(sample, -1)
        for sums in on_both(class_sums, ex.rows, *ex.row_sums(), some, nobody, some_samples):
            assert sums.shape == (some_samples, 507 if some is None else some.numel())
            assert not sums.any()


# --------------------------------------------------------------------------------------- dots


def check_dots(ex, columns, num_samples):
    sample = samples(ex, num_samples)
    p = probabilities(ex, columns)
    class_grad = eighths(num_samples, p.shape[1], seed=3)
    truth = (p * class_grad[sample]).sum(-1).where(ex.valid, 0)
    check(row_dots, truth, ex, columns, sample, class_grad.to(ex.dtype), size=1.0)


@every_shape
def test_dots_every_shape(n, v, memory):
    ex = example(n, v, poisoned=True)
    memory.forbid_ignored(ex)
    check_dots(ex, None, 1)


@every_layout
@pytest.mark.parametrize("k", LISTS.values(), ids=LISTS)
def test_dots_every_layout(layout, k, memory):
    ex = example(33, 1031, layout=layout, poisoned=True)
    memory.forbid_ignored(ex)
    check_dots(ex, columns_of(ex, k), 4)


@every_dtype
def test_dots_every_dtype(dtype):
    check_dots(example(33, 507, dtype), None, 1)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dots_every_transform(transform, dtype):
    check_dots(example(7, 507, dtype, **transform), None, 4)


def test_dots_of_class_gradients_in_any_layout_and_of_none():
    ex = example(7, 507)
    sample, class_grad = samples(ex, 4), eighths(507, 4, seed=3).float().T
    for dots in on_both(row_dots, ex.rows, *ex.row_sums(), None, sample, class_grad):
        truth = (ex.log_p.exp() * class_grad[sample]).sum(-1).where(ex.valid, 0)
        assert_close(dots, truth, size=1.0)
    nothing = torch.zeros(0, dtype=torch.int64)
    for dots in on_both(row_dots, ex.rows, *ex.row_sums(), nothing, sample, class_grad[:, :0]):
        assert torch.equal(dots, torch.zeros(7))


# -------------------------------------------------------------------------------------- peaks


def peaks_truth(ex, sample, num_samples):
    """Largest log-probability and its first row, row by row."""
    peak = torch.full((num_samples, ex.shape[1]), -torch.inf, dtype=torch.float64)
    where = torch.full((num_samples, ex.shape[1]), -1)
    for row in ex.valid.nonzero()[:, 0].tolist():
        b, log_p = sample[row], ex.log_p[row]
        higher = (log_p > peak[b]) | log_p.isnan()
        peak[b], where[b] = log_p.where(higher, peak[b]), where[b].masked_fill(higher, row)
    return peak, where


def check_peaks(ex, num_samples):
    sample = samples(ex, num_samples)
    truth = peaks_truth(ex, sample, num_samples)
    for peak, row in on_both(class_peaks, ex.rows, *ex.row_sums(), sample, num_samples):
        assert_close(peak, truth[0], size=10.0)
        assert torch.equal(row, truth[1])


@every_shape
def test_peaks_every_shape(n, v, memory):
    ex = example(n, v)
    memory.forbid_ignored(ex)
    check_peaks(ex, 1)


@every_layout
def test_peaks_every_layout(layout, memory):
    ex = example(33, 507, layout=layout)
    memory.forbid_ignored(ex)
    check_peaks(ex, 4)


@every_dtype
def test_peaks_every_dtype(dtype):
    check_peaks(example(33, 507, dtype), 1)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_peaks_every_transform(transform, dtype):
    check_peaks(example(7, 507, dtype, **transform), 1)


def test_peaks_keep_nan_and_say_what_has_none():
    ex = example(7, 507, poisoned=True)
    for peak, row in on_both(class_peaks, ex.rows, *ex.row_sums(), samples(ex, 4), 4):
        assert torch.equal(peak.isnan().all(1), torch.arange(4) == 3)
        assert (row[3] == 3).all()  # the row with NaN
        assert (peak[2] == -torch.inf).all() and (row[2] == -1).all()  # a sample without rows
        assert (peak[0, 3], row[0, 3]) == (-torch.inf, -1)  # a column of -inf
