"""What the torch twins rest on: `parallel`, row blocks, and views of the logits."""

import threading

import pytest
import torch
from grad_helpers import TERMS, Problem, run
from kernel_helpers import (
    LAYOUTS,
    arranged,
    assert_close,
    eighths,
    every_layout,
    example,
    on,
    samples,
)

from segloss.kernels import class_stats, common
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import Rows, bounds, parallel
from segloss.kernels.row_stats import row_stats


@pytest.fixture
def threads():
    """Sets how many threads torch uses, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------ parallel


def test_parallel_keeps_the_order_and_the_number_of_threads(threads):
    for number in (1, 3):
        threads(number)
        assert parallel(lambda x: x * x, range(10)) == [x * x for x in range(10)]
        assert parallel(lambda x: x, []) == []
        assert torch.get_num_threads() == number
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))  # noqa: B023
        thread.start()
        thread.join()
        assert later == [number]


def test_parallel_works_on_as_many_threads_as_torch_each_with_one_of_its_own(threads):
    threads(3)
    together = threading.Barrier(3, timeout=30)  # passes only three at a time

    def work(_):
        together.wait()
        return torch.get_num_threads(), threading.get_ident()

    counts, names = zip(*parallel(work, range(6)), strict=True)
    assert set(counts) == {1} and len(set(names)) == 3


@pytest.mark.parametrize("number", [1, 3])
def test_parallel_passes_an_exception_on(number, threads):
    threads(number)

    def work(x):
        if x == 4:
            raise ZeroDivisionError("at 4")
        return x

    with pytest.raises(ZeroDivisionError, match="at 4"):
        parallel(work, range(10))
    assert torch.get_num_threads() == number


@pytest.mark.parametrize("number", [1, 3])
def test_parallel_works_without_autograd(number, threads):
    threads(number)
    assert parallel(lambda _: torch.is_grad_enabled(), range(6)) == [False] * 6
    assert torch.is_grad_enabled()


# -------------------------------------------------------------------------------------- blocks


def sums_of(ex, num_samples=4):
    return class_sums(ex.rows, *ex.row_sums(), None, samples(ex, num_samples), num_samples)


def candidates_of(ex):
    own, tau = ex.target.clamp(min=0), torch.full((4, 507), 0.002)
    return candidates(ex.rows, *ex.row_sums(), torch.arange(507), samples(ex, 4), own, tau)


TWINS = {
    "row_stats": lambda ex: row_stats(
        ex.rows, ex.target, -100, entropy=True, argmax=True, column_sums=True
    )[:-1],  # exp_scale goes with exp_out
    "class_sums": lambda ex: [sums_of(ex)],
    "class_sums of one sample": lambda ex: [sums_of(ex, 1)],
    "row_dots": lambda ex: [
        row_dots(ex.rows, *ex.row_sums(), None, samples(ex, 4), eighths(4, 507, seed=1).float())
    ],
    "class_peaks": lambda ex: class_peaks(ex.rows, *ex.row_sums(), samples(ex, 4), 4),
    "candidates": candidates_of,
    "logit_grad": lambda ex: [run(ex, Problem(ex, **TERMS["everything"]).terms)],
    "logit_grad listed": lambda ex: [run(ex, Problem(ex, **TERMS["everything listed"]).terms)],
}
every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Four rows a block, however many threads."""
    monkeypatch.setattr(common, "BLOCK_BYTES", 4 * 507 * 4)
    monkeypatch.setattr(class_stats, "PANEL_BYTES", 4 * 507 * 4)
    monkeypatch.setattr(common, "PARALLEL_ELEMENTS", 0)


@every_twin
@every_layout
def test_blocks_change_rounding_only(twin, layout, request):
    whole = on("torch", twin, example(33, 507, layout=layout))
    request.getfixturevalue("small_blocks")
    parts = on("torch", twin, example(33, 507, layout=layout))
    for a, b in zip(parts, whole, strict=True):
        if a.is_floating_point():
            assert_close(a, b, size=10.0)
        else:
            assert torch.equal(a, b)


@every_twin
@pytest.mark.parametrize("layout", ["rows", "shifted"])
def test_threads_change_no_bit(twin, layout, threads, small_blocks):
    results = []
    for number in (1, 3, 1, 3):
        threads(number)
        results.append(on("torch", twin, example(33, 507, layout=layout)))
        assert torch.get_num_threads() == number
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@every_layout
@pytest.mark.parametrize("number", [1, 3])
def test_blocks_are_all_rows_in_order(layout, number, threads, small_blocks):
    threads(number)
    ex = example(33, 507, layout=layout)
    blocks = [block for group in ex.rows.blocks() for block in group]
    assert [first for first, _, _ in blocks] == [0, *(last for _, last, _ in blocks[:-1])]
    assert blocks[-1][1] == 33
    raw = torch.cat([raw for _, _, raw in blocks])
    torch.testing.assert_close(raw.double(), ex.z, rtol=1e-6, atol=1e-6, equal_nan=True)
    low, high = ex.rows.data.data_ptr(), ex.rows.data.untyped_storage().nbytes()
    assert all(low <= raw.data_ptr() < low + high for _, _, raw in blocks)  # no copies


def test_bounds_count_the_rows_before_each_edge():
    raw = torch.zeros(1, 1)
    groups = [[(0, 4, raw), (4, 8, raw)], [(8, 9, raw)]]
    assert bounds(torch.tensor([0, 3, 4, 8]), groups) == {0: 0, 4: 2, 8: 3, 9: 4}
    assert bounds(torch.tensor([], dtype=torch.int64), groups) == {0: 0, 4: 0, 8: 0, 9: 0}


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (0, 5), (2, 0, 5)])
def test_logits_of_any_shape_are_rows(shape):
    logits = torch.randn(shape)
    rows = Rows.of(logits)
    assert (rows.num_rows, rows.num_classes) == (logits.numel() // 5, 5)
    assert torch.equal(rows.data.reshape(-1, 5), logits.reshape(-1, 5))
    assert not logits.numel() or rows.data.data_ptr() == logits.data_ptr()


def test_logits_are_copied_only_where_no_view_has_their_rows():
    values = torch.randn(12, 5)
    for layout in LAYOUTS:
        logits = arranged(values, layout, 3)
        assert Rows.of(logits).data.data_ptr() == logits.data_ptr()
    crossed = torch.randn(2, 3, 4, 5).transpose(0, 1)
    rows = Rows.of(crossed)
    assert torch.equal(rows.data[0], crossed.reshape(-1, 5))


def test_what_transforms_logits_keeps_minus_infinity_and_the_caller_s_tensor():
    raw = torch.tensor([[-torch.inf, -1e30, -1.0, 0.0, 1.0, 1e30]])
    before = raw.clone()
    rows = Rows.of(raw, softcap=30.0, scale=2.0)
    z = rows.load(raw)
    assert torch.equal(raw, before)
    assert torch.equal(z[0, [0, 1, 3, 5]], torch.tensor([-torch.inf, -30.0, 0.0, 30.0]))
    assert_close(z[0, 4:5], 30 * torch.tanh(torch.tensor([2.0]).double() / 30))
    slope = rows.slope(z)
    assert_close(slope[0, 4:5], 2 * (1 - torch.tanh(torch.tensor([2.0]).double() / 30) ** 2))
    assert slope[0, [0, 1, 5]].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(rows.panel(torch.tensor([0, 0]), torch.tensor([3, 5]))[1], z[0, [3, 5]])
    assert torch.equal(rows.at(torch.tensor([0, 0]), torch.tensor([3, 5])), z[0, [3, 5]])
