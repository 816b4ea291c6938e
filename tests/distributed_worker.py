"""What each process of test_distributed.py runs; importable, because processes are spawned."""

from __future__ import annotations

import torch
from helpers import example, random_weights
from ranks import RANKS

import segloss

V = 11


def losses(group=None) -> dict:
    """Every kind of loss, over `group` or in one process."""
    weight = random_weights(V)
    return {
        "cross_entropy": segloss.CrossEntropyLoss(group=group),
        "cross_entropy, all options": segloss.CrossEntropyLoss(
            weight=weight, label_smoothing=0.1, z_loss=0.01, group=group
        ),
        "cross_entropy, sum": segloss.CrossEntropyLoss(reduction="sum", group=group),
        "focal": segloss.FocalLoss(group=group),
        "self_adjusting_dice": segloss.SelfAdjustingDiceLoss(group=group),
        "dice": segloss.DiceLoss(group=group),
        "dice, all": segloss.DiceLoss(classes="all", weight=weight, group=group),
        "dice, micro": segloss.DiceLoss(average="micro", group=group),
        "dice, per sample": segloss.DiceLoss(per_sample=True, group=group),
        "generalized_dice": segloss.GeneralizedDiceLoss(group=group),
        "focal_tversky": segloss.FocalTverskyLoss(group=group),
        "lovasz": segloss.LovaszSoftmaxLoss(group=group),
        "lovasz, all": segloss.LovaszSoftmaxLoss(classes="all", weight=weight, group=group),
        "lovasz, per sample": segloss.LovaszSoftmaxLoss(per_sample=True, group=group),
        "combined": 0.6 * segloss.CrossEntropyLoss(group=group)
        + 0.4 * segloss.LovaszSoftmaxLoss(group=group),
    }


def batches() -> dict:
    """Tokens of all ranks: (logits, target, keywords), the first half being rank 0's."""
    logits, target = example(18, V, seed=4, skill=3.0)
    first_half = torch.arange(18) < 9
    ids = {"sample_ids": torch.arange(18) // 3}  # whole samples on each rank
    weights = ids | {"token_weight": random_weights(18)}
    return {
        "plain": (logits, target, ids),
        "token weights": (logits, target, weights),
        "normalizer": (logits, target, ids | {"normalizer": 40.0}),
        "rank 1 has no valid token": (logits, target.masked_fill(~first_half, -100), ids),
        "no valid token": (logits, torch.full_like(target, -100), ids),
        "saturated": (
            logits.scatter(1, target.clamp(min=0)[:1, None], 900.0),
            target,
            ids,
        ),
    }


def value_and_grad(loss, logits, target, options):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target, **options)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def shard(value, rank: int):
    return value.chunk(RANKS)[rank] if isinstance(value, torch.Tensor) else value


def results(rank: int, group) -> dict:
    found = {}
    for batch, (logits, target, options) in batches().items():
        own = {key: shard(value, rank) for key, value in options.items()}
        for name, loss in losses(group).items():
            if "normalizer" in own and name == "cross_entropy, sum":
                continue  # a normalizer replaces a mean's denominator
            found[batch, name] = value_and_grad(loss, shard(logits, rank), shard(target, rank), own)
    return found
