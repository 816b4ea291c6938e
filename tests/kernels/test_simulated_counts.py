"""What a step costs on a simulated GPU, against `bench/limits.py`: launches, waits, bytes."""

from __future__ import annotations

import re

import pytest
import torch
from linear_helpers import problem, source, stored

import segloss
from bench import limits
from bench.simulated import SimulatedGpu, gradients

V, D, ROWS = 64, 8, 4
LOSSES = {
    "cross_entropy": segloss.CrossEntropyLoss(),
    "focal_loss": segloss.FocalLoss(),
    "dice_loss": segloss.DiceLoss(),
    "lovasz_softmax": segloss.LovaszSoftmaxLoss(),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Poison costs launches of its own."""


def simulate(loss, tensors, target, upstream=None, names=("hidden", "weight"), **options):
    """The GPU after a forward and a backward, and the gradients."""
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
    options = {"compact": False} | options
    with SimulatedGpu() as gpu:
        value = loss(source(leaves, **options), target)
        found = gradients(value, [leaves[n] for n in names], upstream)
    assert gpu.faults == []
    return gpu, found


def small(chunks: int, names=("hidden", "weight")):
    return problem(ROWS * chunks, v=V, d=D, dtype=torch.bfloat16, names=names)


def cost(name: str, chunks: int, **options) -> SimulatedGpu:
    chunk = V * ROWS * 2
    return simulate(LOSSES[name], *small(chunks), chunk_bytes=chunk, **options)[0]


def launched(gpu: SimulatedGpu) -> int:
    return gpu.operations + sum(gpu.launches.values())


@pytest.mark.parametrize("name", LOSSES)
def test_launches(name):
    few, many = (launched(cost(name, chunks)) for chunks in (4, 8))
    per_chunk = (many - few) / 4
    assert per_chunk <= limits.LAUNCHES_PER_CHUNK[name]
    assert few - 4 * per_chunk <= limits.LAUNCHES_ELSE[name]


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_waits_as_often_for_many_chunks(name):
    for chunks in (1, 4, 8):
        for budget in (None, 0):
            gpu = cost(name, chunks, memory_budget=budget)
            assert sum(gpu.waits.values()) <= limits.WAITS[name], gpu.waits
    gpu = cost(name, 4, compact=True)
    assert sum(gpu.waits.values()) <= limits.WAITS[name] + 2, gpu.waits
    gpu = simulate(LOSSES[name], *small(4), names=("hidden",), chunk_bytes=V * ROWS * 2)[0]
    assert sum(gpu.waits.values()) <= limits.WAITS[name] + 2, gpu.waits


def test_blocks_of_a_vocabulary_are_about_as_wide():
    """128,256 columns in four blocks, not in four of 32,000 and one of 256."""
    hidden, weight, target = large(4096, 128256, 64)
    with SimulatedGpu(data=False) as gpu:
        logits = segloss.LinearLogits(hidden, weight, compact=False, chunk_bytes=1024 * 128256 * 2)
        loss = segloss.FocalLoss(reduction="none")(logits, target)
        widths = []
        real = torch.mm

        def mm(a, b, **options):
            widths.append(b.shape[1])
            return real(a, b, **options)

        torch.mm = mm
        try:
            gradients(loss, [hidden, weight])
        finally:
            torch.mm = real
    blocks = [w for w in widths if w not in (64, 128256)]
    assert sum(blocks) == 128256 and max(blocks) <= 1.02 * min(blocks) + 128
    assert gpu.faults == []


def test_an_adapter_multiplies_dlogits_by_lora_b_once():
    """Of the head frozen, with an adapter of rank 2: 2 V D products, and 3 V r ones."""
    n = 6
    tensors, target = problem(n, v=V, d=D, dtype=torch.bfloat16)
    names = ("hidden", "a", "b")
    gpu, _ = simulate(segloss.CrossEntropyLoss(), tensors, target, names=names)
    r = 2
    head = 2 * 2 * n * V * D  # logits, dhidden
    through_b = 3 * 2 * n * V * r  # logits, dlogits @ B, dB
    through_a = 4 * 2 * n * r * D  # logits, again for dB, dhidden, dA
    assert gpu.ops.flop == head + through_b + through_a


@pytest.mark.parametrize(
    "dtype, upstream, exact", [(torch.bfloat16, 1 / 3, 3 / 4), (torch.float16, 65536.0, 1.0)]
)
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_upstream_factor_is_not_rounded(dtype, upstream, exact, chunks):
    """bf16(1 / 3) is 0.2 % off, fp16(65536) infinite. Held against a factor that any dtype has: the
    interpreter cuts bfloat16 off, both alike."""
    n = 255
    tensors, target = problem(n, v=V, d=D, dtype=dtype, names=("hidden", "weight"), ignored=0.0)
    size = n // chunks * V * 2
    found = [
        simulate(LOSSES["cross_entropy"], tensors, target, torch.tensor(u), chunk_bytes=size)[1]
        for u in (upstream, exact)
    ]
    for ours, same in zip(*found, strict=True):
        ours, same = ours.double(), same.double()
        factor = (ours * same).sum() / same.square().sum()
        assert factor * exact / upstream == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_gradients_survive_a_mean_over_many_tokens(autocast):
    """p / N is mostly below what float16 holds to all its digits; plain PyTorch multiplies by a
    loss scale first."""
    n, half = 1024, torch.float16
    tensors, target = problem(n, v=V, d=D, dtype=torch.float32, names=("hidden", "weight"))
    tensors["hidden"] = tensors["hidden"].half()
    tensors["weight"] = tensors["weight"] if autocast else tensors["weight"].half()
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    scale = torch.tensor(65536.0)
    with SimulatedGpu() as gpu, torch.autocast("cuda", half, enabled=autocast):
        value = segloss.linear_cross_entropy(*leaves.values(), target, compact=False)
        found = gradients(value, list(leaves.values()), scale)
    assert gpu.faults == []
    exact = {k: t.double().requires_grad_() for k, t in tensors.items()}
    loss = torch.nn.functional.cross_entropy(stored(exact), target)
    truth = torch.autograd.grad(loss * 65536, list(exact.values()))
    for ours, true in zip(found, truth, strict=True):
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 4 * torch.finfo(half).eps


# ---------------------------------------------------------------------- at the size of real heads

HEADS = {
    "Llama-3": (128256, 4096),
    "Gemma-3 1B": (262144, 1152),
    "Qwen-3": (151936, 4096),
    "SmolLM2": (49152, 576),
}


def large(n, v, d, dtype=torch.bfloat16):
    def shape(*size, **how):
        return torch.empty(size, device="meta", **how)

    hidden, weight = shape(n, d, dtype=dtype), shape(v, d, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), shape(n, dtype=torch.int64)


def step(n, head, loss, **options):
    """(GPU, plan, bytes of the gradients) of a step whose tensors have no data."""
    hidden, weight, target = large(n, *HEADS[head])
    with SimulatedGpu(data=False) as gpu:
        logits = segloss.LinearLogits(hidden, weight, compact=False, **options)
        plan = logits.explain(loss, target)
        before = gpu.ops.live
        gpu.ops.peak = before
        found = gradients(loss(logits, target), [hidden, weight])
    assert gpu.faults == [] and not gpu.waits
    return gpu, plan, sum(g.nbytes for g in found), gpu.peak - before


def said(plan: str, what: str) -> float:
    return float(re.search(rf"^{what}\s+([\d.]+)", plan, re.MULTILINE)[1])


@pytest.mark.parametrize("n", [512, 4096, 8192])
@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_passes_over_its_logits_once_and_a_half(head, n):
    """Statistics read a logit (2 bytes), the gradient reads and writes one (4); beside the
    products nothing passes over the gradients where there is one chunk."""
    gpu, plan, _, _ = step(n, head, segloss.CrossEntropyLoss())
    v, d = HEADS[head]
    assert said(plan, "chunks") >= 1
    kernels = {"row_stats_kernel": 2, "grad_rows_kernel": 4}
    moved = sum(each * gpu.rows[name] for name, each in kernels.items())
    assert moved == limits.LOGIT_PASSES * n * v
    if said(plan, "chunks") == 1:
        # the gradients come from the products in their own dtype, and are left alone by a factor
        # of 1: what is left is a copy of the states without the ignored ones, and vectors
        assert gpu.ops.flop == 6 * n * v * d
        assert gpu.moved <= 8 * n * d + 400 * n
        large_ones = gpu.rows["scale_kernel"]
        assert large_ones == v * d + n * d


LARGE_LOSSES = {
    "cross_entropy": (segloss.CrossEntropyLoss(), {}),
    "several chunks": (segloss.CrossEntropyLoss(), {"chunk_bytes": 512 << 20}),
    "none": (segloss.FocalLoss(reduction="none"), {}),
    "none, nothing kept": (segloss.FocalLoss(reduction="none"), {"memory_budget": 0}),
}


@pytest.mark.parametrize("case", LARGE_LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_explain_says_the_peak(head, case):
    loss, options = LARGE_LOSSES[case]
    _, plan, grads, peak = step(8192, head, loss, **options)
    assert said(plan, "peak") * 2**20 == pytest.approx(peak - grads, rel=limits.EXPLAINED)


def test_one_chunk_where_a_sum_would_take_as_much():
    """At a Llama-3 head 8,192 tokens make one chunk of 2.1 GB, not four and a sum of 2.1 GB."""
    gpu, plan, grads, peak = step(8192, "Llama-3", segloss.CrossEntropyLoss())
    assert said(plan, "chunks") == 1
    assert peak - grads < 2.3e9
    assert gpu.launches["row_stats_kernel"] == 1


def test_many_chunks_are_added_up_by_their_products():
    gpu, plan, _, _ = step(8192, "Llama-3", segloss.CrossEntropyLoss(), chunk_bytes=512 << 20)
    assert said(plan, "chunks") == 4
    assert gpu.ops.count["addmm"] == 3
    v, d = HEADS["Llama-3"]
    # no pass over dweight but the cast at the end, which is the scale kernel's
    assert gpu.moved < 4 * v * d
