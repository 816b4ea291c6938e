"""`segloss evaluate`, `segloss report`, early stopping and TensorBoard on the tiny model."""

import html.parser
import json
import shutil

import numpy as np
import pytest

from segloss.train import figures
from segloss.train.record import WEIGHT_EDGES, read_records

WEIGHTED = (
    *("--task-weights", "coba", "--coba-warmup", 2, "--coba-history", 3, "--validation-items", 2),
    *("--sample-weights", "irdro", "--steps", 8, "--lr", 0.01),
)


def rows(path, event):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def fails(result, message):
    code, _, err = result
    assert code == 2 and "Traceback" not in err and message in err.strip().splitlines()[-1], err
    return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """A weighted run and a plain one, and a selection."""
    from train.tiny import examples, write_jsonl

    from segloss.train.command import main

    folder = tmp_path_factory.mktemp("runs")
    odd = "<b>&$x$"  # neither HTML nor mathematics
    data = write_jsonl(
        folder / "data.jsonl", examples(odd, 12, options=[" yes", " no"]) + examples("echo", 12)
    )
    common = ["train", "--model", model_folder, "--data", data, "--batch-size", 4]
    common += ["--eval-items", 4]
    for name, options in (("weighted", WEIGHTED), ("plain", ("--steps", 5))):
        arguments = [*common, *options, "--output", folder / name]
        assert main([str(argument) for argument in arguments]) == 0
    (folder / "chosen").mkdir()
    selection = {
        "subsets": [
            {"tasks": [odd], "estimated": 1.25, "true": 1.5},
            {"tasks": [odd, "echo"], "estimated": 0.75, "true": 1.0},
            {"tasks": ["echo"], "estimated": 2.125, "true": None},
        ],
        "chosen": ["echo", odd],
    }
    (folder / "chosen" / "selection.json").write_text(json.dumps(selection))
    # a selection trains on all tasks, and then on subsets, from step 1 again
    steps = [{"event": "step", "step": step, "loss": 1 / step} for step in (1, 2, 3, 1, 2)]
    lines = "".join(json.dumps(row) + "\n" for row in steps)
    (folder / "chosen" / "metrics.jsonl").write_text(lines)
    return folder


# ---------------------------------------------------------------------------------- evaluate


def test_evaluating_a_run_repeats_its_result(command, runs):
    code, out, _ = command("evaluate", runs / "weighted")
    assert code == 0
    trained = json.loads((runs / "weighted" / "results.json").read_text())["tasks"]
    for row in trained:
        assert f"| {row['loss_after']:.3f} |" in out
    assert "token accuracy" in out and "Exact match" in out


def test_evaluating_a_model_takes_options(command, runs, model_folder, tmp_path):
    result = tmp_path / "result.json"
    data = runs / "data.jsonl"
    options = ("--data", data, "--eval-items", 4)
    assert command("evaluate", model_folder, *options, "--json", result)[0] == 0
    tasks = json.loads(result.read_text())["tasks"]
    before = rows(runs / "weighted" / "metrics.jsonl", "evaluation")[:2]
    assert [task["loss"] for task in tasks] == [row["loss"] for row in before]
    assert fails(command("evaluate", model_folder, *options, "--json", result), "exists already")


def test_evaluating_every_example(command, runs, model_folder, tmp_path):
    """More items than there are: all of them, with none left to take a majority answer from."""
    result = tmp_path / "result.json"
    options = ("--data", runs / "data.jsonl", "--eval-items", 1000, "--json", result)
    assert command("evaluate", model_folder, *options)[0] == 0
    tasks = json.loads(result.read_text())["tasks"]
    assert [(task["items"], task["majority"]) for task in tasks] == [(12, None)] * 2


def test_what_cannot_be_evaluated(command, runs, tmp_path):
    assert fails(command("evaluate", tmp_path / "none"), "no such folder")
    (tmp_path / "config.json").write_text('{"settings": {}}')
    assert fails(command("evaluate", tmp_path), "has no checkpoint/: the run did not finish")
    (tmp_path / "config.json").write_text('{"settings": {"target": ["a"]}}')
    assert fails(command("evaluate", tmp_path), "is a run of segloss select")


# ------------------------------------------------------------------------------------ report


class Page(html.parser.HTMLParser):
    """The headings, images, text and links of a page; checks that its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.images, self.words, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)
        assert tag not in ("script", "link", "b"), "the page needs nothing else"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.words.append(data)


def test_report_of_one_run(command, runs):
    code, out, err = command("report", runs / "weighted")
    assert code == 0, err
    folder = runs / "weighted" / "report"
    assert out.strip() == str(folder / "report.html")
    page = Page((folder / "report.html").read_text())
    assert page.headings == [
        *("In numbers", "Results on held-out items", "Loss of each task", "Task weights (CoBa)"),
        *("Sample weights", "Training", "Settings that are not the default"),
    ]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    names = {path.name for path in folder.iterdir()}
    pictures = {"results", "task-losses", "task-weights", "sample-weights", "training"}
    assert names == {"report.html", *(f"{name}.png" for name in pictures)}
    text = " ".join(page.words)
    assert "<b>&$x$" in text and "8 of 8 steps of 4 examples" in text
    assert "--coba-warmup" in text and "task weights by CoBa, sample weights by irdro" in text


def test_report_is_replaced_but_nothing_else(command, runs, tmp_path):
    for _ in range(2):
        assert command("report", runs / "plain", "--output", tmp_path / "r")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    result = command("report", runs / "plain", "--output", tmp_path / "mine")
    assert fails(result, "exists and holds no report")


def test_report_of_runs_side_by_side(command, runs, tmp_path):
    names = ("weighted", "plain", "chosen")
    folders = [runs / name for name in names]
    code, _, err = command("report", *folders, "--output", tmp_path / "r")
    assert code == 0, err
    page = Page((tmp_path / "r" / "report.html").read_text())
    assert "Selection of tasks: estimated and true losses" in page.headings
    assert "Chosen tasks of chosen" in page.headings
    text = " ".join(page.words)
    assert "0.7500" in text and "2.1250" in text and "echo, <b>&$x$" in text
    assert "The curves are of its training on all tasks." in text
    assert text.count("weighted") > 3 and text.count("plain") > 3


def test_pictures_show_the_data(runs):
    """What the axes hold is what metrics.jsonl and selection.json say."""
    records = read_records([str(runs / name) for name in ("weighted", "chosen")])
    steps = rows(runs / "weighted" / "metrics.jsonl", "step")
    assert records[1].series("loss") == ([1, 2, 3], [1.0, 1 / 2, 1 / 3])
    drawn = {picture.name: picture.figure.axes for picture in figures.pictures(records)}

    odd, echo = drawn["task-weights"][0].get_lines()[:2]
    for line, task in ((odd, "<b>&$x$"), (echo, "echo")):
        assert list(line.get_ydata()) == [row["task_weight"][task] for row in steps]
    (share,) = drawn["task-weights"][1].get_lines()
    assert list(share.get_ydata()) == [row["divergence_factor"] for row in steps]

    (stairs,) = drawn["sample-weights"][0].patches
    heights = stairs.get_data().values
    assert sum(heights) == pytest.approx(100)
    counts = np.sum([row["sample_weight_counts"] for row in steps], axis=0)
    assert list(heights) == pytest.approx([100 * c / 32 for c in counts])
    dots = drawn["sample-weights"][1].get_lines()[0]
    assert list(dots.get_ydata()) == [row["effective_sample_size"] for row in steps]

    pairs = drawn["selection"][0].get_lines()[0]
    assert list(pairs.get_xdata()) == [1.25, 0.75] and list(pairs.get_ydata()) == [1.5, 1.0]
    chosen = drawn["selection"][0].get_lines()[1]
    assert (chosen.get_label(), list(chosen.get_xdata())) == ("chosen", [0.75])

    bars = [bar.get_height() for bar in drawn["results"][0].patches]
    evaluations = [row["loss"] for row in rows(runs / "weighted/metrics.jsonl", "evaluation")]
    assert bars == evaluations


def test_equal_sample_weights_are_in_the_middle_bin():
    below = [edge for edge in WEIGHT_EDGES if edge < 1]
    assert len(below) == len(WEIGHT_EDGES) - len(below)
    assert below[-1] == pytest.approx(1 / WEIGHT_EDGES[len(below)])


def test_report_of_an_unfinished_run(command, runs, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs / "weighted" / "config.json").read_bytes())
    text = (runs / "weighted" / "metrics.jsonl").read_bytes().split(b'{"event": "step", "step": 5')
    (folder / "metrics.jsonl").write_bytes(text[0] + b'{"event": "st')
    code, _, err = command("report", folder)
    assert code == 0, err
    page = Page((folder / "report" / "report.html").read_text())
    assert "It has not finished" in " ".join(page.words)
    assert "Results on held-out items" not in page.headings


def test_report_of_runs_of_different_tasks_and_settings(command, runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "plain", other)
    for name in ("metrics.jsonl", "results.json", "config.json"):
        path = other / name
        path.write_text(path.read_text().replace("echo", "mirror"))
    config = json.loads((other / "config.json").read_text())
    config["settings"]["target"] = ["mirror"]  # a setting that the other run does not have
    (other / "config.json").write_text(json.dumps(config))
    code, _, err = command("report", runs / "plain", other, "--output", tmp_path / "r")
    assert code == 0, err
    assert "mirror" in " ".join(Page((tmp_path / "r" / "report.html").read_text()).words)


def test_what_cannot_be_reported(command, runs, tmp_path):
    assert fails(command("report", tmp_path / "none"), "no such run folder")
    assert fails(command("report", tmp_path), "is no run's folder")
    assert fails(command("report", runs / "plain", runs / "plain"), "given twice")
    (tmp_path / "metrics.jsonl").write_text("{\n{}\n")
    assert fails(command("report", tmp_path), "metrics.jsonl, line 1: not JSON")


# ---------------------------------------------------------------- early stopping, TensorBoard


def test_patience_stops_and_keeps_the_best(train, command, tmp_path):
    """With a rate that wrecks the model the first validation is the best."""
    options = ("--patience", 2, "--validate-every", 1, "--validation-items", 3, "--steps", 30)
    code, out, err = train(*options, "--lr", 3.0)
    assert code == 0, err
    metrics = tmp_path / "run" / "metrics.jsonl"
    losses = [row["mean_validation_loss"] for row in rows(metrics, "validation")]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 == len(rows(metrics, "step")) < 30
    words = " ".join(out.split())
    assert f"Training stopped at step {best + 2} of 30: no lower validation loss in 2" in words
    assert f"The weights are those of step {best}" in words
    timing = json.loads((tmp_path / "run" / "results.json").read_text())["timing"]
    assert timing["stopped_by_patience"] and timing["kept_step"] == best
    assert not (tmp_path / "run" / "best").exists()

    # the kept weights are those that a run of as many steps at the same rates ends with
    assert losses[best - 1] < losses[-1]
    after = rows(metrics, "evaluation")[2:]
    mean = sum(row["loss"] for row in after) / 2
    assert abs(mean - losses[best - 1]) < abs(mean - losses[-1])


def test_stopped_before_the_first_validation(train, tmp_path):
    options = ("--patience", 3, "--validation-items", 3, "--steps", 90, "--time-limit", 0.001)
    code, out, err = train(*options)
    assert code == 0, err
    steps = len(rows(tmp_path / "run" / "metrics.jsonl", "step"))
    assert 0 < steps < 9 and "The weights are those of step" not in " ".join(out.split())
    timing = json.loads((tmp_path / "run" / "results.json").read_text())["timing"]
    assert timing["kept_step"] == steps


def test_tensorboard_has_the_metrics(train, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, err = train(*WEIGHTED, "--tensorboard")
    assert code == 0, err
    board = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = rows(tmp_path / "run" / "metrics.jsonl", "step")
    weights = [scalar.value for scalar in board.Scalars("task_weight/echo")]
    assert weights == pytest.approx([row["task_weight"]["echo"] for row in steps])
    assert [scalar.step for scalar in board.Scalars("loss")] == list(range(1, 9))
