"""Loss expressions: what they build, and the message for each way to get one wrong."""

import pytest
import torch

import segloss
from segloss.losses import LOSSES, parse_loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_name_builds_its_class(name):
    assert type(parse_loss(name)) is LOSSES[name]


def test_options_reach_the_constructor():
    assert parse_loss("focal(gamma=1.5)").gamma == 1.5
    assert parse_loss("focal_tversky(alpha=0.4, smooth=1, gamma=2)").smooth == 1
    loss = parse_loss("dice(per_sample=True, classes='all')")
    assert loss.per_sample is True and loss.classes == "all"


@pytest.mark.parametrize(
    "expression",
    ["0.6*ce+0.4*lovasz", " ce*0.6 + lovasz * 0.4 ", "0.2*(3*ce+2*lovasz)", "+0.6*ce + 0.4*lovasz"],
)
def test_a_weighted_sum_is_the_sum_of_its_parts(expression):
    logits, target = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    expected = 0.6 * segloss.cross_entropy(logits, target)
    expected += 0.4 * segloss.lovasz_softmax(logits, target)
    torch.testing.assert_close(parse_loss(expression)(logits, target), expected)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "cannot be read: .*the names ce focal"),
        ("ce +", "cannot be read"),
        ("ce\0", "cannot be read"),
        ("(" * 500 + "ce" + ")" * 500, "cannot be read"),
        ("+".join(["ce"] * 100_000), "cannot be read"),
        ("hinge", "unknown loss 'hinge'; the losses are ce focal poly gce dft sadl distill dice"),
        ("focal(gama=2)", "focal has no option 'gama'; it takes gamma"),
        ("tversky(gamma=2)", "it takes alpha, beta, smooth, classes, average, per_sample"),
        ("dft(x=2)", "dft has no option 'x'; it takes no options"),
        ("ce(reduction='sum')", "ce has no option 'reduction'"),
        ("ce(ignore_index=0)", "ce has no option 'ignore_index'"),
        ("focal(gamma=-1)", "focal: gamma is -1"),
        ("focal(gamma='x')", "focal: gamma is "),
        ("focal(2)", "written with their names"),
        ("focal(**{'gamma': 2})", "has no option None"),
        ("focal(gamma=ce)", "'ce' is not a plain number"),
        ("focal(gamma=[2])", "is not a plain number"),
        ("ce - lovasz", "'ce - lovasz' is not a loss"),
        ("ce / 2", "is not a loss"),
        ("0.5", "'0.5' is not a loss"),
        ("ce * lovasz", "is not a number to multiply a loss by"),
        ("True * ce", "is not a number"),
        ("-1 * ce", "the coefficient -1 must be positive and finite"),
        ("0 * ce", "must be positive"),
        ("1e999 * ce", "must be positive and finite"),
        ("__import__('os').system('true')", "is not a loss"),
        ("[ce for ce in ()]", "is not a loss"),
    ],
)
def test_message(expression, message):
    with pytest.raises(ValueError, match=message):
        parse_loss(expression)
