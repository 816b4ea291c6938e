"""The branches of a GPU on a simulated one (`bench/simulated.py`): right, on one device, unhurried.

Truth is plain PyTorch in float64; what rounding may do is what it does to plain PyTorch in the same
dtype.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    LOSSES,
    SET_LOSSES,
    TOLERANCE,
    fused,
    naive,
    random_weights,
    relative_error,
    upstream_like,
)
from linear_helpers import (
    CASES,
    EVERYTHING,
    TOKEN_CASES,
    problem,
    source,
    stored,
)

import segloss
from bench.simulated import SimulatedGpu, deterministic, gradients, on_cpu
from segloss.losses import lovasz

HALF = torch.bfloat16
# V: blocks of a vocabulary that does not divide evenly; tokens in samples, some of them ignored
V, TOKENS = 37, (3, 8)
CHUNK = V * 7 * 2  # of bfloat16 logits: seven rows, which does not divide evenly either

# what is trainable, the source's options and the reduction: each way of computing, and each option
MODES = {
    "fused": (EVERYTHING, {}, {}),
    "fused, compact": (EVERYTHING, {"compact": True}, {}),
    "fused, one chunk": (("hidden", "weight"), {"chunk_bytes": None}, {}),
    "fused, frozen head": (("hidden",), {}, {}),
    "fused, head only": (("weight",), {}, {}),
    "fused, adapter": (("hidden", "a", "b"), {}, {}),
    "frozen": (("hidden",), {}, {"reduction": "none"}),
    "recompute": (EVERYTHING, {}, {"reduction": "none"}),
    "recompute, compact": (("hidden", "weight"), {"compact": True}, {"reduction": "none"}),
    "recompute, some kept": (EVERYTHING, {"memory_budget": 2 * CHUNK}, {"reduction": "none"}),
    "recompute, adapter": (("hidden", "a", "b"), {}, {"reduction": "none"}),
    "no grad": ((), {}, {}),
}
CASE_MODES = [
    (name, mode)
    for name in CASES
    for mode in MODES
    if name != "0.6 ce + 0.4 lovasz" or "reduction" not in MODES[mode][2]
]
TRANSFORM = {"softcap": 20.0, "scale": 0.75}


def run(loss, logits_of, tensors, target, trainable, on=None, **options):
    """[value, a gradient per trainable tensor], `on` a simulated GPU or plainly."""
    names = [name for name in trainable if name in tensors]
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
    wanted = [leaves[n] for n in names]
    if on is None:
        value = loss(logits_of(leaves), target, **options)
        return [value.detach(), *torch.autograd.grad(value, wanted, upstream_like(value))] if (
            wanted
        ) else [value.detach()]  # fmt: skip
    up = {}  # by shape; its dice are thrown outside, on the CPU
    with on:
        value = loss(logits_of(leaves), target, **options)
    up = upstream_like(value.detach())
    with on:
        return [value.detach(), *(gradients(value, wanted, up) if wanted else [])]


def compare(name, ours, truth, tensors, target, trainable=("hidden", "weight"), dtype=HALF, **how):
    """Ours on a simulated GPU as close to float64 as plain PyTorch; the GPU.

    `how`: the options of each call, `source_options` of ours and `transform` of both.
    """
    source_options, transform = how.pop("source_options", {}), how.pop("transform", {})
    gpu = how.pop("gpu", None) or SimulatedGpu()
    more = {"compact": False, "chunk_bytes": CHUNK} | source_options | transform
    small = {key: x.to(dtype) for key, x in tensors.items()}
    exact = {key: x.double() for key, x in small.items()}
    true = run(truth, lambda t: stored(t, **transform), exact, target, trainable, **how)
    plain = run(truth, lambda t: stored(t, **transform), small, target, trainable, **how)
    mine = run(ours, lambda t: source(t, **more), small, target, trainable, gpu, **how)
    for place, (a, b, c) in enumerate(zip(mine, plain, true, strict=True)):
        allowed = 2 * relative_error(b, c) + max(TOLERANCE[dtype], torch.finfo(dtype).eps)
        error = relative_error(a, c)
        assert error <= allowed, f"{name}, result {place}: {error:.2g} > {allowed:.2g}"
    assert gpu.faults == []
    return gpu


@pytest.mark.parametrize("name, mode", CASE_MODES)
def test_every_loss_and_way_of_computing(name, mode):
    trainable, source_options, options = MODES[mode]
    tensors, target = problem(*TOKENS, v=V, d=8)
    how = {"source_options": source_options, "transform": TRANSFORM, **options}
    gpu = compare(name, *CASES[name], tensors, target, trainable, **how)
    assert gpu.launches["row_stats_kernel"] >= (1 if "one chunk" in mode else 3)
    if name in TOKEN_CASES and not source_options.get("compact"):
        assert gpu.waits == {}


def call_options() -> dict[str, dict]:
    some = random_weights(*TOKENS, seed=2)
    some.view(-1)[::3] = 0
    return {
        "sum": {"reduction": "sum"},
        "token weight": {"token_weight": some},
        "class weight": {"weight": random_weights(V)},
        "normalizer": {"normalizer": 40.0},
    }


SET_OPTIONS = {
    "all": {"classes": "all"},
    "per sample": {"per_sample": True},
    "per sample, all": {"per_sample": True, "classes": "all", "reduction": "none"},
    "sample ids": {"per_sample": True, "sample_ids": torch.arange(24).view(TOKENS) % 5 - 2},
}
OPTIONS = [(name, option) for name in LOSSES for option in call_options()]
OPTIONS += [(name, option) for name in SET_LOSSES for option in SET_OPTIONS]


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_on_hidden_states(name, option):
    options = (call_options() | SET_OPTIONS)[option]
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    gpu = compare(name, fused(name), naive(name), tensors, target, **options)
    if name not in SET_LOSSES:
        assert gpu.waits == {}


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_on_logits(name, option):
    """The logits are one large tensor, strided."""
    options = (call_options() | SET_OPTIONS)[option]
    tensors, target = problem(*TOKENS, v=V, d=8, names=("hidden", "weight"))
    logits = stored({key: x.to(HALF) for key, x in tensors.items()})
    wider = torch.cat([logits, logits[:, :1]], 1)
    pair = {"hidden": wider}

    def rows(leaves):
        return leaves["hidden"][:, :-1]

    true = run(naive(name), rows, {"hidden": wider.double()}, target, pair, **options)
    plain = run(naive(name), rows, pair, target, pair, **options)
    gpu = SimulatedGpu()
    mine = run(fused(name), rows, pair, target, pair, gpu, **options)
    for a, b, c in zip(mine, plain, true, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + TOLERANCE[HALF]
    assert gpu.faults == []
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
