"""Distillation between two models, each with its head where it is: `head_loss` and `LossMixin`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from integration_helpers import (
    gradients,
    plain_batch,
    plain_cross_entropy,
    plain_training,
    tiny_model,
    tiny_rows,
    training_arguments,
)
from transformers import LlamaConfig, LlamaForCausalLM

import segloss
from segloss.integrations.transformers import LossMixin
from segloss.models.head import head_loss

PADDED = 64  # classes of the teacher, whose vocabulary is padded further than the student's


def tiny_teacher(**options) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": PADDED, "hidden_size": 20, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).double().eval()


def plain_distillation(teacher, temperature: float = 2.0):
    """0.5 cross-entropy + 0.5 KL(q || p) of full logits."""

    def loss(ids, logits, target):
        valid = target != -100
        with torch.no_grad():
            z = teacher(input_ids=ids).logits[..., : logits.shape[-1]]
        log_p = F.log_softmax(logits[valid] / temperature, -1)
        log_q = F.log_softmax(z[valid] / temperature, -1)
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        return 0.5 * plain_cross_entropy(logits, target) + 0.5 * kl

    return loss


MIXED = 0.5 * segloss.CrossEntropyLoss() + 0.5 * segloss.DistillationLoss(temperature=2)


@pytest.mark.parametrize("loss", ["token", "region"])
def test_head_loss_with_a_teacher(loss):
    """In one pass of each model; also where backward needs the teacher's logits again."""
    student, teacher, rows = tiny_model(), tiny_teacher(), tiny_rows()
    ids, target = plain_batch(rows)
    logits = student(input_ids=ids).logits
    expected = plain_distillation(teacher)(ids, logits, target)
    criterion = MIXED
    if loss == "region":
        criterion = MIXED + 0.2 * segloss.DiceLoss()
        expected = expected + 0.2 * segloss.reference.dice_loss(logits, target)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    value, outputs = head_loss(student, criterion, target, teacher=teacher, input_ids=ids)
    value.backward()
    torch.testing.assert_close(value, expected.detach().to(value.dtype), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-8, atol=1e-12)
    assert outputs.logits.shape == (len(ids), 1, student.config.vocab_size)
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        again, _ = head_loss(student, criterion, target, teacher=teacher, input_ids=ids)
    assert not again.requires_grad
    torch.testing.assert_close(again, value.detach(), rtol=1e-12, atol=0)


def test_a_teacher_that_is_not_ready():
    student, rows = tiny_model(), tiny_rows()
    ids, target = plain_batch(rows)
    with pytest.raises(ValueError, match=r"teacher is in training mode.*teacher\.eval\(\)"):
        head_loss(student, MIXED, target, teacher=tiny_teacher().train(), input_ids=ids)
    with pytest.raises(TypeError, match="teacher is 'big'; it takes a transformers causal model"):
        head_loss(student, MIXED, target, teacher="big", input_ids=ids)
    with pytest.raises(TypeError, match="FocalLoss reads no teacher"):
        head_loss(student, segloss.FocalLoss(), target, teacher=tiny_teacher(), input_ids=ids)


def trainer_class():
    from transformers import Trainer

    return type("LossTrainer", (LossMixin, Trainer), {})


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_with_a_teacher(head, accumulation, tmp_path):
    """Two steps are those of full logits in plain PyTorch, however the batch is split."""
    teacher, rows = tiny_teacher(), tiny_rows()
    student = tiny_model()
    plain = plain_distillation(teacher)
    inputs = iter([plain_batch(rows[:4])[0], plain_batch(rows[4:])[0]])
    found = plain_training(
        tiny_model(), rows, lambda logits, target: plain(next(inputs), logits, target)
    )
    trainer = trainer_class()(
        student,
        training_arguments(tmp_path, accumulation),
        train_dataset=rows,
        eval_dataset=rows,
        loss=MIXED,
        teacher=teacher,
        head=head,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for ours, (theirs, _) in zip(losses, found, strict=True):
        assert abs(ours - theirs) < 2e-4
    expected = tiny_model()
    with torch.no_grad():
        for _, grad in found:
            parameters = [p for p in expected.parameters() if p.requires_grad]
            sizes = [p.numel() for p in parameters]
            for parameter, part in zip(parameters, grad.split(sizes), strict=True):
                parameter -= 0.5 * part.view_as(parameter)
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0


def test_trainer_refuses_a_loss_without_its_teacher(tmp_path):
    with pytest.raises(TypeError, match="teacher is missing"):
        trainer_class()(
            tiny_model(), training_arguments(tmp_path), train_dataset=tiny_rows(), loss=MIXED
        )


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of what is experimental
@pytest.mark.parametrize("num_items", [None, 100])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_gkd_example_is_trl_s_own_loss(beta, num_items):
    pytest.importorskip("trl.experimental.gkd")
    from segloss.integrations.examples.gkd import GKDTrainer

    rows = tiny_rows()
    batch = {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = []
    for kind in (GKDTrainer, GKDTrainer.__base__):
        student = tiny_model(tie_word_embeddings=True)
        trainer = GKDTrainer.__new__(GKDTrainer)  # of what it sets up, the loss reads these two
        trainer.beta, trainer.teacher_model = beta, tiny_model().eval()
        torch.manual_seed(3)
        for parameter in trainer.teacher_model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        value = kind.compute_loss(trainer, student, dict(batch), num_items_in_batch=num_items)
        value.backward()
        found.append((value.detach().double(), gradients(student)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
