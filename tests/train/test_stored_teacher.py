"""`segloss train` with a stored teacher: columns of the data in the place of `--teacher`."""

import json
import math

import pytest
import torch
from train.test_run import fails, rows
from train.test_teacher import MIXED, teacher_folder  # noqa: F401  (a fixture)
from train.tiny import write_jsonl


def stored(count=6):
    """Rows of tokens, three of them a prompt; the teacher knows two classes of every label."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 256, (6,), generator=generator).tolist()
        classes = [torch.randperm(258, generator=generator)[:2].tolist() for _ in range(3)]
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * 3 + ids[3:],
                "teacher_ids": [[], [], [], *classes],
                "teacher_log_prob": [[], [], [], *[[math.log(0.5), math.log(0.3)]] * 3],
            }
        )
    return made


@pytest.fixture
def learn(train, tmp_path):
    def run(data, *options, loss=MIXED):
        source = write_jsonl(tmp_path / "stored.jsonl", data)
        return train("--loss", loss, "--eval-items", 0, "--steps", 1, "--data", source, *options)

    return run


def plain_loss(model, row):
    """0.5 cross-entropy + 0.5 KL at temperature 2, of the labels' three places."""
    logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
    terms = []
    for place in (3, 4, 5):
        nll = -logits[place - 1].log_softmax(-1)[row["labels"][place]]
        log_p = (logits[place - 1] / 2).log_softmax(-1)[row["teacher_ids"][place]]
        log_q = (torch.tensor(row["teacher_log_prob"][place]).double() / 2).log_softmax(-1)
        terms.append(0.5 * nll + 0.5 * (log_q.exp() * (log_q - log_p)).sum())
    return torch.stack(terms)


def test_the_stored_teacher_s_loss_is_trained(learn, tmp_path):
    from segloss.train.config import settings
    from segloss.train.run import Run

    data = stored()
    code, _, err = learn(data, "--batch-size", 6)
    assert code == 0, err
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    given = json.loads((tmp_path / "run" / "segloss.json").read_text())["given"]
    run = Run(settings([], given | {"output_dir": str(tmp_path / "x")}))
    with torch.no_grad():
        expected = torch.cat([plain_loss(run.trainer.model, row) for row in data]).mean().item()
    tolerance = 2e-2 if run.trainer.args.bf16 else 1e-5
    assert row["loss"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("mode, part", [("keep_start", slice(5)), ("keep_end", slice(1, 6))])
def test_lists_are_cut_as_the_tokens_are(mode, part, model_folder, tmp_path):
    from segloss.train.config import settings
    from segloss.train.run import Run

    data = stored()
    source = write_jsonl(tmp_path / "stored.jsonl", data)
    given = {"model_name_or_path": str(model_folder), "data": [str(source)], "loss": MIXED}
    given |= {"max_length": 5, "truncation_mode": mode, "eval_items": 0}
    run = Run(settings([], given | {"output_dir": str(tmp_path / "x")}))
    by_ids = {tuple(row["input_ids"][part]): row for row in data}
    assert len(run.trainer.train_dataset) == len(data)
    for row in run.trainer.train_dataset:
        assert row["teacher_ids"] == by_ids[tuple(row["input_ids"])]["teacher_ids"][part]


def without(data, name):
    return [{k: v for k, v in row.items() if k != name} for row in data]


def changed(**columns):
    data = stored()
    for name, (place, value) in columns.items():
        data[1][name][place] = value
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        (without(stored(), "teacher_ids"), 'line 1: there are 0 "teacher_ids" and 6 "teacher_lo'),
        (changed(teacher_ids=(4, 7)), 'line 2: "teacher_ids" has 7, where it takes a list of who'),
        (changed(teacher_ids=(4, [7])), 'line 2: there are 5 "teacher_ids" and 6 "teacher'),
        (changed(teacher_ids=(4, [7, 7])), 'line 2: teacher_ids lists a class twice for one'),
        (changed(teacher_ids=(4, [7, 2.5])), 'line 2: "teacher_ids" has 2.5, where it takes'),
        (changed(teacher_ids=(4, [7, 258])), "line 2: teacher_ids has the token 258; the model"),
        (changed(teacher_ids=(4, [-1, -1])), "line 2: teacher_ids lists no class for some label"),
        (changed(teacher_log_prob=(4, [0.6, 0.3])), 'line 2: "teacher_log_prob" has 0.6, where i'),
        (changed(teacher_log_prob=(4, [-0.1, -0.1])),
         "line 2: teacher_log_prob holds probabilities that add up to 1.81 for some label"),
        (without(without(stored()[:1], "teacher_ids"), "teacher_log_prob") + stored()[1:],
         "5 of 6 rows have a teacher_ids; all or none must"),
        ([row | {"teacher_ids": [[]], "teacher_log_prob": [[]]} for row in stored()],
         "line 1: it has 1 teacher_ids for 6 tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(learn, data, message):
    assert fails(learn(data), message)


def test_one_teacher(learn, teacher_folder):  # noqa: F811
    assert fails(
        learn(stored(), "--teacher", teacher_folder), "teacher is given, and train_dataset has teac"
    )
    assert fails(
        learn(stored(), "--packing"), "teacher_ids, teacher_log_prob is a column of train_"
    )
    assert fails(learn(stored(), "--teacher-rest", "ignore"), "rest='ignore' takes 1")
    code, _, err = learn(stored(), loss="ce")
    assert code == 0 and "are read by distill alone" in err
