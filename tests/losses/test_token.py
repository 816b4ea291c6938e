"""Token losses: values and gradients against the reference, for every option and dtype."""

import math

import pytest
import torch
from helpers import (
    RAGGED,
    TOKEN_LOSSES,
    assert_close_to_float64,
    assert_matches_reference,
    assert_near,
    example,
    fused,
    module,
    naive,
    random_weights,
    value_and_grad,
)

import segloss
from segloss import reference

V = 11
PARAMETERS = {
    "cross_entropy": [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"z_loss": 0.01},
        {"label_smoothing": 0.2, "z_loss": 0.1},
    ],
    "focal_loss": [{}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 1.0}, {"gamma": 5.0}],
    "poly_loss": [{}, {"epsilon": 0.0}, {"epsilon": -0.5}],
    "generalized_cross_entropy": [{}, {"q": 0.1}, {"q": 1.0}],
    "dft_loss": [{}],
    "self_adjusting_dice_loss": [
        {},
        {"alpha": 1.0},
        {"alpha": 0.5, "gamma": 0.2},
        {"alpha": 0.5, "detach": True},
    ],
}
CASES = [(name, options) for name in PARAMETERS for options in PARAMETERS[name]]


def common_options(shape):
    tokens = shape[:-1]
    some = random_weights(*tokens, seed=2)
    some.view(-1)[::3] = 0
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "class weight": {"weight": random_weights(shape[-1])},
        "class weight, none": {"weight": random_weights(shape[-1]), "reduction": "none"},
        "token weight": {"token_weight": random_weights(*tokens)},
        "token weight 0": {"token_weight": some, "reduction": "none"},
        "normalizer": {"normalizer": 40},
        "ignore_index": {"ignore_index": 3},
        "all": {
            "weight": random_weights(shape[-1]),
            "token_weight": some,
            "normalizer": 12.5,
            "ignore_index": -1,
        },
    }


@pytest.mark.parametrize("shape", [(7, V), (2, 5, V)], ids=str)
@pytest.mark.parametrize("which", common_options((1, 1)))
@pytest.mark.parametrize("name, parameters", CASES)
def test_every_option_matches_the_reference(name, parameters, which, shape):
    logits, target = example(*shape)
    options = parameters | common_options(shape)[which]
    if "ignore_index" in options:
        ignore_index = options["ignore_index"]
        target = target.masked_fill(target == -100, ignore_index)
    assert_matches_reference(name, logits, target, **options)


@pytest.mark.parametrize("shape", [(1, V), (2, 1, 3, V)], ids=str)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_any_number_of_leading_dimensions(name, shape):
    logits, target = example(*shape)
    assert_matches_reference(name, logits, target, reduction="none")
    assert_matches_reference(name, logits, target)


@pytest.mark.parametrize(
    "logit_options",
    [{"softcap": 2.0}, {"scale": 0.3}, {"softcap": 3.0, "scale": 1.7}],
    ids=str,
)
@pytest.mark.parametrize(
    "name, parameters", [(name, options[-1]) for name, options in PARAMETERS.items()]
)
def test_softcap_and_scale(name, parameters, logit_options):
    logits, target = example(7, V)
    logits[:, 4] = -torch.inf
    assert_matches_reference(
        name,
        logits,
        target.masked_fill(target == 4, 5),
        source=lambda z: segloss.DenseLogits(z, **logit_options),
        transform=lambda z: reference.transform(z, **logit_options),
        **parameters,
    )


@pytest.mark.parametrize("name, parameters", [c for c in CASES if c[0] != "dft_loss"])
def test_gradcheck(name, parameters):
    # DFT's gradient is by definition not that of its value
    if parameters.get("detach"):
        parameters = parameters | {"detach": False}
    logits, target = example(2, 3, 5, classes=3)
    logits.requires_grad_()
    options = parameters | {"token_weight": random_weights(2, 3), "weight": random_weights(5)}
    for reduction in ("mean", "none"):
        loss = lambda z: fused(name)(z, target, reduction=reduction, **options)  # noqa: E731, B023
        assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name, parameters",
    [
        (name, options)
        for name in PARAMETERS
        for options in (PARAMETERS[name][0], PARAMETERS[name][-1])
    ],
)
def test_low_precision_is_as_close_as_plain_torch(name, parameters, dtype, shape):
    logits, target = example(*shape, dtype=dtype)
    assert_close_to_float64(name, logits, target, **parameters)
    weights = {
        "weight": random_weights(shape[-1]).float(),
        "token_weight": random_weights(*shape[:-1]).float(),
    }
    assert_close_to_float64(name, logits, target, reduction="none", **weights, **parameters)


@pytest.mark.parametrize("name, parameters", CASES)
def test_module_is_the_function(name, parameters):
    logits, target = example(2, 5, V)
    constructed = parameters | {"weight": random_weights(V), "ignore_index": 3, "reduction": "sum"}
    called = {"token_weight": random_weights(2, 5)}
    target = target.masked_fill(target == -100, 3)
    of_module = value_and_grad(module(name, **constructed), logits, target, **called)
    of_function = value_and_grad(fused(name), logits, target, **constructed, **called)
    assert torch.equal(of_module[0], of_function[0]) and torch.equal(of_module[1], of_function[1])
    assert_near(of_module[0], naive(name)(logits, target, **constructed, **called))


@pytest.mark.parametrize("name, parameters", CASES)
@pytest.mark.parametrize("lift", [20.0, 36.5, 37.0, 800.0, -40.0, -800.0])
def test_saturated_tokens(name, parameters, lift):
    # above 36.7 p rounds to 1 in float64, and 1 - p is 0: no NaN, and the reference's slope
    logits, target = example(6, V, ignored=0.0)
    logits = logits.scatter_add(-1, target[:, None], torch.full((6, 1), lift).double())
    value, grad = value_and_grad(fused(name), logits, target, **parameters)
    true_value, true_grad = value_and_grad(naive(name), logits, target, **parameters)
    # the reference knows 1 - p to 1e-16 at best, and its fractional power accordingly
    fractional = name == "self_adjusting_dice_loss" and 0 < lift < 40
    tolerance = min(0.1, 1e-15 * math.exp(lift)) if fractional else 1e-10
    assert (value - true_value).norm() <= tolerance * true_value.norm() + 1e-12
    assert (grad - true_grad).norm() <= tolerance * true_grad.norm() + 1e-12
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("name, parameters", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_certain_tokens_in_low_precision(name, parameters, dtype):
    logits, target = example(6, V, ignored=0.0, dtype=dtype)
    logits = logits.scatter(-1, target[:, None], 200.0)
    value, grad = value_and_grad(fused(name), logits, target, **parameters)
    truth = value_and_grad(naive(name), logits.double(), target, **parameters)
    assert (value.double() - truth[0]).abs() <= 1e-5 * truth[0].abs() + 1e-6
    assert (grad.double() - truth[1]).norm() <= 1e-2 * truth[1].norm() + 1e-5


def test_cross_entropy_in_micro_batches_adds_up():
    logits, target = example(16, V)
    whole = value_and_grad(segloss.cross_entropy, logits, target)
    leaf = logits.clone().requires_grad_()
    count = (target != -100).sum()
    parts = [
        segloss.cross_entropy(z, y, normalizer=count)
        for z, y in zip(leaf.chunk(4), target.chunk(4), strict=True)
    ]
    assert_near(sum(parts).detach(), whole[0], 1e-12)
