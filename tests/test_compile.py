"""Every Triton kernel compiles for GPUs that are not there, within `bench/limits.py`.

Needs a process without TRITON_INTERPRET, under which kernels cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import segloss.kernels
from bench import kernels, limits
from bench.compiled import TARGETS, compiling_for
from bench.launches import ALIGNED, INPUTS, LAUNCHES, PLAIN, RAGGED, launch
from segloss.kernels import logit_grad, row_stats

ROOT = Path(__file__).resolve().parents[1]
COUNTED = [(torch.bfloat16, ALIGNED, PLAIN)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kernel_compiles_within_the_limits(name, target):
    rows = kernels.compile_ours(target, name)
    lines = [kernels.spill_line(rows), *kernels.cost_lines(rows)]
    counted = name in limits.SM_90_BF16 and target == "sm_90"
    assert [line.what.split()[-3:-2] for line in lines[1:]] == [["instructions"]] * counted
    assert all(line.verdict == "pass" for line in lines), lines
    assert len({(row["dtype"], row["columns"]) for row in rows}) == len(INPUTS)


def test_no_kernel_is_left_out():
    with compiling_for("sm_90") as compiled:
        for name in LAUNCHES:
            launch(name, torch.bfloat16, RAGGED, PLAIN)
    modules = [
        importlib.import_module(f"segloss.kernels.{found.name}")
        for found in pkgutil.iter_modules(segloss.kernels.__path__)
    ]
    expected = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert {kernel.__name__ for kernel in compiled} == {kernel.__name__ for kernel in expected}


def test_bytes_per_logit_are_within_the_limits():
    """Counted in the interpreter: statistics read a logit once, the gradient writes one too."""
    command = [sys.executable, "-m", "bench.traffic", *limits.SM_90_BF16]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    traffic = json.loads(printed.stdout)
    assert traffic["row_stats"]["row_stats_kernel"]["read"] == 2
    assert traffic["row_stats"]["row_stats_kernel"]["written"] == 0
    assert traffic["logit_grad"]["grad_rows_kernel"]["read"] == 2
    assert traffic["logit_grad"]["grad_rows_kernel"]["written"] == 2
    rows = [row for name in traffic for row in kernels.compile_ours("sm_90", name, COUNTED)]
    kernels.derive(rows, traffic)
    lines = kernels.gate(rows)
    assert len(lines) == 9 and all(line.verdict == "pass" for line in lines), lines


# ------------------------------------------------------------------------- the gate sees faults


@triton.jit
def dividing_softmax(z, row_max, exp_sum):
    """The running maximum and sum with one division per element, as if by a temperature."""
    return undivided(z / (1.0 + exp_sum)[:, None], row_max, exp_sum)


undivided = row_stats.online_softmax


def recompiled(module, name: str, monkeypatch) -> None:
    """A kernel that has seen none of the module's functions yet."""
    monkeypatch.setattr(module, name, triton.jit(getattr(module, name).fn))


@triton.jit
def dividing_grad(rows, terms, of_row, z, is_target, extra, column_weight, rest):
    exp_z = tl.exp2((z - of_row.row_max) * 1.4426950408889634)
    return exp_z / tl.exp(of_row.log_sum) * of_row.prob_coef


@pytest.mark.parametrize(
    "module, kernel, inner, dividing",
    [
        (row_stats, "row_stats_kernel", "online_softmax", dividing_softmax),
        (logit_grad, "grad_rows_kernel", "grad_tile", dividing_grad),
    ],
    ids=["row_stats", "logit_grad"],
)
def test_a_division_per_element_is_over_the_limit(module, kernel, inner, dividing, monkeypatch):
    recompiled(module, kernel, monkeypatch)
    monkeypatch.setattr(module, inner, dividing)
    launch = module.__name__.rpartition(".")[2]
    rows = kernels.compile_ours("sm_90", launch, COUNTED)
    (line,) = kernels.cost_lines(rows)
    assert line.verdict == "MISS" and line.value > limits.SM_90_BF16[launch]["instructions"]


@triton.jit
def row_in_registers_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(out + offsets, values * tl.sum(values, axis=0))


@pytest.mark.parametrize("target", TARGETS)
def test_a_spill_is_over_the_limit(target):
    """The kernel holds its row in registers: few when it is short, too many for a small share."""
    x = torch.zeros(8192)
    # half the register file or less for each thread: the only limit that either compiler takes
    limit = {"waves_per_eu": 8} if target == "gfx942" else {"maxnreg": 64}
    with compiling_for(target) as compiled:
        row_in_registers_kernel[(1,)](x, x, BLOCK=256, num_warps=1)
        row_in_registers_kernel[(1,)](x, x, BLOCK=8192, num_warps=1, **limit)
    head = {"whose": "segloss", "launch": "row", "target": target, "dtype": "float32"}
    short, long = (
        head | kernels.describe(version, with_loops=False)
        for version in compiled[row_in_registers_kernel]
    )
    assert short["spills"] == 0 and 0 < short["registers"] < 64
    assert long["spills"] > 0 and long["registers"] == 64
    assert kernels.spill_line([short]).verdict == "pass"
    assert kernels.spill_line([short, long]).verdict == "MISS"
