"""The row kernel against its twin and against float64."""

import itertools

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
    on,
    on_both,
)

from segloss.kernels import common
from segloss.kernels import row_stats as row_stats_module
from segloss.kernels.common import Rows
from segloss.kernels.row_stats import row_stats

EVERYTHING = {"entropy": True, "argmax": True, "column_sums": True}
CHOICES = list(itertools.product([False, True], repeat=3))


def run(ex, column_weight=None, **options):
    options = options or EVERYTHING
    return on_both(row_stats, ex.rows, ex.target, -100, column_weight=column_weight, **options)


def truth(ex, column_weight=None):
    """Every statistic from the whole float64 matrix; 0 (argmax: -1) where ignored."""
    z, log_p = ex.z, ex.log_p
    weight = torch.ones(ex.shape[1]) if column_weight is None else column_weight
    weight = weight.double().expand_as(z)
    finite = z > -torch.inf
    stats = {
        "row_max": ex.row_max,
        "lse": ex.lse,
        "log_prob": log_p.gather(1, ex.target.clamp(min=0)[:, None])[:, 0],
        "entropy": -torch.where(finite, log_p.exp() * log_p, log_p * 0).nan_to_num(0).sum(-1),
        "logit_sum": torch.where(finite, weight * z, 0).sum(-1),
        "weight_sum": torch.where(finite, weight, 0).sum(-1),
        "num_finite": finite.double().sum(-1),
        "argmax": z.argmax(-1),
    }
    stats["entropy"] = torch.where(ex.lse.isnan(), torch.nan, stats["entropy"])
    absent = {"argmax": -1}
    return {name: x.where(ex.valid, absent.get(name, 0)) for name, x in stats.items()}


def terms_of(name, ex):
    """The size of what is added up: V logits times their weights, or logits and logarithms."""
    return 4.0 * ex.shape[1] if name in ("logit_sum", "weight_sum") else 10.0


def sums_alone(stats):
    """Whether nothing else is asked for, where the twin's may be relative to the target's logit."""
    return all(out is None for out in stats[3:])


def assert_right(stats, ex, column_weight=None):
    expected = truth(ex, column_weight)
    number = ~expected["lse"].isnan()  # a row with NaN has no maximum to speak of
    if not sums_alone(stats):
        assert_close(stats.row_max[number], expected["row_max"][number])
    assert_close(stats.row_max + stats.log_sum, expected["lse"], size=10.0)
    for name in ("log_prob", "entropy", "logit_sum", "weight_sum", "num_finite", "argmax"):
        value = getattr(stats, name)
        if value is None:
            continue
        if name == "argmax":
            assert torch.equal(value[number], expected[name][number])
        else:
            assert_close(value, expected[name], size=terms_of(name, ex))


def assert_agree(kernel, twin, ex):
    number = ~ex.lse.isnan() | ~ex.valid
    for name, a, b in zip(kernel._fields, kernel, twin, strict=True):
        if a is None and b is None:
            continue
        if name in ("row_max", "log_sum") and sums_alone(twin):
            continue
        if name in ("row_max", "log_sum", "argmax"):
            a, b = a[number], b[number]  # with NaN, only the sum of the former two means anything
        if name == "argmax":
            assert torch.equal(a, b)
        else:
            assert_close(a, b, size=terms_of(name, ex))


def check(ex, column_weight=None, **options):
    kernel, twin = run(ex, column_weight, **options)
    assert_right(kernel, ex, column_weight)
    assert_right(twin, ex, column_weight)
    assert_agree(kernel, twin, ex)
    return kernel, twin


@every_shape
def test_every_shape(n, v, memory):
    ex = example(n, v, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, eighths(v, seed=1).abs().float())


@every_layout
def test_every_layout(layout, memory):
    ex = example(33, 507, layout=layout, poisoned=True)
    memory.forbid_ignored(ex)
    check(ex, eighths(507, seed=1).float())


@every_dtype
def test_every_dtype(dtype):
    check(example(7, 4099, dtype, poisoned=True), eighths(4099, seed=1).float())


@every_transform
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_transform(transform, dtype):
    check(example(7, 507, dtype, poisoned=True, **transform), eighths(507, seed=1))


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_every_choice_of_statistics(chosen):
    """Each compiles to code of its own. What is not asked for is not there."""
    options = dict(zip(EVERYTHING, chosen, strict=True))
    ex = example(7, 4099)
    kernel, twin = check(ex, **options)
    for stats in (kernel, twin):
        columns = [stats.logit_sum, stats.weight_sum, stats.num_finite]
        there = [stats.entropy is not None, stats.argmax is not None]
        assert there == list(chosen[:2])
        assert all((sums is not None) == options["column_sums"] for sums in columns)


def test_no_weight_counts_every_column_once():
    check(example(7, 507), None, column_sums=True)


def test_the_first_of_equal_maxima_is_the_argmax():
    logits = torch.zeros(3, 4099)
    logits[1, [5, 4097]] = 2.0  # in the first tile and the last
    logits[2, :4096] = -torch.inf
    for stats in on_both(row_stats, Rows.of(logits), torch.zeros(3).long(), -100, argmax=True):
        assert stats.argmax.tolist() == [0, 5, 4096]


def test_rows_without_a_distribution():
    """Nothing but -inf, +inf, or nothing but NaN: no number, and the neighbours keep theirs."""
    logits = example(7, 507).rows.data[0].clone()
    logits[[0, 2, 4], 1:] = torch.tensor([-torch.inf, 1.0, torch.nan])[:, None]
    logits[[0, 2, 4], 0] = torch.tensor([-torch.inf, torch.inf, torch.nan])
    target = torch.ones(7, dtype=torch.int64)
    kernel, twin = on_both(row_stats, Rows.of(logits), target, -100, entropy=True)
    for stats in (kernel, twin):
        assert stats.log_prob.isnan().tolist() == [True, False] * 3 + [False]
        assert stats.entropy.isnan().tolist() == [True, False] * 3 + [False]
    keep = torch.tensor([1, 3, 5, 6])
    for a, b in zip(kernel, twin, strict=True):
        assert a is None or torch.allclose(a[keep], b[keep])


@pytest.mark.parametrize("transform", [{}, {"softcap": 300.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [4, 64])  # rows that are read again a few at a time, or together
def test_sums_alone_however_far_the_target_is_from_the_maximum(step, dtype, transform, monkeypatch):
    """From the maximum itself to where exponentials relative to the target are not finite."""
    for module in (common, row_stats_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", step * 507 * 4)
    z = torch.randn(64, 507, generator=torch.Generator().manual_seed(0))
    target = torch.arange(64) * 7
    z[torch.arange(64), target] = 20 - 4 * torch.arange(64.0)
    z[60, target[60]] = -torch.inf
    z[61] = torch.nan
    rows = Rows.of(z.to(dtype), **transform)
    exact = Rows.of(rows.data[0].double(), **transform)
    expected = torch.log_softmax(exact.load(exact.data[0]), -1)
    log_prob = expected.gather(1, target[:, None])[:, 0]
    stats = on("torch", row_stats, rows, target, -100)
    assert_close(stats.log_prob, log_prob)
    lse = torch.logsumexp(exact.load(exact.data[0]), -1)
    assert_close(stats.row_max + stats.log_sum, lse, size=10.0)
    # what others multiply by exp(z - row_max) must not vanish
    assert stats.log_sum.nan_to_num(0).max() < 42
    confident = stats.log_prob[:2] / log_prob[:2].float()  # nll of about 1e-6
    assert (confident - 1).abs().max() < 0.1


@pytest.mark.parametrize("wrong", [-1, 507, 2**31, 2**40, -(2**40)])
def test_a_target_out_of_range_is_nan_and_never_read(wrong, memory):
    """The guards around the logits and the rows of other targets stay untouched."""
    guarded = torch.full((5, 507), torch.nan)
    guarded[1:4] = example(7, 507).z[[0, 1, 3]]
    memory.forbid(guarded[0])
    memory.forbid(guarded[4])
    target = torch.tensor([wrong, 5, wrong])
    for stats in on_both(row_stats, Rows.of(guarded[1:4]), target, -100, entropy=True):
        assert stats.log_prob.isnan().tolist() == [True, False, True]
        assert stats.log_sum.isfinite().all() and stats.entropy.isfinite().all()


def test_any_ignore_index_and_int32_targets():
    ex = example(7, 507)
    expected = on("torch", row_stats, ex.rows, ex.target, -100)
    for ignore_index in (-1, 507, 3):
        target = torch.where(ex.valid & (ex.target != ignore_index), ex.target, ignore_index)
        kernel = on("triton", row_stats, ex.rows, target.int(), ignore_index)
        assert_close(kernel.log_prob, expected.log_prob.where(target != ignore_index, 0))
