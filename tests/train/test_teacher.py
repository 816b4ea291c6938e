"""`segloss train --teacher`: the loss that is trained is that of both models' logits."""

import json

import pytest
import torch
from train.test_run import fails, rows
from train.tiny import build_model

MIXED = "0.5*ce+0.5*distill(temperature=2)"


@pytest.fixture
def teacher_folder(tmp_path, tokenizer):
    """Other weights, and a vocabulary that is padded further."""
    model = build_model(264)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_teacher_s_loss_is_trained(train, teacher_folder, tmp_path):
    from segloss import reference
    from segloss.integrations.window import next_tokens
    from segloss.train.config import settings
    from segloss.train.run import Run

    options = ("--teacher", teacher_folder, "--loss", MIXED, "--eval-items", 0)
    code, _, err = train(*options, "--batch-size", 21, "--steps", 1)
    assert code == 0, err
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    given = json.loads((tmp_path / "run" / "segloss.json").read_text())["given"]
    run = Run(settings([], given | {"output_dir": str(tmp_path / "x")}))
    batch = run.trainer.data_collator(list(run.trainer.train_dataset))
    target = next_tokens(batch.pop("labels"))
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = run.trainer.model(**ids).logits.double()
        teacher = run.trainer.teacher(**ids).logits.double()
    assert teacher.shape[-1] == 264 > logits.shape[-1]
    expected = 0.5 * reference.cross_entropy(logits, target) + 0.5 * reference.distillation_loss(
        logits, target, teacher=teacher, temperature=2
    )
    tolerance = 2e-2 if run.trainer.args.bf16 else 1e-5
    assert row["loss"] == pytest.approx(expected.item(), rel=tolerance)


def test_what_is_refused(train, teacher_folder, tmp_path):
    assert fails(
        train("--loss", MIXED),
        "teacher is missing: give a causal model, or rows with the columns teacher_ids",
    )
    assert fails(train("--teacher", teacher_folder), "--teacher is read by distill alone")
    assert fails(train("--teacher", tmp_path / "none", "--loss", MIXED), "none")
    own = json.loads((teacher_folder / "tokenizer.json").read_text())
    vocabulary = own["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher_folder / "tokenizer.json").write_text(json.dumps(own))
    assert fails(train("--teacher", teacher_folder, "--loss", MIXED), "has other tokens than")
