"""Lovász-Softmax against the sort-everything reference, which shares nothing with it."""

import pytest
import torch
from helpers import (
    RAGGED,
    assert_close_to_float64,
    assert_matches_reference,
    assert_near,
    example,
    module,
    random_weights,
    value_and_grad,
)

import segloss
from segloss import reference

V = 11
PLACES = {
    "batch": {},
    "all classes": {"classes": "all"},
    "per sample": {"per_sample": True},
    "per sample, all classes": {"per_sample": True, "classes": "all"},
}


def weights_of(which, shape):
    some = random_weights(*shape[:-1], seed=2)
    some.view(-1)[::3] = 0
    return {
        "plain": {},
        "class weight": {"weight": random_weights(shape[-1])},
        "token weight": {"token_weight": random_weights(*shape[:-1])},
        "both, some 0": {"weight": random_weights(shape[-1]), "token_weight": some},
    }[which]


@pytest.mark.parametrize("seed", range(500))
def test_equals_sorting_everything(seed):
    """500 random cases: sizes, skill, weights, ignored tokens and options drawn from the seed."""
    draw = torch.Generator().manual_seed(seed)
    n, v, classes = (int(torch.randint(1, high, (), generator=draw)) for high in (40, 40, 12))
    skill = 8 * torch.rand((), generator=draw).item()
    logits, target = example(n, v, seed=seed, skill=skill, classes=classes)
    options = {"classes": ("present", "all")[seed % 2]}
    if seed % 3 == 0:
        options["token_weight"] = random_weights(n, seed=seed)
    if seed % 5 == 0:
        options["weight"] = random_weights(v, seed=seed)
    if seed % 7 == 0:
        options |= {"per_sample": True, "sample_ids": torch.arange(n) % 3}
    assert_matches_reference("lovasz_softmax", logits, target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", ["plain", "class weight", "token weight", "both, some 0"])
@pytest.mark.parametrize("place", PLACES)
def test_every_option_matches_the_reference(place, which, reduction):
    logits, target = example(3, 5, V)
    options = PLACES[place] | weights_of(which, logits.shape)
    assert_matches_reference("lovasz_softmax", logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("place", PLACES)
def test_normalizer(place):
    logits, target = example(3, 5, V)
    options = PLACES[place] | {"normalizer": 40.0, "token_weight": random_weights(3, 5)}
    assert_matches_reference("lovasz_softmax", logits, target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", ["present", "all"])
def test_sample_ids(classes, reduction):
    logits, target = example(12, V)
    ids = torch.tensor([5, -2, 5, 900, -2, 5, 900, 3, 3, 5, -2, 900])
    target[ids == 3] = -100
    options = {"per_sample": True, "sample_ids": ids, "classes": classes, "reduction": reduction}
    assert_matches_reference("lovasz_softmax", logits, target, **options)


@pytest.mark.parametrize("place", PLACES)
def test_softcap_and_scale(place):
    logits, target = example(3, 5, V)
    logits[..., 4] = -torch.inf
    assert_matches_reference(
        "lovasz_softmax",
        logits,
        target.masked_fill(target == 4, 5),
        source=lambda z: segloss.DenseLogits(z, softcap=3.0, scale=1.7),
        transform=lambda z: reference.transform(z, 3.0, 1.7),
        **PLACES[place],
    )


@pytest.mark.parametrize("place", PLACES)
def test_gradcheck(place):
    logits, target = example(2, 3, 5, classes=3)
    logits.requires_grad_()
    options = PLACES[place] | {"token_weight": random_weights(2, 3)}
    loss = lambda z: segloss.lovasz_softmax(z, target, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_as_plain_torch(dtype, shape):
    logits, target = example(*shape, dtype=dtype, skill=4.0)
    assert_close_to_float64("lovasz_softmax", logits, target)
    assert_close_to_float64("lovasz_softmax", logits, target, classes="all")
    if len(shape) == 3:
        assert_close_to_float64("lovasz_softmax", logits, target, per_sample=True)


def test_one_token_of_a_class_costs_its_error():
    logits, _ = example(1, V)
    value, grad = value_and_grad(segloss.lovasz_softmax, logits, torch.tensor([4]))
    expected = value_and_grad(lambda z, y: 1 - z.softmax(-1)[0, 4], logits, None)
    assert_near(value, expected[0])
    assert_near(grad, expected[1])


@pytest.mark.parametrize("saturated", [1, 3, 9])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lift", [36.5, 37.0, 800.0])
def test_saturated_foreground_makes_every_row_a_candidate(place, saturated, lift):
    # p = 1 at a target leaves tau = 0: all the class's background entries count
    logits, target = example(3, 7, V, skill=1.0, classes=3)
    at = torch.arange(21).view(3, 7) % 21 < saturated
    column = target.clamp(min=0)[..., None]
    logits = logits.scatter_add(-1, column, torch.where(at, lift, 0.0)[..., None].double())
    value, grad = value_and_grad(segloss.lovasz_softmax, logits, target, **PLACES[place])
    truth = value_and_grad(reference.lovasz_softmax, logits, target, **PLACES[place])
    assert_near(value, truth[0])
    assert_near(grad, truth[1])


def test_ties_leave_the_value():
    # two equal rows with different targets: foreground 1 - p against background p at p = 1/2
    logits = torch.zeros(6, 2, dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 0, 1, 1])
    value, grad = value_and_grad(segloss.lovasz_softmax, logits, target)
    assert_near(value, reference.lovasz_softmax(logits, target))
    assert grad.isfinite().all()


def test_hopeless_tokens():
    logits, target = example(9, V, ignored=0.0)
    logits = logits.scatter_add(-1, target[:, None], torch.full((9, 1), -800.0).double())
    assert_matches_reference("lovasz_softmax", logits, target)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("place", ["batch", "per sample", "all classes"])
def test_tolerance_bounds_the_error(place, tolerance):
    for seed in range(20):
        logits, target = example(3, 9, V, seed=seed, skill=6.0)
        options = PLACES[place] | {"reduction": "none"}
        exact = reference.lovasz_softmax(logits, target, **options)
        loose = segloss.lovasz_softmax(logits, target, tolerance=tolerance, **options)
        assert (loose - exact).abs().max() <= tolerance


def test_the_largest_tolerance_still_counts_the_foreground():
    logits, target = example(9, V)
    value = segloss.lovasz_softmax(logits, target, tolerance=1.0, reduction="none")
    assert (value > 0).all()


def test_module_is_the_function():
    logits, target = example(2, 5, V)
    constructed = {"classes": "all", "per_sample": True, "weight": random_weights(V)}
    called = {"token_weight": random_weights(2, 5), "normalizer": 7.0}
    loss = module("lovasz_softmax", **constructed)
    of_module = value_and_grad(loss, logits, target, **called)
    of_function = value_and_grad(segloss.lovasz_softmax, logits, target, **constructed, **called)
    assert torch.equal(of_module[0], of_function[0]) and torch.equal(of_module[1], of_function[1])
