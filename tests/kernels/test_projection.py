"""The projection: kernel and twin are the explicit sign matrix, and agree to the last bit."""

import numpy as np
import pytest
import torch
from kernel_helpers import on, on_both

from segloss import reference
from segloss.kernels.projection import TILE, back_project, project, sign_matrix


def gradients(n, c, dtype=torch.float32):
    """Rows of very different size, with entries over many orders of magnitude."""
    generator = torch.Generator().manual_seed(n * 10007 + c)
    values = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    sizes = 10.0 ** torch.arange(n) - 20.0
    return (values[0] * values[1].exp() * sizes[:, None]).to(dtype)


# C: a lone column, within a tile, one above it; D: one, odd, over one group of 256; N above 16
@pytest.mark.parametrize(("n", "c", "d"), [(1, 1, 1), (3, 507, 37), (2, TILE + 1, 300), (17, 9, 5)])
def test_is_the_explicit_matrix_on_both(n, c, d, memory):
    gradient = gradients(n, c)
    kernel, twin = on_both(project, gradient, d, 7)
    assert memory.launches == 2 and torch.equal(kernel, twin)
    exact = gradient.double() @ reference.sign_matrix(c, d, 7, dtype=torch.float64)
    # an entry is off by half a unit of its tile, the sum by one rounding to float32
    off = c * 2**-23 * gradient.double().abs().amax(1, keepdim=True) / d**0.5
    assert ((twin.double() - exact).abs() <= off + 2**-23 * exact.abs()).all()


def test_single_entries_give_the_matrix_itself():
    for result in on_both(project, torch.eye(40), 300, 3):
        torch.testing.assert_close(result, reference.sign_matrix(40, 300, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_strides(dtype):
    gradient = torch.randn(6, 40, 2).to(dtype)[::2, :, 0]
    kernel, twin = on_both(project, gradient, 20)
    assert torch.equal(kernel, twin) and kernel.dtype == torch.float32
    assert torch.equal(kernel, on("torch", project, gradient.float().contiguous(), 20))


def test_pieces_are_one_long_row():
    gradient = gradients(2, TILE + 30)
    pieces = [gradient[:, :5], gradient[:, 5:5], gradient[:, 5 : TILE + 2], gradient[:, TILE + 2 :]]
    kernel, twin = on_both(project, pieces, 10, chunk_bytes=1)
    assert torch.equal(kernel, on("torch", project, gradient, 10)) and torch.equal(kernel, twin)


def test_what_is_no_number_stays_in_its_row():
    gradient = gradients(5, 50)
    expected = on("torch", project, gradient, 9)
    gradient[1, 3], gradient[3, 49] = torch.nan, -torch.inf
    for result in on_both(project, gradient, 9):
        assert result[[1, 3]].isnan().all()
        assert torch.equal(result[[0, 2, 4]], expected[[0, 2, 4]])


def test_numbers_at_the_ends_of_the_range():
    largest = torch.finfo(torch.float32).max
    gradient = torch.tensor([[largest], [1e-37], [1e-42], [0.0]]).repeat(1, 3)
    gradient[:, 1] = 0
    kernel, twin = on_both(project, gradient, 4)
    assert torch.equal(kernel, twin)
    exact = gradient[:2].double() @ sign_matrix(3, 4).double()
    torch.testing.assert_close(twin[:2].double(), exact, rtol=1e-6, atol=0)
    assert (twin[2:] == 0).all()  # subnormal numbers count as 0


def test_nothing_to_project():
    for result in on_both(project, torch.zeros(2, 0), 3):
        assert torch.equal(result, torch.zeros(2, 3))
    for result in on_both(project, torch.zeros(0, 5), 3):
        assert result.shape == (0, 3)


def test_signs_are_those_of_numpys_philox():
    """By one call of NumPy per column, bit by bit."""
    matrix = sign_matrix(3, 300, seed=11, first_column=4095) * 300**0.5
    for column in range(3):
        for group in range(2):
            counter = (group << 64) + 4095 + column - 1
            words = np.random.Philox(key=11, counter=counter).random_raw(4)
            bits = [int(words[i // 64]) >> (i % 64) & 1 for i in range(256)]
            signs = 1.0 - 2.0 * torch.tensor(bits)
            ours = matrix[column, 256 * group : 256 * (group + 1)]
            torch.testing.assert_close(ours, signs[: len(ours)])


# C: a lone column, within a block, one above a tile; D: one, odd, over one group, a whole group
@pytest.mark.parametrize(("c", "d"), [(1, 1), (507, 37), (TILE + 1, 9), (70, 300), (33, 256)])
def test_the_way_back_is_the_explicit_matrix_on_both(c, d, memory):
    w = torch.randn(d, dtype=torch.float64) * torch.randn(d, dtype=torch.float64).exp()
    kernel, twin = on_both(back_project, w, c, 7)
    assert memory.launches == 1 and torch.equal(kernel, twin)
    exact = reference.sign_matrix(c, d, 7, dtype=torch.float64) @ w
    # every entry off by half of 2^-40 of the largest, the sum by one rounding to float32
    off = 2**-41 * d**0.5 * w.abs().max()
    assert ((twin.double() - exact).abs() <= off + 2**-24 * exact.abs()).all()


def test_the_way_back_begins_anywhere_and_takes_any_size():
    w = torch.randn(40).bfloat16()
    for result in on_both(back_project, w, 700, 2**62 + 1):
        for first, count in ((0, 5), (5, 600), (605, 95), (700, 0)):
            (kernel, twin) = on_both(back_project, w, count, 2**62 + 1, first_column=first)
            assert torch.equal(kernel, result[first : first + count]) and torch.equal(kernel, twin)
    for size in (0.0, 1e-40, 1e30):
        kernel, twin = on_both(back_project, size * w.double(), 9)
        assert torch.equal(kernel, twin)
        exact = size * (sign_matrix(9, 40).double() @ w.double())
        torch.testing.assert_close(twin.double(), exact, rtol=1e-6, atol=1e-45)
    for result in on_both(back_project, w.new_zeros(0), 3):
        assert torch.equal(result, torch.zeros(3))
    for bad in (torch.nan, torch.inf):
        for result in on_both(back_project, torch.tensor([1.0, bad]), 3):
            assert not result.isfinite().any()


def test_the_way_back_is_the_transpose():
    """`gradient @ (P w)` is `(gradient @ P) w`."""
    gradient, w = gradients(3, 600).double() * 1e18, torch.randn(20, dtype=torch.float64)
    for back in on_both(back_project, w, 600, 4):
        there = on("torch", project, gradient, 20, 4).double() @ w
        torch.testing.assert_close(gradient @ back.double(), there, rtol=1e-4, atol=0)
