"""Margins: the definition, and their accuracy where p rounds to 1."""

import pytest
import torch
from torch.nn import functional as F

import segloss
from segloss.selection import answer_margin, output_margin


def by_definition(logits, target):
    rest = logits.scatter(-1, target[..., None], -torch.inf)
    return logits.gather(-1, target[..., None])[..., 0] - rest.logsumexp(-1)


def test_value_and_gradient_of_logits_with_ignored_tokens():
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (3, 5))
    expected = by_definition(logits, target)
    ignored = torch.zeros(3, 5, dtype=torch.bool)
    ignored[0, :2] = ignored[2, 4] = True
    margin = output_margin(logits, target.masked_fill(ignored, -100))
    assert (margin[ignored] == 0).all()
    torch.testing.assert_close(margin[~ignored], expected[~ignored])
    upstream = torch.randn(3, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad(margin, logits, upstream)
    (truth,) = torch.autograd.grad(expected, logits, upstream.masked_fill(ignored, 0))
    torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_fused_head_with_everything_on_it(softcap):
    hidden, weight = torch.randn(2, 4, 6).double(), torch.randn(9, 6).double()
    bias, a, b = torch.randn(9).double(), torch.randn(2, 6).double(), torch.randn(9, 2).double()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias, a, b)]
    target = torch.randint(9, (2, 4))
    source = segloss.LinearLogits(
        hidden, weight, bias, softcap=softcap, scale=0.7, lora=(a, b, 1.5)
    )
    z = 0.7 * (hidden @ (weight + 1.5 * b @ a).T + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    ours, truth = output_margin(source, target), by_definition(z, target)
    torch.testing.assert_close(ours, truth)
    for mine, exact in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(truth.sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 60.0])
def test_float32_stays_accurate_where_p_rounds_to_1(lead):
    """From a margin of 17 `log p - log(1 - p)` is infinite in float32."""
    logits = torch.randn(4, 1000)
    target = torch.arange(4)
    logits[target, target] += lead + 8
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    ours, truth = output_margin(logits, target), by_definition(exact, target)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    (right,) = torch.autograd.grad(truth.sum(), exact)
    assert (grad.double() - right).norm() / right.norm() < 1e-6


@pytest.mark.parametrize("lead", [-60.0, 0.0, 30.0, 300.0])
def test_an_answer_is_exact_for_the_sum_of_its_tokens(lead):
    margins = (torch.randn(5).double() + lead).requires_grad_()
    answer = answer_margin(margins)
    nll = F.softplus(-margins).sum()
    torch.testing.assert_close(F.softplus(-answer), nll)
    (grad,) = torch.autograd.grad(answer, margins)
    (slope,) = torch.autograd.grad(nll, margins)
    torch.testing.assert_close(grad, slope / -torch.sigmoid(-answer.detach()))
    # the published mean of the margins understates the mean loss
    assert F.softplus(-margins.mean()) <= nll / 5 + 1e-12


def test_one_token_is_its_own_answer():
    margin = torch.tensor([3.5], dtype=torch.float64)
    torch.testing.assert_close(answer_margin(margin), margin[0])


def test_a_lone_class_has_no_margin():
    with pytest.raises(ValueError, match="logits have 1 class; a margin takes at least 2"):
        output_margin(torch.zeros(3, 1), torch.zeros(3).long())
