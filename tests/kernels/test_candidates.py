"""The Lovász candidates: the same triples in the same order, from kernel, twin and float64."""

import pytest
import torch
from kernel_helpers import (
    assert_close,
    every_dtype,
    every_layout,
    every_shape,
    every_transform,
    example,
    on,
    on_both,
    samples,
    some_columns,
)

from segloss.kernels.candidates import candidates


def thresholds(p, sample, num_samples):
    """(B, K): in the middle of the widest gap between a column's five largest probabilities, so
    that no rounding decides; every seventh column is left out by inf."""
    tau = torch.full((num_samples, p.shape[1]), torch.inf, dtype=p.dtype)
    for b in range(num_samples):
        largest = p[sample == b].sort(0, descending=True).values[:5]
        if len(largest) > 1:
            gap, at = (largest[:-1] - largest[1:]).max(0)
            tau[b] = largest.gather(0, at[None])[0] - gap / 2
        elif len(largest):
            tau[b] = largest[0] / 2
    tau[:, 1::7] = torch.inf
    return tau


def check(ex, columns, num_samples=1, some=True):
    """`some`: there must be candidates, lest the comparison is of nothing."""
    sample = samples(ex, num_samples)
    own = torch.searchsorted(columns, ex.target.clamp(min=0)).clamp(max=columns.numel() - 1)
    p = ex.log_p.exp()[:, columns]
    # a column of -inf and a row with NaN have no candidate at any threshold
    tau = thresholds(p.nan_to_num(0), sample, num_samples)
    chosen = (p > tau[sample]) & (sample >= 0)[:, None]
    chosen &= torch.arange(columns.numel()) != own[:, None]
    row, k = chosen.nonzero().unbind(1)
    args = (columns, sample, own, tau.to(ex.dtype))
    for found in on_both(candidates, ex.rows, *ex.row_sums(), *args):
        assert torch.equal(found.row, row) and torch.equal(found.class_index, k)
        assert_close(found.prob, p[row, k])
    assert not some or row.numel()


@every_shape
def test_every_shape(n, v, memory):
    """All columns are listed, nine blocks of them where V = 4099."""
    ex = example(n, v, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, torch.arange(v), some=n * v > 66)


@every_layout
@pytest.mark.parametrize("k", [5, 40])
def test_every_layout(layout, k, memory):
    ex = example(33, 507, layout=layout, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, some_columns(507, k), 4)


@every_dtype
def test_every_dtype(dtype):
    check(example(33, 507, dtype), some_columns(507, 40))


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_transform(transform, dtype):
    check(example(7, 507, dtype, **transform), some_columns(507, 40))


def test_none_and_all():
    """Thresholds that leave out everything, and ones that take all but a row's own class."""
    ex = example(7, 507)
    columns, sample = torch.arange(507), samples(ex, 1)
    own = ex.target.clamp(min=0)
    for tau, per_row in ((torch.inf, 0), (1.0, 0), (-1.0, 506)):
        args = (columns, sample, own, torch.full((1, 507), tau))
        for found in on_both(candidates, ex.rows, *ex.row_sums(), *args):
            count = torch.bincount(found.row, minlength=7)
            assert torch.equal(count, per_row * ex.valid)
            assert not (found.class_index == own[found.row]).any()
    nobody = torch.full_like(sample, -1)
    for args in ((columns, nobody, own), (columns[:0], sample, own)):
        tau = torch.zeros(1, args[0].numel())
        for found in on_both(candidates, ex.rows, *ex.row_sums(), *args, tau):
            assert [part.numel() for part in found] == [0, 0, 0]
            assert [part.dtype for part in found] == [torch.int64, torch.int64, torch.float32]


def test_a_write_stays_where_its_row_was_counted():
    """Logits that change between the two passes, as by a stray writer: no row takes another's
    place, and nothing is written behind the last one."""
    ex = example(7, 507)
    columns, sample = torch.arange(507), samples(ex, 1)
    own = ex.target.clamp(min=0)
    tau = torch.full((1, 507), 1e-3, dtype=ex.dtype)
    arguments = (*ex.row_sums(), columns, sample, own, tau)
    rows = ex.rows
    true = on("triton", candidates, rows, *arguments)
    cumsum = torch.Tensor.cumsum

    def meddled(tensor, dim):
        patch.undo()
        rows.data.add_(8)
        return cumsum(tensor, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cumsum", meddled)
        found = on("triton", candidates, rows, *arguments)
    assert 0 < true.row.numel() < 7 * 507
    assert torch.equal(found.row, true.row)
