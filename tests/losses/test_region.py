"""Region losses: values and gradients against the reference, for every option and dtype."""

import pytest
import torch
from helpers import (
    RAGGED,
    REGION_LOSSES,
    assert_close_to_float64,
    assert_matches_reference,
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
    "dice_loss": [{}, {"smooth": 1.0}, {"smooth": 0.0}],
    "generalized_dice_loss": [{}, {"smooth": 1.0}],
    "jaccard_loss": [{}, {"smooth": 0.5}],
    "tversky_loss": [{}, {"alpha": 0.9, "beta": 0.2, "smooth": 0.1}],
    "focal_tversky_loss": [{}, {"gamma": 1.5}, {"gamma": 0.3, "alpha": 0.5, "beta": 0.6}],
}
CASES = [(name, options) for name in PARAMETERS for options in PARAMETERS[name]]
AVERAGED = sorted(set(REGION_LOSSES) - {"generalized_dice_loss"})
PLACES = {
    "batch": {},
    "all classes": {"classes": "all"},
    "per sample": {"per_sample": True},
    "per sample, all classes": {"per_sample": True, "classes": "all"},
}


def weights_of(which, shape):
    tokens = shape[:-1]
    some = random_weights(*tokens, seed=2)
    some.view(-1)[::3] = 0
    return {
        "plain": {},
        "class weight": {"weight": random_weights(shape[-1])},
        "token weight": {"token_weight": random_weights(*tokens)},
        "both, some 0": {"weight": random_weights(shape[-1]), "token_weight": some},
    }[which]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", ["plain", "class weight", "token weight", "both, some 0"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name, parameters", CASES)
def test_every_option_matches_the_reference(name, parameters, place, which, reduction):
    logits, target = example(3, 5, V)
    options = parameters | PLACES[place] | weights_of(which, logits.shape)
    assert_matches_reference(name, logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", ["plain", "both, some 0"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", AVERAGED)
def test_micro_average(name, place, which, reduction):
    logits, target = example(3, 5, V)
    options = {"average": "micro"} | PLACES[place] | weights_of(which, logits.shape)
    assert_matches_reference(name, logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REGION_LOSSES)
def test_normalizer(name, place):
    logits, target = example(3, 5, V)
    options = PLACES[place] | {"normalizer": 40.0}
    assert_matches_reference(name, logits, target, **options)
    assert_matches_reference(name, logits, target, token_weight=random_weights(3, 5), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("name", REGION_LOSSES)
def test_sample_ids(name, classes, reduction):
    # ids with gaps, negative, out of order, and one whose tokens are all ignored
    logits, target = example(12, V)
    ids = torch.tensor([5, -2, 5, 900, -2, 5, 900, 3, 3, 5, -2, 900])
    target[ids == 3] = -100
    options = {"per_sample": True, "sample_ids": ids, "classes": classes, "reduction": reduction}
    assert_matches_reference(name, logits, target, **options)
    value = fused(name)(logits, target, **options)
    if reduction == "none":
        assert value.shape == (4,) and value[1] == 0


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_sample_ids_mean_nothing_without_per_sample(name):
    logits, target = example(12, V)
    ids = torch.arange(12) % 3
    plain = value_and_grad(fused(name), logits, target)
    with_ids = value_and_grad(fused(name), logits, target, sample_ids=ids)
    assert torch.equal(plain[0], with_ids[0]) and torch.equal(plain[1], with_ids[1])


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_a_sample_without_a_valid_token_is_left_out_of_the_mean(name):
    logits, target = example(3, 5, V)
    target[1] = -100
    for classes in ("present", "all"):
        assert_matches_reference(name, logits, target, per_sample=True, classes=classes)
    values = fused(name)(logits, target, per_sample=True, reduction="none")
    assert values.shape == (3,) and values[1] == 0
    mean = fused(name)(logits, target, per_sample=True)
    torch.testing.assert_close(mean, (values[0] + values[2]) / 2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REGION_LOSSES)
def test_softcap_and_scale(name, place):
    logits, target = example(3, 5, V)
    logits[..., 4] = -torch.inf
    assert_matches_reference(
        name,
        logits,
        target.masked_fill(target == 4, 5),
        source=lambda z: segloss.DenseLogits(z, softcap=3.0, scale=1.7),
        transform=lambda z: reference.transform(z, 3.0, 1.7),
        **PLACES[place],
    )


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_all_means_every_column_that_is_finite_somewhere(name):
    logits, target = example(9, V, ignored=0.0, classes=3)
    target[8] = -100
    unused = [c for c in range(V) if c not in target]
    logits[:, unused[0]] = -torch.inf  # nowhere
    logits[1:, unused[1]] = -torch.inf  # in one row
    logits[:8, unused[2]] = -torch.inf  # only in an ignored row, which does not count
    options = {"classes": "all", "reduction": "none"}
    assert_matches_reference(name, logits, target, **options)
    if name != "generalized_dice_loss":
        values = fused(name)(logits, target, **options)
        assert values.shape == (V,)
        assert values[unused[0]] == 0 and values[unused[1]] > 0 and values[unused[2]] == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REGION_LOSSES)
def test_gradcheck(name, place):
    logits, target = example(2, 3, 4, classes=3)
    logits.requires_grad_()
    options = PLACES[place] | {"token_weight": random_weights(2, 3)}
    assert torch.autograd.gradcheck(lambda z: fused(name)(z, target, **options), logits)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REGION_LOSSES)
def test_low_precision_is_as_close_as_plain_torch(name, dtype, shape):
    logits, target = example(*shape, dtype=dtype, skill=4.0)
    assert_close_to_float64(name, logits, target)
    assert_close_to_float64(name, logits, target, classes="all")
    if len(shape) == 3:
        assert_close_to_float64(name, logits, target, per_sample=True)


@pytest.mark.parametrize("name, parameters", CASES)
def test_module_is_the_function(name, parameters):
    logits, target = example(2, 5, V)
    constructed = parameters | {"weight": random_weights(V), "reduction": "sum", "per_sample": True}
    called = {"token_weight": random_weights(2, 5)}
    of_module = value_and_grad(module(name, **constructed), logits, target, **called)
    of_function = value_and_grad(fused(name), logits, target, **constructed, **called)
    assert torch.equal(of_module[0], of_function[0]) and torch.equal(of_module[1], of_function[1])


@pytest.mark.parametrize("lift", [20.0, 36.5, 37.0, 800.0, -40.0, -800.0])
@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("name, parameters", CASES)
def test_saturated_tokens(name, parameters, classes, lift):
    if parameters.get("smooth") == 0 and classes == "all" and lift > 36:
        parameters = {"smooth": 1e-3}  # an absent class without any probability would be 0 / 0
    logits, target = example(6, V, ignored=0.0)
    logits = logits.scatter_add(-1, target[:, None], torch.full((6, 1), lift).double())
    options = parameters | {"classes": classes}
    value, grad = value_and_grad(fused(name), logits, target, **options)
    true_value, true_grad = value_and_grad(naive(name), logits, target, **options)
    assert value.isfinite() and grad.isfinite().all()
    # a fractional power of a value that is all rounding error is no better than that error's power
    noise = 1e-4 if name == "focal_tversky_loss" and lift > 0 else 1e-12
    assert (value - true_value).norm() <= 1e-9 * true_value.norm() + noise
    assert (grad - true_grad).norm() <= 1e-9 * true_grad.norm() + noise
