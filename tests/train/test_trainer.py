"""The trainer's loss is the loss of the completion tokens, whatever the accumulation."""

import functools

import pytest
import torch
from train.tiny import build_model

import segloss
from segloss import reference
from segloss.logits import as_source
from segloss.train import data
from segloss.train.config import TrainConfig
from segloss.train.expression import parse_loss
from segloss.train.tasks import Example
from segloss.train.trainer import Trainer

ROWS = [("one two", " three"), ("four", " five six seven"), ("eight nine ten", " no"), ("x", " y")]


@pytest.fixture
def items(tokenizer):
    return data.encode([Example("t", *row) for row in ROWS], tokenizer)


def trainer(items, loss, batch_size, model=None, dtype=None, **settings):
    """A Trainer of one step over `items`, in their order, with validation items if it takes some."""
    config = TrainConfig(
        data=("x",),
        steps=1,
        batch_size=batch_size,
        accumulation=len(items) // batch_size,
        **settings,
    ).resolved()
    names = list(dict.fromkeys(item.example.task for item in items))
    tasks = [
        data.TaskData(name, own, [], own[:1])
        for name in names
        for own in [[item for item in items if item.example.task == name]]
    ]
    if model is None:
        model = build_model().double()
    loop = Trainer(model, tasks, loss, config, pad_id=257, dtype=dtype)
    loop.order = items * config.steps
    return loop


def step(items, loss, batch_size, **settings):
    """(logged loss, gradients) of one step over `items` in float64."""
    loop = trainer(items, parse_loss(loss), batch_size, **settings)
    row = loop.backward()
    return row["loss"], [p.grad for p in loop.model.parameters()]


def completion_rows(model, item):
    """Logits (M, V) that predict the completion of one item alone, and their targets (M,)."""
    ids = torch.tensor([item.prompt_ids + item.completion_ids])
    logits = model(ids).logits[0]
    start = len(item.prompt_ids)
    return logits[start - 1 : -1], ids[0, start:]


@pytest.mark.parametrize(
    ("expression", "naive"),
    [
        ("ce", reference.cross_entropy),
        ("focal(gamma=1)", functools.partial(reference.focal_loss, gamma=1)),
        ("lovasz", reference.lovasz_softmax),
        ("dice", reference.dice_loss),
    ],
)
def test_loss_and_gradient_are_those_of_the_completion_tokens(items, expression, naive):
    loss, grads = step(items, expression, batch_size=4)
    model = build_model().double()
    logits, targets = zip(*(completion_rows(model, item) for item in items), strict=True)
    expected = naive(torch.cat(logits), torch.cat(targets))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    for got, true in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("expression", ["ce", "ce + 0.5*focal", "sadl"])
def test_accumulating_four_batches_is_one_batch_for_token_losses(items, expression):
    one_loss, one = step(items, expression, batch_size=4)
    four_loss, four = step(items, expression, batch_size=1)
    assert four_loss == pytest.approx(one_loss, rel=1e-12)
    for got, true in zip(four, one, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)


def test_accumulated_region_losses_are_a_token_weighted_mean(items):
    loss, _ = step(items, "dice", batch_size=2)
    model = build_model().double()
    values, tokens = [], []
    for pair in (items[:2], items[2:]):
        logits, targets = zip(*(completion_rows(model, item) for item in pair), strict=True)
        values.append(reference.dice_loss(torch.cat(logits), torch.cat(targets)).item())
        tokens.append(sum(len(target) for target in targets))
    expected = sum(v * t for v, t in zip(values, tokens, strict=True)) / sum(tokens)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_logits_keep_the_autocast_dtype(items, head):
    """Accelerate's own mixed precision would copy them to float32."""
    seen = []

    class Spy(segloss.CrossEntropyLoss):
        def forward(self, logits, target, **options):
            source = as_source(logits)
            dtype = source.product_dtype if head == "fused" else source.logits.dtype
            seen.append((dtype, source.leading_shape == target.shape))
            return super().forward(logits, target, **options)

    loop = trainer(
        items[:2], Spy(), batch_size=2, model=build_model(), dtype=torch.bfloat16, head=head
    )
    loop.step()
    assert seen == [(torch.bfloat16, True)]
