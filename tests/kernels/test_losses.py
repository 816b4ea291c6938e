"""Losses on the Triton kernels from end to end, as a GPU runs them: value and gradient."""

import pytest
import torch
from helpers import (
    LOSSES,
    LOVASZ,
    REGION_LOSSES,
    assert_close_to_float64,
    assert_matches_reference,
    assert_near,
    example,
    random_weights,
    value_and_grad,
)
from kernel_helpers import on_both

import segloss

VARIANTS = [(name, {}) for name in LOSSES]
VARIANTS += [("cross_entropy", {"label_smoothing": 0.2, "z_loss": 0.01})]
VARIANTS += [("dice_loss", {"classes": "all", "per_sample": True, "average": "micro"})]
VARIANTS += [("tversky_loss", {"classes": "all", "reduction": "none"})]
VARIANTS += [("lovasz_softmax", {"classes": "all"}), ("lovasz_softmax", {"per_sample": True})]
every_variant = pytest.mark.parametrize("name, options", VARIANTS, ids=str)


@every_variant
def test_every_loss_in_float64(name, options, memory):
    logits, target = example(3, 5, 67)
    weights = {"token_weight": random_weights(3, 5), "weight": random_weights(67, seed=2)}
    assert_matches_reference(name, logits, target, **weights, **options)
    assert memory.launches >= 2


@pytest.mark.parametrize("name", ["cross_entropy", *REGION_LOSSES, *LOVASZ])
def test_every_loss_in_bfloat16(name):
    logits, target = example(3, 5, 67, dtype=torch.bfloat16)
    assert_close_to_float64(name, logits, target)


EVERYTHING = (
    0.5 * segloss.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-3)
    + 0.3 * segloss.DiceLoss(classes="all", per_sample=True)
    + 0.2 * segloss.LovaszSoftmaxLoss(classes="all")
)
TRANSFORM = {"softcap": 7.3, "scale": 0.3}


def assert_backends_agree(run):
    (value, grad), (twin_value, twin_grad) = on_both(run)
    assert_near(value, twin_value, 1e-12)
    assert_near(grad, twin_grad, 1e-12)


def test_everything_at_once_on_both_backends():
    """All statistics and all terms of the gradient, through a softcap."""
    logits, target = example(3, 7, 507)
    assert_backends_agree(
        lambda: value_and_grad(
            EVERYTHING, logits, target, lambda x: segloss.DenseLogits(x, **TRANSFORM)
        )
    )


@pytest.mark.parametrize("loss", [EVERYTHING, segloss.CrossEntropyLoss()], ids=["all", "fused"])
def test_a_head_on_both_backends(loss):
    """The kernels work on chunks of rows, on blocks of the vocabulary, and over the logits."""
    _, target = example(3, 7, 507)
    hidden, weight = torch.randn(3, 7, 8).double(), torch.randn(507, 8).double()

    def source(weight):
        return segloss.LinearLogits(hidden, weight, chunk_bytes=8 * 507 * 8, **TRANSFORM)

    assert_backends_agree(lambda: value_and_grad(loss, weight, target, source))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrong", [67, -1, 10**6])
def test_a_target_out_of_range_is_nan_and_never_a_stray_read(name, wrong, monkeypatch, memory):
    """As on a GPU, where nobody looks at the values first; the memory guard sees every access."""
    monkeypatch.setattr(segloss.sweep.batch, "check_range", lambda *arguments: None)
    logits, target = example(3, 5, 67)
    target[1, 2] = wrong
    value, _ = value_and_grad(getattr(segloss, name), logits, target)
    assert value.isnan()
    assert memory.launches >= 2
