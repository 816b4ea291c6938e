"""Every Triton kernel compiles for GPUs that are not there, and spills no register.

Needs a process without TRITON_INTERPRET, under which kernels cannot be compiled.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
import triton
import triton.language as tl
from compile_helpers import TARGETS, Resources, compiling_for, loops
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import segloss.kernels
from segloss.kernels import (
    candidates,
    class_stats,
    common,
    logit_grad,
    row_stats,
    sample_weights,
    task_weights,
)

N, K = 4, 3
RAGGED = 50257  # GPT-2's vocabulary: rows start at odd addresses, so loads are narrow
ALIGNED = 32768  # rows start at multiples of 16 bytes: loads are wide, and more is in flight

PLAIN = {}
CAPPED = {"softcap": 30.0, "scale": 0.5}
# every dtype, and for the usual ones each kind of load with and without the transform
INPUTS = [
    (torch.bfloat16, RAGGED, PLAIN),
    (torch.bfloat16, ALIGNED, CAPPED),
    (torch.float16, ALIGNED, PLAIN),
    (torch.float32, RAGGED, PLAIN),
    (torch.float32, ALIGNED, CAPPED),
    (torch.float64, RAGGED, CAPPED),
]


def index(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def stats(rows, **options):
    row_stats.row_stats(rows, index(N), -100, **options)


def stats_with_everything(rows):
    weight = torch.ones(rows.num_classes)
    stats(rows, entropy=True, argmax=True, column_sums=True, column_weight=weight)


def sums(rows, columns=None, row_weight=None):
    class_stats.class_sums(rows, rows.new(N), rows.new(N), columns, index(N), 1, row_weight)


def dots(rows, columns=None):
    num_columns = rows.num_classes if columns is None else columns.numel()
    grad = rows.new(1, num_columns)
    class_stats.row_dots(rows, rows.new(N), rows.new(N), columns, index(N), grad)


def peaks(rows):
    class_stats.class_peaks(rows, rows.new(N), rows.new(N), index(N), 1)


def lovasz_candidates(rows):
    own, threshold = index(N), rows.new(1, K)
    candidates.candidates(rows, rows.new(N), rows.new(N), index(K), index(N), own, threshold)


def grad(rows, **terms):
    per_row = ("row_max", "log_sum", "prob_coef", "target_coef", "target_rest")
    terms |= {name: rows.new(N) for name in per_row}
    terms = logit_grad.GradTerms(valid=index(N) == 0, target=index(N), **terms)
    logit_grad.logit_grad(rows, terms, torch.empty(N, rows.num_classes, dtype=rows.data.dtype))


def grad_with_everything(rows, columns=None):
    n = rows.new(N)
    grad(
        rows,
        entropy=n,
        entropy_grad=n,
        sum_grad=n,
        column_weight=torch.ones(rows.num_classes),
        sample=index(N),
        class_grad=rows.new(1, rows.num_classes if columns is None else columns.numel()),
        row_weight=n,
        columns=columns,
        entry_row=index(K),
        entry_class=index(K),
        entry_grad=rows.new(K),
    )


SAMPLES = 1000  # held by one program at once
TASKS = 100


def weigh_tasks(rows, num_tasks, published):
    history = task_weights.TaskHistory.empty(num_tasks, 200, 101, 65536, "cpu")
    task_weights.task_weights(
        history,
        torch.ones(num_tasks, dtype=rows.dtype),
        task_weights.Moment(200, 200, True),
        tau=5.0,
        published=published,
    )


def tokens(rows, num_samples):
    return sample_weights.Tokens.of(rows.new(N), index(N), num_samples)


def weigh_samples(rows, scheme, num_samples=SAMPLES):
    losses = torch.ones(num_samples, dtype=rows.dtype)
    sample_weights.sample_weights(losses, sample_weights.Scheme(scheme))


def weigh_tokens(rows, scheme, num_samples=SAMPLES):
    given = tokens(rows, num_samples)
    sample_weights.sample_means_and_weights(given, sample_weights.Scheme(scheme))


# What is launched, by name: the options that change a kernel's code, none of them and all of them.
LAUNCHES = {
    "row_stats": stats,
    "row_stats-entropy": lambda rows: stats(rows, entropy=True),
    "row_stats-argmax": lambda rows: stats(rows, argmax=True),
    "row_stats-smoothing": lambda rows: stats(rows, column_sums=True),
    "row_stats-everything": stats_with_everything,
    "class_sums-all": sums,
    "class_sums-listed": lambda rows: sums(rows, index(K), rows.new(N)),
    "row_dots-all": dots,
    "row_dots-listed": lambda rows: dots(rows, index(K)),
    "class_peaks": peaks,
    "candidates": lovasz_candidates,
    "logit_grad": grad,
    "logit_grad-entropy": lambda rows: grad(rows, entropy=rows.new(N), entropy_grad=rows.new(N)),
    "logit_grad-smoothing": lambda rows: grad(rows, sum_grad=rows.new(N)),
    "logit_grad-everything": grad_with_everything,
    "logit_grad-everything-listed": lambda rows: grad_with_everything(rows, index(K)),
    "task_weights-paper": lambda rows: weigh_tasks(rows, K, published=False),
    "task_weights-published-many": lambda rows: weigh_tasks(rows, TASKS, published=True),
    "sample_means": lambda rows: sample_weights.sample_means(tokens(rows, SAMPLES)),
    "sample_weights-irdro": lambda rows: weigh_samples(rows, "irdro"),
    "sample_weights-linupper": lambda rows: weigh_samples(rows, "linupper"),
    "sample_means-extremes": lambda rows: weigh_tokens(rows, "extremes", K),
    "sample_means-rank": lambda rows: weigh_tokens(rows, "rank"),
}


@pytest.fixture
def launching(monkeypatch):
    """Launchers pick Triton for CPU tensors, and find ones in what a kernel would have written."""
    monkeypatch.setattr(common, "backend", lambda device: ("triton", "compiled only"))
    monkeypatch.setattr(
        common.Rows,
        "new",
        lambda rows, *shape, dtype=None: torch.ones(shape, dtype=dtype or rows.dtype),
    )


def launch(name: str, dtype: torch.dtype, num_classes: int, transform: dict) -> None:
    LAUNCHES[name](common.Rows(torch.zeros(1, N, num_classes, dtype=dtype), **transform))


def options(version: CompiledKernel) -> dict:
    """The dtype of the logits and the constants that a kernel was compiled with."""
    names = list(version.src.signature)
    constants = {names[place]: value for (place, *_), value in version.src.constants.items()}
    return {"logits": version.src.signature["logits"]} | constants


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kernel_compiles_without_spilling(name, target, launching):
    with compiling_for(target) as compiled:
        for given in INPUTS:
            launch(name, *given)
    assert compiled, "nothing was launched"
    spilling = [
        f"{kernel.__name__} {options(version)}: {resources}"
        for kernel, versions in compiled.items()
        for version in versions
        if (resources := Resources.of(version)).spills
    ]
    assert not spilling, "\n".join(spilling)


def test_no_kernel_is_left_out(launching):
    with compiling_for("sm_90") as compiled:
        for name in LAUNCHES:
            launch(name, torch.bfloat16, RAGGED, PLAIN)
    modules = [
        importlib.import_module(f"segloss.kernels.{found.name}")
        for found in pkgutil.iter_modules(segloss.kernels.__path__)
    ]
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert {kernel.__name__ for kernel in compiled} == {kernel.__name__ for kernel in kernels}


# Instructions per element of the loop over a row, in bf16. For scale: Liger's cross-entropy kernel
# takes 9.3 and 14.8. Memory is the limit up to about 15 and 30 on an H100, at full occupancy.
INSTRUCTIONS = {"row_stats": 10, "logit_grad": 14}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_row_loop_is_short(name, launching):
    with compiling_for("sm_90") as compiled:
        launch(name, torch.bfloat16, ALIGNED, PLAIN)
    ((version,),) = compiled.values()
    (loop,) = (loop for loop in loops(version) if loop.bytes_read)
    elements = loop.bytes_read / torch.bfloat16.itemsize
    assert loop.instructions / elements <= INSTRUCTIONS[name], loop


@triton.jit
def row_in_registers_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(out + offsets, values * tl.sum(values, axis=0))


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_sees_a_spill(target):
    """The kernel holds its row in registers: few when it is short, too many for a small share."""
    x = torch.zeros(8192)
    # half the register file or less for each thread: the only limit that either compiler takes
    limit = {"waves_per_eu": 8} if target == "gfx942" else {"maxnreg": 64}
    with compiling_for(target) as compiled:
        row_in_registers_kernel[(1,)](x, x, BLOCK=256, num_warps=1)
        row_in_registers_kernel[(1,)](x, x, BLOCK=8192, num_warps=1, **limit)
    short, long = (Resources.of(version) for version in compiled[row_in_registers_kernel])
    assert short.spills == 0 and 0 < short.registers < 64
    assert long.spills > 0 and long.registers == 64
