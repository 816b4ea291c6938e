"""Which backend runs, and why: `backend`, `SEGLOSS_BACKEND`, and what the launchers make of it."""

import pytest
import torch
from kernel_helpers import example, on

from segloss.kernels import common
from segloss.kernels.candidates import candidates
from segloss.kernels.class_stats import class_peaks, class_sums, row_dots
from segloss.kernels.common import backend
from segloss.kernels.logit_grad import GradTerms, logit_grad
from segloss.kernels.row_stats import row_stats

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "device, interpret, forced, expected",
    [
        (CPU, "0", "", ("torch", "cpu tensor")),
        (CPU, "1", "", ("triton", "TRITON_INTERPRET=1")),
        (CUDA, "0", "", ("triton", "GPU tensor")),
        (CPU, "0", "torch", ("torch", "SEGLOSS_BACKEND=torch")),
        (CPU, "1", "torch", ("torch", "SEGLOSS_BACKEND=torch")),
        (CPU, "1", "triton", ("triton", "SEGLOSS_BACKEND=triton")),
        (CUDA, "0", "torch", ("torch", "SEGLOSS_BACKEND=torch")),
        (CUDA, "0", "triton", ("triton", "SEGLOSS_BACKEND=triton")),
    ],
)
def test_the_backend_and_its_reason(device, interpret, forced, expected, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setenv("SEGLOSS_BACKEND", forced)
    assert backend(device) == expected


def test_without_variables_only_a_gpu_runs_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delenv("SEGLOSS_BACKEND", raising=False)
    assert backend(CPU) == ("torch", "cpu tensor")
    assert backend(CUDA) == ("triton", "GPU tensor")


def test_without_triton_the_twins_run_everywhere(monkeypatch):
    monkeypatch.setattr(common, "triton", None)
    for device in (CPU, CUDA):
        assert backend(device) == ("torch", "triton is not installed")
    monkeypatch.setenv("SEGLOSS_BACKEND", "triton")
    with pytest.raises(ValueError, match="SEGLOSS_BACKEND=triton, but triton is not installed"):
        backend(CUDA)


@pytest.mark.parametrize(
    "value, message",
    [
        ("cuda", "SEGLOSS_BACKEND is 'cuda'; it takes 'triton' or 'torch'"),
        ("Triton", "SEGLOSS_BACKEND is 'Triton'; it takes 'triton' or 'torch'"),
        ("triton", "SEGLOSS_BACKEND=triton, but tensors are on cpu; it takes a GPU, or"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error(value, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("SEGLOSS_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        backend(CPU)
    ex = example(1, 2)
    with pytest.raises(ValueError, match=message):
        row_stats(ex.rows, ex.target, -100)


@pytest.mark.parametrize("chosen, launches", [("triton", 9), ("torch", 0)])
def test_every_launcher_asks(chosen, launches, memory):
    """One launch each, but two for the candidates (count, write) and three for the gradient."""
    ex = example(3, 5)
    row, zero = ex.row_sums()[0], torch.zeros(3, dtype=torch.int64)
    columns = torch.arange(5)
    terms = GradTerms(ex.valid, ex.target, *[row] * 5)
    terms.sample, terms.class_grad, terms.columns = zero, row.new_zeros(1, 5), columns
    terms.entry_row, terms.entry_class, terms.entry_grad = zero[:1], zero[:1], row[:1]
    for launcher, *args in (
        (row_stats, ex.target, -100),
        (class_sums, row, row, columns, zero, 1),
        (row_dots, row, row, columns, zero, row.new_zeros(1, 5)),
        (class_peaks, row, row, zero, 1),
        (candidates, *ex.row_sums(), columns, zero, zero, row.new_full((1, 5), -1.0)),
        (logit_grad, terms, torch.empty(3, 5)),
    ):
        on(chosen, launcher, ex.rows, *args)
    assert memory.launches == launches
