"""`torch.nn.functional.linear_cross_entropy` restated: every keyword it shares with ours.

The sweep is that of PyTorch's own tests of it (sizes, ignore_index, smoothing, weights, bias),
less what ours does not take: probability targets, K-dimensional losses, an input without a batch.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, upstream_like
from linear_helpers import CASES

import segloss

N, D, V = 8, 5, 4
REDUCTIONS = ["mean", "sum", "none"]
SHARED = ["linear_bias", "weight", "reduction", "ignore_index", "label_smoothing"]


def inputs(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    target = torch.randint(V, (N,), generator=draw)
    return random(N, D), random(V, D), random(V), random(V).exp(), target


def value_and_grads(function, tensors, target, **options):
    """Value and the gradients of input, linear_weight and, if given, linear_bias."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    if len(leaves) == 3:
        options["linear_bias"] = leaves[2]
    value = function(leaves[0], leaves[1], target, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_like(value))]


def assert_same(tensors, target, tolerance, **options):
    ours = value_and_grads(segloss.linear_cross_entropy, tensors, target, **options)
    theirs = value_and_grads(F.linear_cross_entropy, tensors, target, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, b) <= tolerance or (a - b).norm() <= tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_shared_keyword(reduction, label_smoothing, weighted, bias, dtype, tolerance):
    hidden, head, linear_bias, weight, target = inputs(dtype)
    tensors = [hidden, head, linear_bias] if bias else [hidden, head]
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = weight
    assert_same(tensors, target, tolerance, **options)
    for ignore_index in (-100, (V - 1) // 2, V + 5):
        some = target.clone()
        some[N // 2] = ignore_index
        some[0] = 0
        assert_same(tensors, some, tolerance, ignore_index=ignore_index, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_valid_token_the_mean_is_0_where_theirs_is_nan(reduction, weighted):
    hidden, head, linear_bias, weight, target = inputs(torch.float64)
    tensors = [hidden, head, linear_bias]
    options = {"reduction": reduction, "weight": weight if weighted else None}
    nothing = torch.full_like(target, -100)
    ours = value_and_grads(segloss.linear_cross_entropy, tensors, nothing, **options)
    theirs = value_and_grads(F.linear_cross_entropy, tensors, nothing, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, torch.zeros_like(b))
    if reduction == "mean":
        assert theirs[0].isnan()
    else:
        assert torch.equal(ours[0], theirs[0])


def test_without_any_class_weight_the_mean_is_0_where_theirs_is_nan():
    hidden, head, _, _, target = inputs(torch.float64)
    options = {"weight": torch.zeros(V).double()}
    ours = value_and_grads(segloss.linear_cross_entropy, [hidden, head], target, **options)
    theirs = value_and_grads(F.linear_cross_entropy, [hidden, head], target, **options)
    assert theirs[0].isnan() and ours[0] == 0
    assert all((grad == 0).all() for grad in ours[1:])


def test_the_defaults_are_the_same():
    hidden, head, _, _, target = inputs(torch.float64)
    assert_same([hidden, head], target, 1e-12)
    ours = inspect.signature(segloss.linear_cross_entropy).parameters
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    assert list(ours)[:3] == list(theirs)[:3] == ["input", "linear_weight", "target"]
    for name in SHARED:
        assert ours[name].kind == theirs[name].kind == inspect.Parameter.KEYWORD_ONLY
        if name != "ignore_index":  # None there means -100
            assert ours[name].default == theirs[name].default
    assert ours["ignore_index"].default == -100


@pytest.mark.parametrize("name", [n for n in CASES if hasattr(segloss, f"linear_{n}")])
def test_every_linear_function_has_that_signature(name):
    function = getattr(segloss, f"linear_{name}")
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:4] == ["input", "linear_weight", "target", "linear_bias"]
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[3:])
    hidden, head, linear_bias, weight, target = inputs(torch.float64)
    positional = function(hidden, head, target, linear_bias=linear_bias, weight=weight)
    named = function(
        input=hidden, linear_weight=head, target=target, linear_bias=linear_bias, weight=weight
    )
    assert torch.equal(positional, named)
    stored = CASES[name][1](F.linear(hidden, head, linear_bias), target, weight=weight)
    assert torch.allclose(positional, stored, rtol=1e-12)
    with pytest.raises(TypeError):
        function(hidden, head, target, linear_bias)
    with pytest.raises(TypeError, match="reduce"):
        function(hidden, head, target, reduce="mean")


def test_leading_dimensions_need_no_flattening():
    hidden, head, linear_bias, weight, target = inputs(torch.float64)
    for reduction in REDUCTIONS:
        options = {"linear_bias": linear_bias, "weight": weight, "reduction": reduction}
        flat = F.linear_cross_entropy(hidden, head, target, **options)
        batch = segloss.linear_cross_entropy(
            hidden.view(2, 4, D), head, target.view(2, 4), **options
        )
        assert batch.shape == ((2, 4) if reduction == "none" else ())
        assert torch.allclose(batch.flatten(), flat.flatten(), rtol=1e-12)


def test_chunks_are_as_exact_as_theirs():
    hidden, head, linear_bias, weight, target = inputs(torch.float64)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    row = V * hidden.element_size()
    for reduction in REDUCTIONS[:2]:  # theirs takes no smoothing in chunks
        shared = {"weight": weight, "reduction": reduction}
        leaves = [t.clone().requires_grad_() for t in (hidden, head, linear_bias)]
        theirs = F.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], options=options, **shared
        )
        their_grads = torch.autograd.grad(theirs, leaves)
        ours = segloss.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], chunk_bytes=2 * row, **shared
        )
        our_grads = torch.autograd.grad(ours, leaves)
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-12
        for a, b in zip(our_grads, their_grads, strict=True):
            assert relative_error(a, b) <= 1e-12
