"""Listed classes of each token, and probability targets: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, example, random_weights, upstream_like
from own_losses import MarginLoss
from torch import Tensor

import segloss
from segloss import LinearLogits, reference

V, D = 37, 6


def ids_of(target: Tensor, k: int = 5, v: int = V) -> Tensor:
    """Class ids (..., k): some skipped, some twice, the target among them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, v, (*target.shape, k), generator=generator)
    ids[..., 1] = ids[..., 0]
    ids[..., 2] = target.clamp(min=0)
    return ids


def grads(values: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    total = sum((value * upstream_like(value)).sum() for value in values)
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("shape", [(7, V), (3, 11, V), (1, 2, V)])
@pytest.mark.parametrize("classes", [None, "present", "all"])
def test_columns_of_logits(shape, classes):
    logits, target = example(*shape)
    ids = ids_of(target)
    apart = [logits.clone().requires_grad_() for _ in range(4)]
    ours = segloss.logit_statistics(apart[0], target, columns=ids, classes=classes)
    true = reference.logit_statistics(apart[1], target, columns=ids, classes=classes)
    names = ["column_log_prob", "log_prob"] + (["prob_sum"] if classes else [])
    mine, theirs = ([getattr(s, n) for n in names] for s in (ours, true))
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a.detach(), b.detach())
    assert (ours.column_log_prob[ids < 0] == 0).all()
    assert (ours.column_log_prob[target == -100] == 0).all()
    assert_near(grads(mine, [apart[0]])[0], grads(theirs, [apart[1]])[0])
    alone = segloss.logit_statistics(apart[2], target, columns=ids).column_log_prob
    true_alone = reference.logit_statistics(apart[3], target, columns=ids).column_log_prob
    assert_near(grads([alone], [apart[2]])[0], grads([true_alone], [apart[3]])[0])


@pytest.mark.parametrize("trained", ["all", "hidden"])
@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 2000}, {"compact": False}], ids=str)
def test_columns_of_a_head(options, trained):
    """Frozen and recomputed, with a bias, a soft-cap and an adapter."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = [draw(3, 11, D), draw(V, D), draw(V), draw(2, D), draw(V, 2)]
    _, target = example(3, 11, V)
    ids = ids_of(target)
    results = []
    for ours in (True, False):
        leaves = [
            t.clone().requires_grad_(i == 0 or trained == "all") for i, t in enumerate(tensors)
        ]
        h, w, bias, a, b = leaves
        head = {"bias": bias, "lora": (a, b, 0.5), "softcap": 6.0, "scale": 0.9}
        if ours:
            source = LinearLogits(h, w, **head, **options)
            found = segloss.logit_statistics(source, target, columns=ids, classes="present")
        else:
            logits = reference.linear_logits(h, w, **head)
            found = reference.logit_statistics(logits, target, columns=ids, classes="present")
        values = [found.column_log_prob, found.log_prob, found.prob_sum]
        results.append((values, grads(values, [t for t in leaves if t.requires_grad])))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert_near(a.detach(), b.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_ones_own_reads_them(reduction):
    """In every cost mode, beside other losses in a sum, under `return_statistics`."""
    logits, target = example(3, 11, V)
    ids = ids_of(target)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    loss = 0.5 * MarginLoss(reduction=reduction) + 0.5 * segloss.FocalLoss(reduction=reduction)
    results = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if ours:
            source = LinearLogits(*leaves, chunk_bytes=2000)
            value, statistics = loss(source, target, columns=ids, return_statistics=True)
            assert not statistics.column_log_prob.requires_grad
            found = statistics.column_log_prob
        else:
            z = leaves[0] @ leaves[1].T
            stats = reference.logit_statistics(z, target, columns=ids)
            found = stats.column_log_prob.detach()
            gap = torch.relu(1 + stats.column_log_prob - stats.log_prob[..., None])
            value = torch.where(ids >= 0, gap, 0).sum(-1)
            value = torch.where(stats.valid, value, 0)
            focal = reference.focal_loss(z, target, reduction=reduction)
            value = value if reduction == "none" else value.sum() / stats.valid.sum()
            value = 0.5 * value + 0.5 * focal
        results.append((found, value.detach(), *grads([value], leaves)))
    for a, b in zip(*results, strict=True):
        assert_near(a, b)
    dense = loss(logits, target, columns=ids)
    assert dense.isfinite().all()


def test_columns_and_a_stored_teacher_together():
    logits, target = example(7, V)
    ids = ids_of(target)
    log_prob, top = torch.randn(7, V).log_softmax(-1).topk(4)
    teacher = segloss.TopK(top, log_prob)
    apart = MarginLoss()(logits, target, columns=ids)
    apart = apart + segloss.DistillationLoss()(logits, target, teacher=teacher)
    both = MarginLoss() + segloss.DistillationLoss()
    assert_near(both(logits, target, columns=ids, teacher=teacher), apart, 1e-12)


@pytest.mark.parametrize(
    "columns, error, says",
    [
        (torch.zeros(7, 2), TypeError, "columns is a torch.float32 tensor"),
        (torch.zeros(6, 2, dtype=torch.int64), ValueError, r"columns has shape \(6, 2\); it takes"),
        (
            torch.full((7, 1), V),
            ValueError,
            "columns has ids from 37 to 37; logits have 37 classes",
        ),
        (torch.full((7, 1), -2), ValueError, "-1 stands for none"),
        ([1, 2], TypeError, "columns is a list"),
    ],
)
def test_wrong_columns(columns, error, says):
    logits, target = example(7, V)
    with pytest.raises(error, match=says):
        segloss.logit_statistics(logits, target, columns=columns)


# ------------------------------------------------------------------------ probability targets


def soft(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(shape, generator=generator, dtype=torch.float64).pow(3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_probabilities_as_pytorch_takes_them(head, weighted, label_smoothing, reduction):
    """Rows that sum to anything, as PyTorch does not check either."""
    y = soft(3, 11, V)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = soft(V)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    results = []
    for function in ("ours", "torch", "reference"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        z = leaves[0] @ leaves[1].T
        if function == "torch":
            value = F.cross_entropy(z.flatten(0, 1), y.flatten(0, 1), **options)
            value = value.view(3, 11) if reduction == "none" else value
        elif function == "reference":
            value = reference.cross_entropy(z, y, **options)
        elif head:
            value = segloss.linear_cross_entropy(*leaves, y, chunk_bytes=2000, **options)
        else:
            value = segloss.cross_entropy(z, y, **options)
        results.append([value, *grads([value], leaves)])
    for a, b, c in zip(*results, strict=True):
        assert_near(a.detach(), b.detach())
        assert_near(c.detach(), b.detach())


def test_probabilities_with_our_own_options():
    logits, _ = example(3, 11, V)
    y = soft(3, 11, V)
    y[..., 5], logits[..., 5] = 0, -torch.inf
    options = {
        "token_weight": random_weights(3, 11) - 0.125,
        "z_loss": 0.01,
        "weight": soft(V),
        "label_smoothing": 0.2,
        "normalizer": 20.0,
    }
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = segloss.cross_entropy(ours, y, **options)
    true = reference.cross_entropy(theirs, y, **options)
    assert_near(value.detach(), true.detach())
    assert_near(grads([value], [ours])[0], grads([true], [theirs])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_of_a_label_are_the_label(dtype):
    logits, target = example(33, 507, dtype=dtype, ignored=0)
    y = F.one_hot(target, 507).to(dtype)
    results = []
    for given in (target, y):
        leaf = logits.clone().requires_grad_()
        value = segloss.cross_entropy(leaf, given)
        results.append((value.detach(), *grads([value], [leaf])))
    assert_near(results[1][0], results[0][0], 1e-6)
    assert_near(results[1][1], results[0][1], 1e-6 if dtype == torch.float32 else 5e-3)
