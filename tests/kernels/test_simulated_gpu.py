"""The branches of a GPU on a simulated one (`bench/simulated.py`): right, on one device, unhurried.

Truth is plain PyTorch in float64; what rounding may do is what it does to plain PyTorch in the same
dtype.
"""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import (
    CASE_MODES,
    HALF,
    MODES,
    OPTIONS,
    SET_OPTIONS,
    TOKENS,
    TRANSFORM,
    V,
    call_options,
    compare,
    compare_on_logits,
)
from helpers import SET_LOSSES, fused, naive, random_weights, relative_error
from linear_helpers import CASES, EVERYTHING, TOKEN_CASES, problem, stored

import segloss
from bench.simulated import SimulatedGpu, deterministic, on_cpu
from segloss.losses import lovasz


@pytest.mark.parametrize("name, mode", CASE_MODES)
def test_every_loss_and_way_of_computing(name, mode):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS, v=V, d=8)
    how = {"source_options": source_options, "transform": TRANSFORM, **options}
    gpu = compare(name, *CASES[name], tensors, target, trainable, **how)
    assert gpu.launches["row_stats_kernel"] >= (1 if "one chunk" in mode else 3)
    if name in TOKEN_CASES and not source_options.get("compact"):
        assert gpu.waits == {}


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_on_hidden_states(name, option):
    options = (call_options() | SET_OPTIONS)[option]
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    gpu = compare(name, fused(name), naive(name), tensors, target, **options)
    if name not in SET_LOSSES:
        assert gpu.waits == {}


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_on_logits(name, option):
    options = (call_options() | SET_OPTIONS)[option]
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"), dtype=HALF)
    gpu = compare_on_logits(name, fused(name), naive(name), stored(tensors), target, **options)
    if name not in SET_LOSSES:
        assert gpu.waits == {}


@pytest.mark.parametrize("name", CASES)
def test_the_filter_and_the_frozen_set_losses(name):
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    filtered = {"source_options": {"grad_filter": 2.0**-12}}
    compare(name, *CASES[name], tensors, target, **filtered)
    if name not in TOKEN_CASES:
        compare(name, *CASES[name], tensors, target, ("hidden",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "dice_loss", "lovasz_softmax"])
def test_every_dtype(name, dtype):
    tensors, target = problem(*TOKENS, v=V, d=8)
    chunk = {"source_options": {"chunk_bytes": 7 * V * dtype.itemsize}}
    compare(name, *CASES[name], tensors, target, EVERYTHING, dtype, **chunk)


# ------------------------------------------------------------------- what today's code was wrong in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "dice_loss"])
def test_a_hip_build_multiplies_without_out_dtype(name, dtype):
    tensors, target = problem(*TOKENS, v=V, d=8)
    gpu = SimulatedGpu(hip=True)
    compare(name, *CASES[name], tensors, target, EVERYTHING, dtype, gpu=gpu)


def test_a_kernel_runs_where_its_tensors_are():
    """Every launcher; beside what the losses do, the weighting and the projection."""
    losses = torch.rand(5, generator=torch.Generator().manual_seed(0))
    with SimulatedGpu() as gpu:
        coba = segloss.CoBa(num_tasks=5, warmup=1, history=3)
        for _ in range(3):
            coba.update(losses)
        coba.weights()
        segloss.SampleWeighting("irdro")(losses)
        from segloss.kernels import projection

        projection.back_project(projection.project(losses[None], 300)[0].double(), 5)
    ours = {"task_weights_kernel", "sample_weights_kernel", "tile_sums_kernel",
            "add_tiles_kernel", "back_project_kernel"}  # fmt: skip
    assert ours <= set(gpu.launches) and gpu.faults == []


def test_classes_may_lie_on_the_cpu():
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    ids = torch.tensor([7, 3, 5])
    p = torch.softmax(stored(tensors).double(), -1)[target != -100]
    logits = stored(tensors)
    there = on_cpu(ids)
    with SimulatedGpu() as gpu:
        stats = segloss.logit_statistics(logits, target, classes=there)
    assert gpu.faults == []
    assert torch.equal(stats.classes, ids)
    assert relative_error(stats.prob_sum, p.sum(0)[ids]) < 1e-12


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 1024**2 + 1])  # none, blocks of blocks
def test_a_running_sum(n):
    values = random_weights(n)
    with SimulatedGpu():
        total = lovasz.running_sum(values)
    assert torch.equal(total, values.cumsum(0))  # eighths: exact in any order


def test_lovasz_has_a_deterministic_algorithm():
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    weight = {"token_weight": random_weights(*TOKENS)}
    with deterministic():
        compare("lovasz_softmax", *CASES["lovasz_softmax"], tensors, target, **weight)
