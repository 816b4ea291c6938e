"""The table and the page of some runs, made by hand, and of real ones."""

import json
import re

import pytest

from segloss.train import report
from segloss.train.errors import UserError
from segloss.train.report import Record, scored, story, summary


def row(task, nll, **others):
    return {"task": task, "items": 50, "nll": [nll, nll - 0.1, nll + 0.1], **others}


GUESSES = {
    "accuracy": [0.5, 0.4, 0.6],
    "macro_f1": [0.3, 0.2, 0.4],
    "chance": 0.25,
    "majority": {"answer": "b", "accuracy": 0.3, "macro_f1": 0.1},
}
TIMING = {"load": 1.0, "training": 2.0, "total": 3.0}


def write_run(folder, loss, before=3.0, after=1.0, **given):
    folder.mkdir()
    tasks = ["colours", "a|b"]
    description = {
        "given": {"model_name_or_path": "tiny", "loss": loss, "max_steps": 9, **given},
        "tasks": tasks,
        "versions": {"torch": "2"},
        "device": "cpu",
    }
    results = {
        "tasks": [row("colours", after, **GUESSES), row("a|b", after)],
        "before": [row("colours", before), row("a|b", before)],
        "timing": TIMING, "steps": 9, "examples_per_step": 4, "stopped": "",
    }  # fmt: skip
    metrics = [
        {
            "step": step, "loss": 3 / step, "entropy": 1.0, "mean_token_accuracy": 0.5,
            "task_weight": {"colours": 0.4, "a|b": 0.6}, "divergence_factor": 0.5,
            "validation_loss": {"colours": 2.0, "a|b": 1.0}, "effective_sample_size": 3.0,
        }
        for step in range(1, 10)
    ]  # fmt: skip
    (folder / "segloss.json").write_text(json.dumps(description))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def write_selection(folder):
    folder.mkdir()
    subsets = [
        {"tasks": ["a"], "estimated": 1.0, "true": 1.1},
        {"tasks": ["a", "b"], "estimated": 0.9, "true": 0.95},
        {"tasks": ["b"], "estimated": 1.4, "true": None},
    ]
    (folder / "selection.json").write_text(json.dumps({"chosen": ["a", "b"], "subsets": subsets}))
    (folder / "segloss.json").write_text(json.dumps({"given": {"model_name_or_path": "tiny"}}))
    return folder


def test_one_table_for_two_runs(tmp_path):
    paths = [write_run(tmp_path / "ce", "ce"), write_run(tmp_path / "mix", "0.6*ce+0.4*dice")]
    records = report.read_records([str(path) for path in paths])
    lines = summary(records).splitlines()
    cells = [[c.strip() for c in line.split(" | ")] for line in lines[:11]]
    assert [c[2] for c in cells[2:10]] == [
        *("before training", "ce", "mix", "majority answer", "chance"),
        *("before training", "ce", "mix"),
    ]
    assert cells[3][3:5] == ["1.000 (0.900 to 1.100)", "50.0 (40.0 to 60.0)"]
    assert cells[3][5] == "0.300 (0.200 to 0.400) |"
    assert cells[5][3:] == ["-", "30.0", "0.100 |"] and cells[6][4] == "25.0"
    assert lines[7].startswith("| a\\|b")
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_every_run_has_its_own_before(tmp_path):
    paths = [write_run(tmp_path / "a", "ce"), write_run(tmp_path / "b", "ce", before=5.0)]
    records = report.read_records([str(path) for path in paths])
    labels = [line["label"] for line in scored(records)[0] if line["task"] == "colours"]
    assert labels == [
        *("a before training", "b before training", "a", "b", "majority answer", "chance"),
    ]


def test_of_runs_on_some_tasks_of_one_model_the_same_is_told_once():
    lines = {task: row(task, 3.0) for task in ("a", "b")}
    both = Record("both", {}, results={"before": [*lines.values()], "tasks": [*lines.values()]})
    some = Record("some", {}, results={"before": [lines["b"]], "tasks": [lines["b"]]})
    told = [(line["task"], line["label"]) for line in scored([some, both])[0]]
    assert sorted(told) == [
        ("a", "before training"), ("a", "both"),
        ("b", "before training"), ("b", "both"), ("b", "some"),
    ]  # fmt: skip


def test_stories_of_little():
    assert "chose the tasks ." in story(Record("a", {"given": {}}, selection={"subsets": []}))
    assert story(Record("a", {"given": {}})).startswith("a: a model, loss ce")


def test_stories(tmp_path):
    options = {"task_weights": "coba", "sample_weights": "irdro", "use_peft": True, "lora_r": 4}
    (record,) = report.read_records([str(write_run(tmp_path / "a", "ce", **options))])
    assert story(record) == (
        "a: tiny, loss ce, use_peft True, lora_r 4, task_weights coba, sample_weights irdro: 9 "
        "steps of 4 examples (load 1 s, training 2 s, total 3 s)."
    )
    early = Record("a", record.description, results=record.results | {"stopped": "patience"})
    assert story(early).endswith("because the validation loss did not fall any more.")
    unfinished = Record("b", record.description)
    assert "It has not finished: segloss train --resume goes on with it." in story(unfinished)


def test_page_and_pictures(command, tmp_path):
    from matplotlib.image import imread

    given = {"data": ["one.jsonl", "two.jsonl"], "max_length": None, "torch": "told"}
    runs = [write_run(tmp_path / "ce", "ce", **given)]
    runs.append(write_run(tmp_path / "<mix>", "0.6*ce+0.4*dice"))
    runs.append(write_selection(tmp_path / "choice"))
    code, _out, err = command("report", *runs, "--output", tmp_path / "report")
    assert code == 0, err
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = ("results", "training", "selection")
    assert names == {"report.html", *(f"{name}.png" for name in pictures)}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<mix>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "a, b" in page and "0.9000" in page and "0.6*ce+0.4*dice" in page
    assert "<td>one.jsonl two.jsonl</td>" in page and "None" not in page
    assert "<td>torch</td><td>told</td>" in page  # as `datasets`, an option and a package
    for name in pictures:
        picture = imread(tmp_path / "report" / f"{name}.png")
        assert picture.shape[1] > 700 and picture.std() > 0.05
    assert command("report", *runs, "--output", tmp_path / "report")[0] == 0  # it is replaced


def test_pictures_say_what_the_runs_hold(tmp_path):
    """Names and numbers of the figures themselves: nothing overlaps, ticks are whole."""
    from segloss.train.page import pictures

    runs = [write_run(tmp_path / "ce", "ce"), write_run(tmp_path / "mix", "ce")]
    runs.append(write_selection(tmp_path / "choice"))
    drawn = {p.name: p.figure for p in pictures(report.read_records([str(r) for r in runs]))}
    for figure in drawn.values():
        figure.draw_without_rendering()
    titles = [axis.get_title() for axis in drawn["training"].axes]
    assert len(titles) == 6 and titles[-2:] == ["weights of the tasks", titles[-1]]
    weights = drawn["training"].axes[-2].get_legend_handles_labels()[1]
    assert weights == ["ce: colours", "ce: a|b", "mix: colours", "mix: a|b"]
    results = drawn["results"].axes
    assert [axis.get_title() for axis in results] == [
        *("loss (nats per token)", "accuracy (%)", "macro-F1"),
    ]
    labels = [label.get_text() for label in results[0].get_yticklabels()]
    assert labels[:5] == [
        f"colours: {name}" for name in ("before training", "ce", "mix", "majority answer", "chance")
    ]
    boxes = [label.get_window_extent() for label in results[0].get_yticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    (axis,) = drawn["selection"].axes
    assert all(tick == int(tick) for tick in axis.get_xticks())
    # best estimate first, and the true losses at the same places
    assert axis.lines[0].get_ydata().tolist() == [0.9, 1.0, 1.4]
    assert axis.lines[1].get_xydata().tolist() == [[1, 0.95], [2, 1.1]]
    assert [text.get_text() for text in axis.texts] == ["a+b", "a"]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON that any tool reads; read back as nothing, of which no picture has a point."""
    from segloss.train.page import pictures
    from segloss.train.trainer import Trainer

    folder = write_run(tmp_path / "run", "ce")
    losses = {"colours": float("inf"), "a|b": 0.5}
    trainer = Trainer.__new__(Trainer)
    trainer.metrics, trainer.failures, trainer._whole = folder / "metrics.jsonl", {}, True
    trainer._note([{"step": 10, "loss": 0.25, "entropy": float("nan"), "validation_loss": losses}])

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    nulls = {
        "step": 10,
        "loss": 0.25,
        "entropy": None,
        "validation_loss": losses | {"colours": None},
    }
    assert json.loads(last, parse_constant=refuse) == nulls
    (record,) = report.read_records([str(folder)])
    assert record.metrics[-1] == nulls
    drawn = {picture.name: picture.figure for picture in pictures([record])}
    steps = {
        a.get_title(): [len(line.get_xdata()) for line in a.lines] for a in drawn["training"].axes
    }
    assert steps["training loss, as weighted"] == [10, 10]
    assert steps["entropy (nats)"] == [9, 9]
    assert steps["validation loss of the tasks"] == [9, 9, 10, 10]


def test_unfinished_runs_are_read(command, train, tmp_path):
    assert train()[0] == 0
    folder = tmp_path / "run"
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    code, _out, err = command("report", folder)
    assert code == 0, err
    assert "It has not finished" in (folder / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step"\n{"step": 1}\n', "metrics.jsonl, line 1: not JSON"),
        ("results.json", "{", "cannot read"),
        ("results.json", "[]", "a JSON object is needed"),
        ("selection.json", '{"subsets": [{}]}', 'a subset needs "tasks" and "estimated"'),
        ("segloss.json", "{}", "is no run's folder"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, message):
    folder = write_run(tmp_path / "run", "ce")
    (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        report.read_records([str(folder)])
    assert message in str(error.value)


def test_folders_that_are_none(command, tmp_path):
    run = write_run(tmp_path / "run", "ce")
    for words, message in (
        ((tmp_path / "none",), "none is no run's folder: there is no segloss.json in it"),
        ((run, run), "a run is given twice"),
        ((run, "--output", run), "exists and holds no report"),
    ):
        code, _, err = command("report", *words)
        assert code == 2 and message in err
