"""Token weights turn a sum over tokens into the mean that is wanted, over the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_near, example

import segloss

OMEGA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TASKS = torch.tensor([0, 1, 1, 0, 1, 0])  # task 2 is absent
SAMPLE = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.2, 0.1], dtype=torch.float64)
CASES = {
    "token mean": {},
    "samples": {"sample_weights": SAMPLE},
    "tasks": {"task_ids": TASKS, "task_weights": OMEGA},
    "both": {"sample_weights": SAMPLE, "task_ids": TASKS, "task_weights": OMEGA},
}
every_case = pytest.mark.parametrize("name", CASES)


def batch():
    logits, target = example(6, 9, 17, ignored=0.4)
    target[4] = -100  # a sample without tokens
    return logits, target


def naive_loss(nll, valid, sample_weights=None, task_ids=None, task_weights=None):
    """Sample by sample and task by task, in NumPy."""
    per_sample = [row[keep] for row, keep in zip(nll.numpy(), valid.numpy(), strict=True)]
    full = [b for b, tokens in enumerate(per_sample) if len(tokens)]
    if task_weights is None:
        if sample_weights is None:
            return np.concatenate(per_sample).mean()
        return sum(float(sample_weights[b]) * per_sample[b].mean() for b in full)
    loss = 0.0
    for i, omega in enumerate(task_weights.tolist()):
        own = [b for b in full if int(task_ids[b]) == i]
        if not own:
            continue
        if sample_weights is None:
            loss += omega * np.concatenate([per_sample[b] for b in own]).mean()
        else:
            w = [float(sample_weights[b]) for b in own]
            loss += omega * np.average([per_sample[b].mean() for b in own], weights=w)
    return loss


def weighted(logits, target, weights, loss=None):
    loss = loss or segloss.CrossEntropyLoss()
    weights = weights[:, None].expand_as(target)
    return loss(logits, target, token_weight=weights, normalizer=1)


@every_case
def test_the_loss_is_the_mean_that_is_wanted(name):
    logits, target = batch()
    stats = segloss.logit_statistics(logits, target)
    weights = segloss.token_weights(stats.valid.sum(1), **CASES[name])
    truth = naive_loss(-stats.log_prob, stats.valid, **CASES[name])
    assert weights.dtype == torch.float64 and weights[4] == 0
    assert_near(weighted(logits, target, weights), torch.tensor(truth), 1e-13)


@every_case
@pytest.mark.parametrize("loss", [segloss.CrossEntropyLoss(), segloss.FocalLoss()])
def test_micro_batches_add_up(name, loss):
    """Also those of one task alone, which are still scaled by its weight."""
    logits, target = batch()
    weights = segloss.token_weights((target != -100).sum(1), **CASES[name])
    whole = weighted(logits, target, weights, loss)
    by_task = [torch.tensor(rows) for rows in ([0, 3], [5], [1, 2], [4])]
    parts = [weighted(logits[rows], target[rows], weights[rows], loss) for rows in by_task]
    assert_near(sum(parts), whole, 1e-13)


def test_a_task_alone_is_scaled_by_its_weight():
    logits, target = batch()
    rows = TASKS == 0
    weights = segloss.token_weights(
        (target[rows] != -100).sum(1), task_ids=TASKS[rows], task_weights=OMEGA
    )
    mean = segloss.cross_entropy(logits[rows], target[rows])
    assert_near(weighted(logits[rows], target[rows], weights), 0.2 * mean, 1e-13)


def test_no_token_at_all():
    none = torch.zeros(3, dtype=torch.int64)
    tasks = {"task_ids": torch.tensor([0, 1, 1]), "task_weights": OMEGA}
    for options in ({}, {"sample_weights": torch.ones(3)}, tasks):
        assert torch.equal(segloss.token_weights(none, **options), torch.zeros(3).double())
    assert segloss.token_weights(none[:0]).shape == (0,)


def test_weights_are_constants():
    w = SAMPLE.clone().requires_grad_()
    assert not segloss.token_weights(torch.ones(6), sample_weights=w).requires_grad


def test_wrong_arguments_are_named():
    n = torch.ones(6)
    for options, error, text in [
        ({"task_ids": TASKS}, ValueError, "task_ids is given but task_weights is None"),
        ({"task_weights": OMEGA}, ValueError, "task_weights is given but task_ids is None"),
        ({"sample_weights": SAMPLE[:2]}, ValueError, "sample_weights is a torch.float64"),
        ({"task_ids": TASKS, "task_weights": OMEGA[None]}, ValueError, r"it takes a tensor \(K,"),
        ({"task_ids": TASKS + 2, "task_weights": OMEGA}, ValueError, "task_ids has 3; with"),
        ({"task_ids": TASKS - 1, "task_weights": OMEGA}, ValueError, "task_ids has -1; with"),
        ({"task_ids": TASKS.float(), "task_weights": OMEGA}, TypeError, "an integer dtype"),
    ]:
        with pytest.raises(error, match=text):
            segloss.token_weights(n, **options)
    with pytest.raises(ValueError, match="num_tokens is 3"):
        segloss.token_weights(3)
