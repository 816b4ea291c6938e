"""A user's own loss has everything that a built-in one has."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    RAGGED,
    TOLERANCE,
    assert_near,
    example,
    random_weights,
    relative_error,
    upstream_like,
    value_and_grad,
)
from own_losses import OWN, LearntLoss, OffsetLoss, RobustLoss, SquaredDiceLoss

import segloss
from segloss.losses import registry

OPTIONS = {
    "robust_loss": [{}, {"strength": 2.0}, {"reduction": "none"}],
    "squared_dice_loss": [{}, {"classes": "all"}, {"average": "micro"}],
}
CASES = [(name, options) for name in OWN for options in OPTIONS[name]]


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_plain_pytorch(name, options, shape):
    logits, target = example(*shape)
    _, ours, naive = OWN[name]
    more = options | {"weight": random_weights(shape[-1])}
    more["token_weight"] = random_weights(*shape[:-1])
    for given in (options, more):
        (value, grad), (true_value, true_grad) = (
            value_and_grad(loss, logits, target, **given) for loss in (ours, naive)
        )
        assert_near(value, true_value)
        assert_near(grad, true_grad)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loses_no_more_than_plain_pytorch_in_the_same_dtype(name, dtype):
    logits, target = example(7, 507, dtype=dtype)
    _, ours, naive = OWN[name]
    mine = value_and_grad(ours, logits, target)
    truth = value_and_grad(naive, logits.double(), target)
    plain = value_and_grad(naive, logits, target)
    for actual, exact, same_dtype in zip(mine, truth, plain, strict=True):
        assert_near(actual, exact, 2 * relative_error(same_dtype, exact) + TOLERANCE[dtype])


def test_samples_normalizer_and_statistics():
    logits, target = example(3, 11, 507)
    for name, options in [
        ("squared_dice_loss", {"per_sample": True}),
        ("robust_loss", {"normalizer": 40.0}),
        ("squared_dice_loss", {"normalizer": 40.0}),
    ]:
        _, ours, naive = OWN[name]
        assert_near(ours(logits, target, **options), naive(logits, target, **options))
    loss, statistics = RobustLoss()(logits, target, return_statistics=True)
    assert_near(loss, OWN["robust_loss"][2](logits, target))
    assert_near(statistics.lse[target != -100], logits.logsumexp(-1)[target != -100])


def test_in_a_sum():
    logits, target = example(5, 67)
    mix = 0.3 * RobustLoss(2.0) + 0.7 * segloss.LovaszSoftmaxLoss() + 0.1 * SquaredDiceLoss()
    parts = (
        0.3 * OWN["robust_loss"][2](logits, target, strength=2.0)
        + 0.7 * segloss.reference.lovasz_softmax(logits, target)
        + 0.1 * OWN["squared_dice_loss"][2](logits, target)
    )
    assert_near(mix(logits, target), parts)


def test_the_formula_sees_the_targets():
    logits, target = example(9, 67)
    offset = random_weights(67, seed=3)
    p = logits.softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
    values = -p.log() + offset[target.clamp(min=0)].square() * p
    expected = values[target != -100].mean()
    hidden = torch.eye(9, dtype=torch.float64, requires_grad=True)
    head = logits.T.contiguous()
    for source in (logits, segloss.LinearLogits(hidden, head, chunk_bytes=2 * 67 * 8)):
        assert_near(OffsetLoss(offset)(source, target), expected)


def test_a_scale_that_is_trained_gets_its_gradient():
    logits, target = example(9, 67)
    hidden = torch.eye(9, dtype=torch.float64, requires_grad=True)
    for source in (logits, segloss.LinearLogits(hidden, logits.T.contiguous())):
        loss = LearntLoss()
        value = loss(source, target)
        value.backward()
        # d exp(s) nll / ds = exp(s) nll
        assert_near(loss.log_scale.grad, value.detach())


def compiled(loss, logits, target):
    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return value_and_grad(function, logits, target)


@pytest.mark.parametrize(
    "loss",
    [
        RobustLoss(2.0),
        SquaredDiceLoss(classes="all"),
        OffsetLoss(random_weights(67, seed=3)),
        0.5 * RobustLoss() + 0.5 * SquaredDiceLoss() + OffsetLoss(random_weights(67, seed=4)),
        RobustLoss(strength=0.25, reduction="none"),
    ],
    ids=["token", "region", "tensor option", "sum", "none"],
)
def test_compiles_in_one_graph(loss):
    logits, target = example(9, 67)
    (value, grad), (true_value, true_grad) = (
        compiled(loss, logits, target),
        value_and_grad(loss, logits, target),
    )
    assert torch.equal(value, true_value)
    assert torch.equal(grad, true_grad)


def test_a_trained_scale_compiles_too():
    """As the eager code, in as many graphs as that takes: no gradient may be lost."""
    logits, target = example(9, 67)
    loss = LearntLoss()
    torch._dynamo.reset()
    value = torch.compile(loss, backend="aot_eager")(logits, target)
    value.backward()
    assert_near(loss.log_scale.grad, value.detach())


def test_two_of_one_name_do_not_meet():
    def made(power: int):
        class Power(segloss.TokenLoss):
            def formula(self, stats):
                return stats.log_prob.exp() ** power

        return Power

    logits, target = example(9, 67)
    one, two = made(1)(), made(2)()
    assert one.key != two.key
    assert registry.find(one.key) is type(one)
    for loss in (one, two):
        assert torch.equal(compiled(loss, logits, target)[0], loss(logits, target))


def test_copies_and_pickles():
    logits, target = example(9, 67)
    loss = 0.5 * RobustLoss(2.0) + SquaredDiceLoss()
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(logits, target), loss(logits, target))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("own_losses:RobustLoss", RobustLoss()),
        ("own_losses:RobustLoss(strength=2.0)", RobustLoss(2.0)),
        ("0.6*ce + 0.4*own_losses:SquaredDiceLoss(classes='all')",
         0.6 * segloss.CrossEntropyLoss() + 0.4 * SquaredDiceLoss(classes="all")),
    ],
)  # fmt: skip
def test_is_read_from_an_expression(text, same):
    logits, target = example(9, 67)
    assert torch.equal(segloss.parse_loss(text)(logits, target), same(logits, target))


def test_known_by_a_short_name():
    class Quiet(segloss.TokenLoss, short="quiet"):
        def formula(self, stats):
            return -stats.log_prob.exp()

    try:
        assert type(segloss.parse_loss("0.5*quiet").parts[0]) is Quiet
    finally:
        del registry.LOSSES["quiet"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.losses:Hinge", "nowhere.losses:Hinge cannot be imported: No module named"),
        ("own_losses:Hinge", "own_losses:Hinge cannot be imported: module 'own_losses' has no"),
        ("own_losses:OWN", "own_losses:OWN is no loss; it takes a subclass of segloss.TokenLoss"),
        ("own_losses:RobustLoss(gamma=1)", "has no option 'gamma'; it takes strength"),
        ("hinge", "unknown loss 'hinge'; the losses are ce focal .*, or one of your own as"),
        (3, "expression is 3; it takes a string"),
    ],
)
def test_what_is_wrong_in_an_expression(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        segloss.parse_loss(text)


def test_a_class_without_its_formula_says_so():
    logits, target = example(3, 7)
    for base in (segloss.TokenLoss, segloss.RegionLoss):
        with pytest.raises(TypeError, match=f"{base.__name__} does not define formula"):
            base()(logits, target)


def test_upstream_gradients_reach_it():
    logits, target = example(9, 67)
    value, grad = value_and_grad(RobustLoss(reduction="none"), logits, target)
    true_value, true_grad = value_and_grad(
        lambda z, y: OWN["robust_loss"][2](z, y, reduction="none"), logits, target
    )
    assert upstream_like(value).abs().min() > 0
    assert_near(value, true_value)
    assert_near(grad, true_grad)
