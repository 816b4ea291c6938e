"""Columns of which others lie on other ranks: a target, an own class or every column elsewhere."""

from dataclasses import replace

import pytest
import torch
from grad_helpers import TERMS, Problem
from kernel_helpers import assert_close, example, on_both, samples

from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import logit_grad
from segloss.kernels.row_stats import row_stats
from segloss.sharding import Sharding
from segloss.sweep.terms import own_terms

V, CUT = 507, 200
SHARDS = [slice(0, CUT), slice(CUT, V)]


def part_of(rows: Rows, columns: slice) -> Rows:
    return Rows(rows.data[..., columns], rows.softcap, rows.scale)


def local(target, columns: slice):
    """The target among the columns, as `request_stats` hands it on."""
    width = columns.stop - columns.start
    inside = (target >= columns.start) & (target < columns.stop)
    own = torch.where(inside, target - columns.start, width)
    return torch.where(target == -100, -1, own)


@pytest.mark.parametrize("columns", SHARDS, ids=str)
def test_row_stats_with_targets_elsewhere(columns, memory):
    ex = example(7, V, poisoned=True)
    memory.forbid_ignored(ex)
    rows, target = part_of(ex.rows, columns), local(ex.target, columns)
    z, here = ex.z[:, columns], (target >= 0) & (target < rows.num_classes)
    assert 0 < here.sum() < ex.valid.sum()
    lse = z.logsumexp(-1)
    for stats in on_both(row_stats, rows, target, -1, entropy=True, argmax=True):
        assert_close((stats.row_max + stats.log_sum)[ex.valid], lse[ex.valid], size=10.0)
        expected = z.gather(1, target.clamp(0, rows.num_classes - 1)[:, None])[:, 0] - lse
        assert_close(stats.log_prob[here], expected[here], size=10.0)
        assert stats.log_prob[ex.valid & ~here].isnan().all()
        number = ex.valid & lse.isfinite()  # of one row the finite logit is elsewhere
        assert torch.equal(stats.argmax[number], z.argmax(-1)[number])
        assert not stats.entropy[number].isnan().any()


@pytest.mark.parametrize("columns", SHARDS, ids=str)
def test_exponentials_of_rows_whose_target_is_elsewhere(columns):
    """Only a target that is here leaves a 0: its neighbours' columns keep their share."""
    ex = example(7, V)
    rows, target = part_of(ex.rows, columns), local(ex.target, columns)
    out = torch.empty(7, rows.num_classes)
    stats = row_stats(rows, target, -1, exp_out=out)
    p = torch.softmax(ex.z[:, columns], -1)
    here = ((target >= 0) & (target < rows.num_classes)).nonzero()[:, 0]
    p[here, target[here]] = 0
    p[~ex.valid] = 0
    assert_close(out * stats.exp_scale[:, None], p)


@pytest.mark.parametrize("columns", SHARDS, ids=str)
def test_candidates_of_rows_whose_class_is_elsewhere(columns):
    ex = example(33, V)
    listed = torch.arange(columns.start, columns.stop, 3)
    own = torch.searchsorted(listed, ex.target.clamp(min=0)).clamp(max=listed.numel() - 1)
    own = torch.where(listed[own] == ex.target, own, -1)
    assert 0 < (own >= 0).sum() < 33
    p = ex.log_p.exp()[:, listed].nan_to_num(0)
    tau = p.float().median() * 2  # between two of its values
    chosen = (p > tau) & ex.valid[:, None] & (torch.arange(listed.numel()) != own[:, None])
    row, k = chosen.nonzero().unbind(1)
    args = (*ex.row_sums(), listed - columns.start, samples(ex, 1), own)
    threshold = torch.full((1, listed.numel()), float(tau))
    for found in on_both(candidates, part_of(ex.rows, columns), *args, threshold):
        assert torch.equal(found.row, row) and torch.equal(found.class_index, k)
        assert_close(found.prob, p[row, k])


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("columns", SHARDS, ids=str)
def test_the_gradient_of_some_columns_is_that_of_all_cut(columns, name, memory):
    ex = example(7, V, poisoned=True)
    memory.forbid_ignored(ex)
    problem = Problem(ex, **TERMS[name])
    terms, width = problem.terms, columns.stop - columns.start
    if terms.entry_class is not None:  # entries are found where their columns are
        column = terms.entry_class if terms.columns is None else terms.columns[terms.entry_class]
        here = (column >= columns.start) & (column < columns.stop)
        chosen = {n: getattr(terms, n)[here] for n in ("entry_row", "entry_class", "entry_grad")}
        terms = replace(terms, **chosen)
    sharding = Sharding(V, columns.start, width, width, group="others")
    terms, rows = own_terms(terms, sharding), part_of(ex.rows, columns)

    def run():
        return logit_grad(rows, terms, torch.empty(7, rows.num_classes))

    for dlogits in on_both(run):
        assert_close(dlogits, problem.truth[:, columns], ex.dtype, 4.0)


def test_no_column_at_all():
    rows = Rows.of(torch.empty(5, 0))
    target = torch.tensor([0, -1, 0, 0, -1])
    zero, sample = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    for stats in on_both(row_stats, rows, target, -1, entropy=True, argmax=True, column_sums=True):
        assert (stats.log_sum == -torch.inf).all() and (stats.row_max == 0).all()
        assert (stats.num_finite == 0).all() and (stats.argmax == 0).all()
    for found in on_both(candidates, rows, zero, zero, none, sample, sample - 1, torch.empty(1, 0)):
        assert found.row.numel() == 0
    for sums in on_both(class_sums, rows, zero, zero, None, sample, 1):
        assert sums.shape == (1, 0)
    for peak, peak_row in on_both(class_peaks, rows, zero, zero, sample, 1):
        assert peak.shape == peak_row.shape == (1, 0)
    for dots in on_both(row_dots, rows, zero, zero, None, sample, torch.empty(1, 0)):
        assert (dots == 0).all()
