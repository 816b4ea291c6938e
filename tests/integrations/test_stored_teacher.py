"""A stored teacher as columns of the data: `DistillationLoss` of `LossMixin` learns from them."""

import math

import pytest
import torch
import torch.nn.functional as F
from integration_helpers import gradients, tiny_model, tiny_rows, token_nll

import segloss
from segloss.integrations.window import stored_teacher

transformers = pytest.importorskip("transformers")
from integrations.test_columns import tokenizer  # noqa: E402  (needs transformers)
from integrations.test_teacher import MIXED, tiny_teacher  # noqa: E402
from integrations.test_trainer import trainer  # noqa: E402

from segloss.integrations.columns import KeepColumns  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def stored():
    """Rows of several lengths; a label's list has two or three classes, a prompt's tokens none."""
    generator = torch.Generator().manual_seed(6)
    rows = []
    for length in (4, 7, 3, 5):
        ids = torch.randint(2, 61, (length,), generator=generator).tolist()
        classes, log_prob = [[]], [[]]
        for place in range(1, length):
            k = 2 + place % 2
            classes.append(torch.randperm(61, generator=generator)[:k].tolist())
            log_prob.append((torch.rand(k, generator=generator) / 4 + 0.01).log().tolist())
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100, *ids[1:]],
                "teacher_ids": classes,
                "teacher_log_prob": log_prob,
            }
        )
    return rows


def plain_loss(model, rows):
    """0.5 cross-entropy + 0.5 KL(q || p) at temperature 2, q renormalised, token by token."""
    terms = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        nll = token_nll(logits[None, :-1], ids[:, 1:])[0]
        for place in range(1, ids.shape[1]):
            log_p = F.log_softmax(logits[place - 1] / 2, -1)[row["teacher_ids"][place]]
            kept = torch.tensor(row["teacher_log_prob"][place]).double()
            log_q = F.log_softmax(kept / 2, -1)
            terms.append(0.5 * nll[place - 1] + 0.5 * (log_q.exp() * (log_q - log_p)).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["fused", "logits"])
def test_loss_and_gradient(head, side, tmp_path):
    rows = stored()
    model = tiny_model()
    plain_loss(model, rows).backward()
    wanted = gradients(model)
    value = plain_loss(model, rows).item()
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(side))
    ours = trainer(tmp_path, rows=rows, data_collator=collator, loss=MIXED, head=head)
    batch = ours._prepare_inputs(ours.data_collator(rows))
    assert batch["teacher_ids"].shape == (4, 7, 3)
    ours.model.train()
    count = ours._num_targets([batch], ours.args.device)
    assert count == sum(len(row["labels"]) - 1 for row in rows)
    loss = ours.compute_loss(ours.model, batch, num_items_in_batch=count)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(gradients(ours.model), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_by_hand(accumulation, tmp_path):
    """Where the student says 1 / 61 of every class, and the teacher 3/4 and 1/4 of two."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    pair = [math.log(0.6), math.log(0.2)]
    rows = [
        {
            **row,
            "teacher_ids": [[3, 7] if label >= 0 else [] for label in row["labels"]],
            "teacher_log_prob": [pair if label >= 0 else [] for label in row["labels"]],
        }
        for row in tiny_rows()
    ]
    ours = trainer(
        tmp_path,
        model,
        accumulation,
        rows=rows,
        loss=segloss.DistillationLoss(),
        max_steps=1,
        eval_dataset=rows,
    )
    # 0.75 log 0.75 + 0.25 log 0.25 + log 61
    assert ours.evaluate()["eval_loss"] == pytest.approx(3.548539, abs=2e-6)
    ours.train()
    assert ours.state.log_history[-2]["loss"] == pytest.approx(3.548539, abs=1e-4)
    weight = model.lm_head.weight
    assert weight[3].norm() > weight[7].norm() > 3 * weight[5].norm() > 0


def test_the_rest_is_said(tmp_path):
    """ "uniform": 0.1 of the probability over the 59 other classes."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [
        {"input_ids": [5, 6], "teacher_ids": [[], [3, 7]], "labels": [-100, 6]}
        | {"teacher_log_prob": [[], [math.log(0.6), math.log(0.3)]]}
    ]
    loss = segloss.DistillationLoss("reverse")
    ours = trainer(tmp_path, model, rows=rows, eval_dataset=rows, loss=loss, teacher_rest="uniform")
    q = torch.tensor([0.6, 0.3] + 59 * [0.1 / 59])
    expected = -math.log(61) - q.log().mean().item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="teacher has rest='renormalise', with which reverse KL"):
        trainer(tmp_path, model, rows=rows, eval_dataset=rows, loss=loss)
    with pytest.raises(ValueError, match="teacher_rest is 'rest'"):
        trainer(tmp_path, model, rows=rows, loss=loss, teacher_rest="rest")


def test_rows_that_are_joined():
    """A packed sample's last place predicts nothing, whatever the next sample's list says."""
    collate = KeepColumns(transformers.DataCollatorWithFlattening())
    batch = collate(stored()[:2])
    assert batch["teacher_ids"].shape == (1, 11, 3)
    assert batch["teacher_ids"][0, 4].tolist() == [-1, -1, -1]
    assert batch["teacher_log_prob"][0, 4].tolist() == [0, 0, 0]
    assert batch["teacher_ids"][0, 5:].tolist()[0][:3] == stored()[1]["teacher_ids"][1]


def test_other_losses_leave_the_columns_alone(tmp_path):
    rows = stored()
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    found = []
    for data in (rows, bare):
        collator = transformers.DataCollatorForSeq2Seq(tokenizer())
        ours = trainer(tmp_path, rows=data, data_collator=collator, max_steps=1)
        ours.train()
        found.append(ours.state.log_history[0]["loss"])
    assert found[0] == found[1]


def changed(place, ids=None, log_prob=None):
    rows = stored()
    if ids is not None:
        rows[0]["teacher_ids"][place] = ids
    if log_prob is not None:
        rows[0]["teacher_log_prob"][place] = log_prob
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        (changed(2, [5], [0.5]), "probabilities that add up to 1.649 for some label; it takes log"),
        (changed(2, [5], [float("nan")]), "probabilities that add up to nan"),
        (changed(2, [5, 5], [-1.0, -1.0]), "lists a class twice for one label"),
        (changed(2, [], []), "teacher_ids lists no class for some label that has a loss"),
        (changed(2, [61], [-1.0]), "logits have 61 classes"),
        (changed(2, [1.5], [-1.0]), "ids is .*; it takes an integer dtype"),
        (changed(2, [1, 2, 3, 4]), "k numbers for each label, as many as the other column"),
        ([{**r, "teacher_ids": r["input_ids"]} for r in stored()], "takes a list of numbers per"),
        ([{**r, "teacher_ids": r["teacher_ids"][1:]} for r in stored()], "it takes one per token"),
    ],
)
def test_what_is_refused(rows, message, tmp_path):
    collator = transformers.DataCollatorForSeq2Seq(tokenizer())
    ours = trainer(
        tmp_path, rows=rows, data_collator=collator, loss=MIXED, eval_dataset=rows, max_steps=1
    )
    with pytest.raises((TypeError, ValueError), match=message):
        ours.evaluate()


def test_columns_that_are_missing(tmp_path):
    rows = stored()
    half = [{n: v for n, v in row.items() if n != "teacher_log_prob"} for row in rows]
    with pytest.raises(ValueError, match="has the column teacher_ids and no teacher_log_prob"):
        trainer(tmp_path, rows=half, loss=MIXED)
    with pytest.raises(ValueError, match="teacher is given, and train_dataset has teacher_ids"):
        trainer(tmp_path, rows=rows, loss=MIXED, teacher=tiny_teacher())
    with pytest.raises(TypeError, match="teacher is missing: give a causal model, or rows with"):
        trainer(tmp_path, rows=tiny_rows(), loss=MIXED)
    ours = trainer(tmp_path, rows=rows, loss=MIXED, eval_dataset=tiny_rows())
    with pytest.raises(TypeError, match="teacher is missing: give a causal model, or rows with"):
        ours.evaluate()
    with pytest.raises(ValueError, match="the batch has the column teacher_ids and no"):
        ids = torch.zeros(1, 2, 1, dtype=torch.int64)
        stored_teacher({"teacher_ids": ids}, ids[..., 0], "ignore")
