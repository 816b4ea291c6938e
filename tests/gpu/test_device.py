"""What only a GPU can show: `pytest -m gpu`, on one. Chosen by its marker, so never by accident.

The truth is the naive float64 reference on the CPU. Sizes are small but for the one that is not.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    LOSSES,
    TOKEN_LOSSES,
    TOLERANCE,
    example,
    fused,
    naive,
    relative_error,
    value_and_grad,
)
from linear_helpers import problem

import segloss

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# V: odd, so rows start anywhere; and whole tiles with 16-byte loads
WIDTHS = (4099, 8192)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_as_good_as_plain(actual, plain, truth, dtype):
    for ours, theirs, exact in zip(actual, plain, truth, strict=True):
        allowed = 2 * relative_error(theirs.cpu(), exact) + TOLERANCE[dtype]
        assert relative_error(ours.cpu(), exact) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", WIDTHS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_logits(name, v, dtype):
    logits, target = example(33, v, dtype=dtype)
    truth = value_and_grad(naive(name), logits.double(), target)
    plain = value_and_grad(naive(name), logits.to(CUDA), target.to(CUDA))
    actual = value_and_grad(fused(name), logits.to(CUDA), target.to(CUDA))
    assert_as_good_as_plain(actual, plain, truth, dtype)


def head_grads(loss, tensors, target, **options):
    """Value and gradients of every tensor (hidden, weight)."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    value = loss(leaves, target, **options)
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]


def linear(name):
    def loss(leaves, target, **options):
        return getattr(segloss, f"linear_{name}")(*leaves.values(), target, **options)

    return loss


def stored(name):
    def loss(leaves, target):
        hidden, weight = leaves.values()
        return naive(name)(hidden @ weight.T, target)

    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_hidden_states(name):
    dtype = torch.bfloat16
    tensors, target = problem(300, v=4099, d=64, dtype=dtype, names=("hidden", "weight"))
    there = {key: x.to(CUDA) for key, x in tensors.items()}
    truth = head_grads(stored(name), {k: x.double() for k, x in tensors.items()}, target)
    plain = head_grads(stored(name), there, target.to(CUDA))
    # several chunks
    actual = head_grads(linear(name), there, target.to(CUDA), chunk_bytes=128 * 4099 * 2)
    assert_as_good_as_plain(actual, plain, truth, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_same_inputs_same_bits(name):
    logits, target = (x.to(CUDA) for x in example(300, 4099, dtype=torch.bfloat16))
    first = value_and_grad(fused(name), logits, target)
    for _ in range(5):
        again = value_and_grad(fused(name), logits, target)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_target_out_of_range_is_nan(name):
    logits, _ = example(3, 507, dtype=torch.float32)
    target = torch.tensor([5, 507, 2**40], device=CUDA)
    loss = fused(name)(logits.to(CUDA), target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


@contextmanager
def never_waiting():
    """A synchronisation inside raises."""
    with warnings.catch_warnings():
        # that the mode is a prototype: torch says so once, and a warning is an error here
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_never_wait_for_the_device(name):
    tensors, target = problem(300, v=507, d=64, dtype=torch.bfloat16, names=("hidden", "weight"))
    there, target = {key: x.to(CUDA) for key, x in tensors.items()}, target.to(CUDA)
    head_grads(linear(name), there, target, compact=False)  # compiles
    with never_waiting():
        head_grads(linear(name), there, target, compact=False)
        head_grads(linear(name), there, target, compact=False, normalizer=17.0)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_captured_graph_replays_on_new_inputs(name):
    """Forward and backward are captured with one batch, and replayed with another."""
    tensors, target = problem(300, v=507, d=64, dtype=torch.bfloat16, names=("hidden", "weight"))
    static = [x.to(CUDA).requires_grad_() for x in tensors.values()]
    static_target = target.to(CUDA)

    def step():
        value = getattr(segloss, f"linear_{name}")(*static, static_target, compact=False)
        return [value.detach(), *torch.autograd.grad(value, static)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the caches, outside the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others, other_target = problem(
        300, v=507, d=64, seed=1, dtype=torch.bfloat16, names=("hidden", "weight")
    )
    with torch.no_grad():
        for place, value in zip(static, others.values(), strict=True):
            place.copy_(value)
        static_target.copy_(other_target)
    graph.replay()
    replayed = [x.clone() for x in captured]
    # cuBLAS may choose another algorithm inside a graph
    for replay, eager in zip(replayed, step(), strict=True):
        assert relative_error(replay, eager) <= TOLERANCE[torch.bfloat16]


def test_more_than_two_to_the_31_logits():
    """8.6 GB of logits and gradient: the last rows come out as they do by themselves."""
    v, n, few = 131072, 2**14 + 64, 64  # n * v > 2**31
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device=CUDA)
    tail, tail_target = example(few, v, dtype=torch.bfloat16, ignored=0)
    logits[-few:] = tail.to(CUDA)
    target = torch.full((n,), -100, device=CUDA)
    target[-few:] = tail_target.to(CUDA)
    alone = value_and_grad(segloss.focal_loss, tail.to(CUDA), tail_target.to(CUDA))
    value, grad = value_and_grad(segloss.focal_loss, logits, target)
    assert relative_error(value, alone[0]) <= TOLERANCE[torch.float32]
    assert relative_error(grad[-few:], alone[1]) <= TOLERANCE[torch.bfloat16]
    assert not grad[:-few].any()
