"""A teacher under FSDP2, beside a student under it: two steps are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from engine_cases import LR, Case, gpt2, gradients
from ranks import spawn
from torch.distributed.fsdp import fully_shard

import segloss
from segloss import reference

STEPS = 2
CASE = Case("trainable", "ce")
SHARES = {"token": 0.0, "region": 0.3}  # of a Dice loss in the sum


def loss_of(share: float, group=None):
    loss = 0.5 * segloss.CrossEntropyLoss(group=group)
    loss = loss + 0.5 * segloss.DistillationLoss("jsd", temperature=2, group=group)
    return loss + share * segloss.DiceLoss(group=group) if share else loss


def teacher():
    torch.manual_seed(5)
    model = gpt2().double().eval()
    model.lm_head.weight.data.mul_(20)
    return model.requires_grad_(False)


def sharded(model):
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model.lm_head)
    return fully_shard(model)


def trained(rank: int, group) -> dict:
    """{case: [(loss, gradients)] of every step, or what was said}"""
    from segloss.integrations.transformers import head_loss

    ranks, found = dist.get_world_size(), {}
    for name, share in SHARES.items():
        student, other = sharded(CASE.make()), sharded(teacher())
        optimizer = torch.optim.SGD(student.parameters(), lr=LR)
        steps: list = []
        for step in range(STEPS):
            ids, target = CASE.data(step, rank, ranks)
            try:
                loss, _ = head_loss(
                    student, loss_of(share, group), target, teacher=other, input_ids=ids
                )
                optimizer.zero_grad()
                (loss * ranks).backward()
            except (RuntimeError, ValueError) as error:
                steps.append(str(error))
                break
            steps.append((loss.item(), gradients(student)))
            optimizer.step()
        found[name] = steps
    return found


def truth(share: float) -> list:
    student, other, steps = CASE.make().double(), teacher(), []
    for step in range(STEPS):
        ids, target = CASE.data(step)
        logits = student(input_ids=ids).logits
        options = {"divergence": "jsd", "temperature": 2, "teacher": other(input_ids=ids).logits}
        loss = 0.5 * reference.cross_entropy(logits, target)
        loss = loss + 0.5 * reference.distillation_loss(logits, target, **options)
        if share:
            loss = loss + share * reference.dice_loss(logits, target)
        student.zero_grad()
        loss.backward()
        steps.append((loss.item(), gradients(student)))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= LR * parameter.grad
    return steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list:
    return spawn(trained, tmp_path_factory.mktemp("ranks"))


def test_two_processes_are_one(ranks):
    for found in ranks:
        for (value, grads), (true_value, true_grads) in zip(
            found["token"], truth(SHARES["token"]), strict=True
        ):
            assert value == pytest.approx(true_value, rel=1e-12)
            for name, grad in true_grads.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-13)


def test_a_loss_that_needs_the_teacher_again_is_never_wrong(ranks):
    """Its head is sharded again by then: what backward reads of it must be there or be missed."""
    for found in ranks:
        (first, *_) = found["region"]
        if isinstance(first, str):
            assert "teacher's weights are gone" in first
            continue
        for (value, grads), (true_value, true_grads) in zip(
            found["region"], truth(SHARES["region"]), strict=True
        ):
            assert value == pytest.approx(true_value, rel=1e-12)
            for name, grad in true_grads.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-13)
