"""Weighted sums of losses: the sum of the parts, in one sweep."""

import pytest
import torch
from helpers import (
    LOSSES,
    TOKEN_LOSSES,
    assert_near,
    example,
    module,
    random_weights,
    value_and_grad,
)

import segloss
from segloss import reference

V = 11


def assert_is_the_sum(combined, parts, logits, target, **options):
    """`parts`: (coefficient, naive loss, its constructor's options)."""
    value, grad = value_and_grad(combined, logits, target, **options)

    def naive_sum(z, y):
        return sum(c * loss(z, y, **own, **options) for c, loss, own in parts)

    true_value, true_grad = value_and_grad(naive_sum, logits, target)
    assert_near(value, true_value)
    assert_near(grad, true_grad)


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_and_any_loss(name):
    logits, target = example(3, 5, V)
    combined = 0.6 * segloss.CrossEntropyLoss() + 0.4 * module(name)
    assert isinstance(combined, segloss.CombinedLoss)
    assert isinstance(combined, torch.nn.Module)
    parts = [(0.6, reference.cross_entropy, {}), (0.4, getattr(reference, name), {})]
    assert_is_the_sum(combined, parts, logits, target)
    assert_is_the_sum(combined, parts, logits, target, token_weight=random_weights(3, 5))
    assert_is_the_sum(combined, parts, logits, target, normalizer=31.0)


@pytest.mark.parametrize("options", [{}, {"classes": "all"}, {"per_sample": True}], ids=str)
def test_everything_at_once(options):
    logits, target = example(3, 5, V)
    weight = random_weights(V)
    combined = (
        0.3 * segloss.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.01, weight=weight)
        + 0.2 * segloss.FocalLoss(gamma=0.5)
        + 0.1 * segloss.DiceLoss(**options)
        + 1.5 * segloss.GeneralizedDiceLoss(smooth=0.1)
        + 0.7 * segloss.FocalTverskyLoss(average="micro", weight=weight)
        + 0.25 * segloss.LovaszSoftmaxLoss(**options)
        + 0.4 * segloss.LovaszSoftmaxLoss(weight=weight)
    )
    parts = [
        (0.3, reference.cross_entropy, {"label_smoothing": 0.1, "z_loss": 0.01, "weight": weight}),
        (0.2, reference.focal_loss, {"gamma": 0.5}),
        (0.1, reference.dice_loss, options),
        (1.5, reference.generalized_dice_loss, {"smooth": 0.1}),
        (0.7, reference.focal_tversky_loss, {"average": "micro", "weight": weight}),
        (0.25, reference.lovasz_softmax, options),
        (0.4, reference.lovasz_softmax, {"weight": weight}),
    ]
    assert_is_the_sum(combined, parts, logits, target)
    some = random_weights(3, 5)
    some[1, 2:] = 0
    assert_is_the_sum(combined, parts, logits, target, token_weight=some, normalizer=20.0)


def test_present_and_all_and_per_sample_in_one_sum():
    logits, target = example(12, V)
    ids = torch.arange(12) % 4
    combined = (
        segloss.DiceLoss()
        + 2.0 * segloss.DiceLoss(classes="all")
        + 3.0 * segloss.JaccardLoss(per_sample=True)
        + 4.0 * segloss.LovaszSoftmaxLoss(per_sample=True, classes="all")
    )
    parts = [
        (1.0, reference.dice_loss, {}),
        (2.0, reference.dice_loss, {"classes": "all"}),
        (3.0, reference.jaccard_loss, {"per_sample": True, "sample_ids": ids}),
        (4.0, reference.lovasz_softmax, {"per_sample": True, "sample_ids": ids, "classes": "all"}),
    ]
    value, grad = value_and_grad(combined, logits, target, sample_ids=ids)
    truth = value_and_grad(
        lambda z, y: sum(c * loss(z, y, **own) for c, loss, own in parts), logits, target
    )
    assert_near(value, truth[0])
    assert_near(grad, truth[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_sum_of_token_losses_is_a_token_loss(reduction):
    logits, target = example(3, 5, V)
    parts = [(0.1 * (i + 1), getattr(reference, name), {}) for i, name in enumerate(TOKEN_LOSSES)]
    losses = [
        c * module(name, reduction=reduction)
        for (c, _, _), name in zip(parts, TOKEN_LOSSES, strict=True)
    ]
    combined = losses[0]
    for loss in losses[1:]:
        combined = combined + loss
    assert_is_the_sum(
        combined, [(c, f, {"reduction": reduction}) for c, f, _ in parts], logits, target
    )
    if reduction == "none":
        assert combined(logits, target).shape == target.shape


def test_coefficients_multiply():
    logits, target = example(7, V)
    nested = 2.0 * (0.5 * segloss.CrossEntropyLoss() + 0.25 * segloss.DiceLoss())
    parts = [(1.0, reference.cross_entropy, {}), (0.5, reference.dice_loss, {})]
    assert_is_the_sum(nested, parts, logits, target)
    more = nested + segloss.FocalLoss()
    assert_is_the_sum(more, [*parts, (1.0, reference.focal_loss, {})], logits, target)
    assert_is_the_sum(nested, parts, logits, target)  # adding to a sum leaves it as it was


def test_softcap_reaches_every_part():
    logits, target = example(7, V)
    combined = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss()
    value, grad = value_and_grad(
        combined, logits, target, source=lambda z: segloss.DenseLogits(z, softcap=3.0, scale=0.7)
    )

    def truth(z, y):
        z = reference.transform(z, 3.0, 0.7)
        return 0.6 * reference.cross_entropy(z, y) + 0.4 * reference.lovasz_softmax(z, y)

    true_value, true_grad = value_and_grad(truth, logits, target)
    assert_near(value, true_value)
    assert_near(grad, true_grad)


def test_statistics_come_from_the_same_sweep():
    logits, target = example(7, V)
    combined = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss()
    loss, statistics = combined(logits, target, return_statistics=True)
    assert torch.equal(loss, combined(logits, target))
    true = reference.logit_statistics(logits, target, entropy=True, argmax=True)
    assert_near(statistics.log_prob, true.log_prob)
    assert_near(statistics.entropy, true.entropy)
    assert torch.equal(statistics.argmax, true.argmax)


def test_other_ignore_index():
    logits, target = example(7, V)
    target = target.masked_fill(target == -100, 3)
    own = {"ignore_index": 3}
    combined = segloss.CrossEntropyLoss(**own) + segloss.DiceLoss(**own)
    parts = [(1.0, reference.cross_entropy, own), (1.0, reference.dice_loss, own)]
    assert_is_the_sum(combined, parts, logits, target)
    with pytest.raises(ValueError, match="ignore_index"):
        loss = segloss.CrossEntropyLoss(ignore_index=3) + segloss.DiceLoss()
        loss(logits, target)


def test_gradcheck():
    logits, target = example(2, 3, 5, classes=3)
    logits.requires_grad_()
    combined = 0.6 * segloss.CrossEntropyLoss(label_smoothing=0.1) + 0.4 * segloss.DiceLoss()
    assert torch.autograd.gradcheck(lambda z: combined(z, target), logits)


def test_without_a_valid_token_the_sum_is_zero_and_connected():
    logits, target = example(2, 3, 5)
    combined = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss()
    value, grad = value_and_grad(combined, logits, torch.full_like(target, -100))
    assert value == 0 and torch.equal(grad, torch.zeros_like(logits))
