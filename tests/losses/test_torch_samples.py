"""PyTorch's own sample inputs of its two cross-entropies: the same value and the same gradients.

Ours has the classes last, where `F.cross_entropy` has them second; the samples are turned for it.
"""

from __future__ import annotations

import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F
from helpers import upstream_like
from torch import Tensor

import segloss

CROSS, LINEAR = "nn.functional.cross_entropy", "nn.functional.linear_cross_entropy"
# (name, variant): how many samples PyTorch 2.13 has
SAMPLES = {
    (CROSS, ""): 21,
    (LINEAR, ""): 119,
    (LINEAR, "chunked"): 133,
    (LINEAR, "chunked_none"): 77,
}


@pytest.fixture(scope="module")
def op_infos() -> dict:
    """PyTorch's table of sample inputs; of the package it asks for, nothing is used."""
    absent = types.ModuleType("expecttest")
    absent.TestCase = unittest.TestCase
    with pytest.MonkeyPatch.context() as patch:
        if "expecttest" not in sys.modules:
            patch.setitem(sys.modules, "expecttest", absent)
        from torch.testing._internal.common_methods_invocations import op_db
    return {(op.name, op.variant_test_name): op for op in op_db}


def grads(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, upstream_like(value)))


def classes_last(function, logits: Tensor, target: Tensor, **options) -> Tensor:
    if logits.dim() > 1:
        logits = logits.movedim(1, -1)
        target = target.movedim(1, -1) if target.is_floating_point() else target
    return function(logits, target, **options)


def run(ours: bool, name: str, sample, leaves: list[Tensor]) -> Tensor:
    """The sample's call with `leaves` for its trained tensors: input, and of a head its own."""
    options = dict(sample.kwargs)
    if "linear_bias" in options:
        options["linear_bias"] = leaves[2]
    if name == LINEAR:
        function = segloss.linear_cross_entropy if ours else F.linear_cross_entropy
        return function(leaves[0], leaves[1], sample.args[1].detach(), **options)
    if not ours:
        return F.cross_entropy(leaves[0], sample.args[0].detach(), **options)
    return classes_last(segloss.cross_entropy, leaves[0], sample.args[0].detach(), **options)


# theirs says where it falls back to plain code
@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.parametrize("name, variant", SAMPLES)
def test_the_same_value_and_gradients(op_infos, name, variant):
    seen = 0
    for sample in op_infos[name, variant].sample_inputs("cpu", torch.float64, requires_grad=True):
        tensors = [sample.input, *(sample.args[:1] if name == LINEAR else ())]
        if "linear_bias" in sample.kwargs:
            tensors.append(sample.kwargs["linear_bias"])
        results = []
        for ours in (True, False):
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            value = run(ours, name, sample, leaves)
            results.append([value.detach(), *grads(value, leaves)])
        seen += 1
        if results[1][0].isnan().all():  # no valid token: the exception that is documented
            assert (results[0][0] == 0).all()
            continue
        for a, b in zip(*results, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert seen >= SAMPLES[name, variant]


def test_one_token_alone():
    logits = torch.randn(5, dtype=torch.float64)
    for target in (torch.tensor(3), torch.rand(5, dtype=torch.float64)):
        for reduction in ("mean", "sum", "none"):
            ours = segloss.cross_entropy(logits, target, reduction=reduction)
            theirs = F.cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
