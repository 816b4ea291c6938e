"""The projection as users run it: chunking, statistics of its signs, memory."""

import itertools
import subprocess
import sys

import pytest
import torch

from segloss.kernels.projection import TILE, back_project, project, sign_matrix


def test_same_bits_for_every_chunking_and_number_of_threads():
    gradient = torch.randn(5, 3 * TILE + 77) * torch.randn(5, 3 * TILE + 77).exp()
    whole = project(gradient, 60, 3)
    cuts = [0, 1, 4000, TILE, TILE + 1, 2 * TILE + 9, gradient.shape[1]]
    pieces = [gradient[:, a:b] for a, b in itertools.pairwise(cuts)]
    assert torch.equal(whole, project(pieces, 60, 3))
    assert torch.equal(whole, torch.cat([project(row[None], 60, 3) for row in gradient]))
    assert torch.equal(whole, project(gradient, 60, 3, chunk_bytes=1))
    torch.set_num_threads(3)
    try:
        assert torch.equal(whole, project(gradient, 60, 3))
    finally:
        torch.set_num_threads(1)


def test_same_bits_on_the_way_back_for_every_cut_and_number_of_threads():
    w = torch.randn(60, dtype=torch.float64)
    whole = back_project(w, 3 * TILE + 77, 3)
    cuts = [0, 1, 4000, TILE, TILE + 1, 2 * TILE + 9, whole.numel()]
    parts = [back_project(w, b - a, 3, first_column=a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(whole, torch.cat(parts))
    torch.set_num_threads(3)
    try:
        assert torch.equal(whole, back_project(w, whole.numel(), 3))
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(whole.double(), sign_matrix(whole.numel(), 60, 3).double() @ w)


def test_a_lower_precision_of_products_changes_nothing():
    gradient = torch.randn(4, 600)
    expected = project(gradient, 40)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(project(gradient, 40), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_rows_of_the_matrix_are_orthonormal_on_average():
    """E[P P^T] = I: over many seeds, the mean of c.c' is 1 for c = c', else 0 within its error."""
    seeds, columns, dim = 400, 24, 64
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for seed in range(seeds):
        p = sign_matrix(columns, dim, seed, first_column=seed).double()
        total += p @ p.T / seeds
    assert torch.allclose(total.diagonal(), torch.ones(columns, dtype=torch.float64))
    off = total - torch.diag(total.diagonal())
    error = (seeds * dim) ** -0.5
    assert off.abs().max() < 4.5 * error
    assert off.square().sum() / (columns * (columns - 1)) == pytest.approx(error**2, rel=0.3)


def test_signs_are_fair_and_independent():
    signs = sign_matrix(20_000, 512, seed=5) * 512**0.5
    count = signs.numel()
    assert abs(signs.mean()) < 4 / count**0.5
    for lag in (1, 2, 64):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 4.5 / count**0.5
        assert abs((signs[:, lag:] * signs[:, :-lag]).mean()) < 4.5 / count**0.5
    other = sign_matrix(20_000, 512, seed=6) * 512**0.5
    assert abs((signs * other).mean()) < 4.5 / count**0.5


def test_first_dimensions_do_not_depend_on_their_number():
    wide, narrow = sign_matrix(30, 400) * 400**0.5, sign_matrix(30, 33) * 33**0.5
    torch.testing.assert_close(wide[:, :33], narrow)


MEMORY = """
import re, torch
from pathlib import Path
from segloss.kernels.projection import project

torch.set_num_threads(2)
project(torch.ones(1, 10_000), 400)

def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) / 1024

gradient = [torch.ones(1, 27_000_000).mul_(i + 1) for i in range(5)]
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
result = project(gradient, {dim})
assert result.shape == (1, {dim}) and result.isfinite().all()
print(resident("VmHWM") - before)
"""


def test_135_million_parameters_within_a_gigabyte():
    """Megabytes above the gradient itself, in a process of its own."""
    run = [sys.executable, "-c", MEMORY.format(dim=400)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1000


@pytest.mark.gpu
def test_same_bits_on_a_gpu():
    gradient = torch.randn(33, 5 * TILE + 77) * torch.randn(33, 5 * TILE + 77).exp()
    for seed in (0, 2**62 + 1):
        expected = project(gradient, 400, seed)
        assert torch.equal(project(gradient.cuda(), 400, seed).cpu(), expected)
        pieces = [piece.cuda() for piece in gradient.split(5000, 1)]
        assert torch.equal(project(pieces, 400, seed, chunk_bytes=1 << 20).cpu(), expected)
    w = torch.randn(400, dtype=torch.float64)
    for seed in (0, 2**62 + 1):
        there = back_project(w, 5 * TILE + 77, seed, device=torch.device("cuda"))
        assert torch.equal(there.cpu(), back_project(w, 5 * TILE + 77, seed))
