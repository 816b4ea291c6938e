"""`segloss compare`: what it refuses, runs, runs again, and says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from train.tiny import write_jsonl

from segloss.compare.command import CompareOptions, variants_of, varied
from segloss.compare.page import differences
from segloss.compare.paired import Difference, difference, f1_difference, items_needed, per_token
from segloss.compare.result import Score, sentences
from segloss.compare.runs import Run, devices, threads
from segloss.train.config import settings
from segloss.train.data import load

LABELS = [" a", " b", " c"]

# What a run leaves, without the training: scores that depend on the variant and the seed
STUB = """
import json, pathlib, random, sys, time
folder, given = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
with open(folder.parent.parent / "begun", "a") as file:
    print(folder.parent.name, given["seed"], file=file)
if given.get("learning_rate") == 13:
    sys.exit("segloss: error: the loss is nan")
time.sleep(given.get("warmup_steps", 0))
folder.mkdir(exist_ok=True)
draws = random.Random(str((given["seed"], given["loss"])))
rows = []
for i in range(80):
    expected = " " + "abc"[i % 3]
    choice = expected.strip() if draws.random() < (0.9 if given["loss"] == "gce" else 0.5) else "a"
    nll = (i % 5 + 1) * draws.uniform(0.5, 1.5)
    rows.append({"task": "letters", "expected": expected, "nll": nll, "tokens": i % 5 + 1,
                 "answer": " " + choice + ".", "choice": choice})
rows.append(rows[0] | {"task": "other"})
rows.append(rows[1] | {"task": "other"})
text = "".join(json.dumps(row) + chr(10) for row in rows)
(folder / "answers-after.jsonl").write_text(text)
(folder / "model.safetensors").write_text("weights")
(folder / "trained.json").write_text("{}")
(folder / "checkpoint-4").mkdir()
scores = {"nll": [], "exact_match": [], "accuracy": [], "macro_f1": []}
tasks = [{"task": "letters", **scores}, {"task": "other", "nll": []}]
steps = 9 if given["loss"] == "sadl" else 8
(folder / "results.json").write_text(json.dumps({"tasks": tasks, "steps": steps}))
"""


@pytest.fixture
def data(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i} {i % 3}:", "completion": LABELS[i % 3 if rng.random() < 0.8 else 0],
         "options": LABELS, "task": "letters"}
        for i in range(120)
    ]  # fmt: skip
    return write_jsonl(tmp_path / "data.jsonl", rows)


@pytest.fixture
def stubbed(command, data, tmp_path, monkeypatch):
    """The command, its runs replaced by STUB: (code, stdout, stderr)."""

    def start(run, places):
        run.folder.parent.mkdir(exist_ok=True)
        words = [sys.executable, "-c", STUB, str(run.folder), json.dumps(run.given)]
        with run.log.open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setattr("segloss.compare.runs.POLL_SECONDS", 0.01)

    def call(*words):
        common = ("--model", "none", "--data", data, "--output", tmp_path / "out")
        return command("compare", *common, *words)

    return call


def begun(tmp_path) -> list[str]:
    return (tmp_path / "out" / "begun").read_text().splitlines()


def fails(result, message: str) -> None:
    code, _, err = result
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err


VARY = ("--vary", "loss", "ce", "focal")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "los", "ce", "focal"], "there is no option --los; did you mean --loss?"),
        ([*VARY, "--eval-itmes", "9"], "did you mean --eval_items?"),
        (["--vary", "loss", "ce", "focall"], "--loss: loss 'focall': unknown loss 'focall'"),
        (["--vary", "sample-weights", "none", "odd"], "invalid choice: 'odd'"),
        (["--vary", "loss", "ce"], "--vary loss ce: it takes an option and two or more different"),
        (["--vary", "loss", "ce", "ce"], "two or more different values"),
        (["--loss", "ce"], "segloss compare takes an option to vary"),
        ([*VARY, "--loss", "ce"], "--loss is given and varied; it takes one of them"),
        ([*VARY, *VARY], "--vary loss is given twice"),
        (["--vary", "steps", "4", "8"], "compared after equal numbers of steps"),
        (["--vary", "seed", "4", "8"], "--vary seed: it is the same for all variants"),
        ([*VARY, "--patience", "2"], "--patience may end runs after unequal numbers of steps"),
        ([*VARY, "--seeds", "1"], "--seeds is 1; it takes a number from 2 up"),
        ([*VARY, "--jobs", "0"], "--jobs is 0; it takes a number from 1 up"),
        ([*VARY, "--eval-items", "0"], "nothing is held out to compare on: --eval_items N"),
        ([*VARY, "--eval-items", "1"], "only 1 item of task 'letters' is held out"),
        (
            ["--vary", "eval-items", "9", "12"],
            "eval-items=12 holds out other items than eval-items=9",
        ),
    ],
)
def test_refused_before_anything_runs(stubbed, tmp_path, words, message) -> None:
    fails(stubbed(*words), message)
    assert not (tmp_path / "out").exists()


def test_a_variant_s_options_do_not_reach_the_next_one_s_environment(monkeypatch) -> None:
    """Where transformers notes some, as of FSDP and, with older Accelerate, of torch.compile."""

    def noting(words, **others):
        monkeypatch.setitem(os.environ, "ACCELERATE_DYNAMO_BACKEND", "inductor")
        return settings(words, **others)

    words, vary = varied(["--vary", "torch-compile", "true", "false"])
    base = settings(words, options=CompareOptions)
    monkeypatch.setattr("segloss.compare.command.settings", noting)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    variants = variants_of(words, vary, base)
    assert [v.settings.training.torch_compile for v in variants] == [True, False]
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_no_model_is_refused(command, data) -> None:
    fails(command("compare", "--data", data, *VARY), "there is no model: give --model")


def test_power_is_said_before_anything_runs(stubbed) -> None:
    _, _, err = stubbed(*VARY, "--vary", "lr", "0.1", "0.2", "--eval-items", 30, "--seeds", 2)
    worst = items_needed(comparisons=3)
    points = 2 * (worst / 30) ** 0.5
    said, run = err.index(f"takes {worst:,} held-out items at worst"), err.index("seed 42 ...")
    assert said < run
    assert f"letters: 30 are held out, for {points:.1f} points at worst" in err


def test_every_combination_with_every_seed(stubbed, tmp_path) -> None:
    code, _, err = stubbed(*VARY, "--vary", "lr", "0.1", "0.2", "--seeds", 3, "--seed", 7, "--bf16")
    assert code == 0, err
    names = ["1-ce-lr=0.1", "2-ce-lr=0.2", "3-focal-lr=0.1", "4-focal-lr=0.2"]
    # seed by seed, so that what an interrupt leaves is balanced
    assert begun(tmp_path) == [f"{name} {seed}" for seed in (7, 8, 9) for name in names]
    runs = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    given = runs["focal / lr=0.2, seed 9"]
    expected = {
        "loss": "focal", "learning_rate": 0.2, "seed": 9, "split_seed": 7, "bf16": True,
        "save_strategy": "no", "evaluate_before": False, "model_name_or_path": "none",
    }  # fmt: skip
    assert expected.items() <= given.items()
    assert not {"output_dir", "vary", "seeds", "jobs"} & set(given)
    left = {path.name for path in (tmp_path / "out").glob("*/*/*")}
    assert left == {"results.json", "answers-after.jsonl"}  # no weights, nor what says there are


def test_models_are_kept_when_asked(stubbed, tmp_path) -> None:
    assert stubbed(*VARY, "--seeds", 2, "--keep-models")[0] == 0
    assert len(list((tmp_path / "out").glob("*/*/model.safetensors"))) == 4


def test_split_seed_holds_out_the_same_items_whatever_the_seed(data) -> None:
    words = ["--data", str(data), "--eval-items", "9"]
    held_out = [
        [row["prompt"] for row in load(settings([*words, *more]), chat=False).held_out]
        for more in (["--seed", "5"], ["--seed", "1", "--split-seed", "5"], ["--seed", "1"])
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def arrays(tmp_path, folder: str, seeds=(42, 43, 44)):
    """(expected, {column: (seeds, items)}) of what the stub has written."""
    rows = []
    for seed in seeds:
        lines = (tmp_path / "out" / folder / f"seed-{seed}" / "answers-after.jsonl").read_text()
        rows.append([r for r in map(json.loads, lines.splitlines()) if r["task"] == "letters"])
    names = ("nll", "tokens", "choice")
    columns = {name: np.array([[row[name] for row in r] for r in rows]) for name in names}
    return np.array([row["expected"].strip() for row in rows[0]]), columns


def test_numbers_and_sentences(stubbed, tmp_path) -> None:
    code, out, err = stubbed("--vary", "loss", "ce", "focal", "gce", "--seeds", 3, "--jobs", 2)
    assert code == 0, err
    found = {
        (s["task"], s["variant"], s["name"]): s
        for s in json.loads((tmp_path / "out" / "results.json").read_text())
    }
    true, ce = arrays(tmp_path, "1-ce")
    for folder, variant in (("2-focal", "focal"), ("3-gce", "gce")):
        _, own = arrays(tmp_path, folder)
        tokens = ce["tokens"][0]
        expected = {
            "nll": difference(
                per_token(ce["nll"], tokens), per_token(own["nll"], tokens), comparisons=2
            ),
            "accuracy": difference(ce["choice"] == true, own["choice"] == true, comparisons=2),
            "macro_f1": f1_difference(true, ce["choice"], own["choice"], comparisons=2),
        }
        expected["exact_match"] = expected["accuracy"]
        for name, one in expected.items():
            score = found["letters", variant, name]
            assert score["difference"] == pytest.approx(vars(one))
            assert np.mean(score["by_seed"]) == pytest.approx(one.mean)
            first = found["letters", "ce", name]["mean"]
            assert score["mean"] - first == pytest.approx(one.mean)
    hits = 100 * (ce["choice"] == true).mean()
    assert found["letters", "ce", "accuracy"]["mean"] * 100 == pytest.approx(hits)
    assert found["letters", "ce", "nll"]["mean"] == pytest.approx(
        ce["nll"].sum() / tokens.sum() / 3
    )
    one = found["letters", "gce", "accuracy"]["difference"]
    low, high, mean = (100 * one[name] for name in ("low", "high", "mean"))
    by = f"by {mean:.1f} points (between {low:.1f} and {high:.1f})"
    assert f"gce, compared with ce, on letters: better in exact match {by}" in out
    size = 100 * found["letters", "focal", "accuracy"]["difference"]["detectable"]
    assert f" {size:.1f} points" in out.partition("focal, compared with ce, on letters")[2]
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"{hits + mean:.1f}, {mean:+.1f} ({low:+.1f} to {high:+.1f})" in table
    assert table in out and table.count("| letters ") == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "gce, compared with ce" in page
    assert (tmp_path / "out" / "differences.png").stat().st_size > 10_000


def test_nothing_runs_twice_and_another_command_line_is_refused(stubbed, tmp_path, data) -> None:
    words = (*VARY, "--seeds", 2, "--lr", 0.1)
    first = stubbed(*words)
    (tmp_path / "out" / "2-focal" / "seed-43" / "results.json").unlink()
    again = stubbed(*words, "--jobs", 2)  # which changes nothing
    assert first[:2] == again[:2] and "3 of 4 runs are finished already" in again[2]
    assert begun(tmp_path)[4:] == ["2-focal 43"]
    fails(
        stubbed(*VARY, "--seeds", 2, "--lr", 0.2), "another command line, --learning_rate 0.1 and"
    )
    fails(stubbed(*VARY, "--seeds", 3, "--lr", 0.1), "another command line, without ce, seed 44")
    fails(stubbed("--vary", "loss", "ce", "focal", "gce", "--seeds", 2, "--lr", 0.1), "without gce")
    fails(stubbed(*words, "--keep-models"), "keep_models changed since")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:-1]) + lines[-1].replace('" ', '"'))
    fails(stubbed(*words), "data changed since")
    assert len(begun(tmp_path)) == 5


def test_a_folder_of_something_else_is_refused(stubbed, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    fails(stubbed(*VARY), "exists and holds no comparison; give another --output")


def test_a_variant_that_fails_is_left_out_and_said(stubbed, tmp_path) -> None:
    words = ("--vary", "lr", "0.1", "13", "0.2", "--loss", "ce", "--seeds", 2)
    result = stubbed(*words)
    fails(result, "lr=13, seed 42 failed: the loss is nan (exit code 1")
    assert "lr=13: not compared, since runs of it failed." in result[1]
    assert "lr=0.2, compared with lr=0.1, on letters: no difference found" in result[1]
    assert begun(tmp_path).count("2-lr=13 42") == 1 and "2-lr=13 43" not in begun(tmp_path)
    # still corrected for what was asked
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {s["variant"] for s in found} == {"lr=0.1", "lr=0.2"}
    stubbed(*words)
    assert begun(tmp_path)[5:] == ["2-lr=13 42"]


def test_a_first_variant_that_fails_ends_it(stubbed, tmp_path) -> None:
    result = stubbed("--vary", "lr", "13", "0.1", "--loss", "ce", "--seeds", 2)
    fails(result, "there is nothing to compare with: lr=13, seed 42 failed: the loss is nan")
    assert begun(tmp_path) == ["1-lr=13 42"]


def test_unequal_steps_are_refused_as_soon_as_they_are_seen(stubbed, tmp_path) -> None:
    result = stubbed("--vary", "loss", "ce", "sadl", "--seeds", 2)
    fails(result, "sadl, seed 42 took 9 steps and ce, seed 42 8; only equal numbers are compared")
    assert len(begun(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_runs_and_says_how_to_go_on(stubbed, tmp_path, number) -> None:
    before = signal.getsignal(number)
    watch = (
        "import os, sys, time, pathlib\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
        "os.kill(int(sys.argv[2]), int(sys.argv[3]))"
    )
    words = [str(tmp_path / "out" / "begun"), str(os.getpid()), str(int(number))]
    with subprocess.Popen([sys.executable, "-c", watch, *words]):
        start = time.monotonic()
        code, _, err = stubbed(*VARY, "--seeds", 2, "--warmup-steps", 600)
    assert code == 130 and time.monotonic() - start < 300
    assert f"interrupted; the same command with --output {tmp_path / 'out'} goes on" in err
    assert signal.getsignal(number) == before


def test_coba_s_own_validation_items_are_pointed_out(stubbed, data) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    write_jsonl(data, rows + [row | {"task": "more"} for row in rows])
    _, _, err = stubbed("--vary", "task-weights", "none", "coba", "--loss", "ce", "--seeds", 2)
    assert "note: task-weights=coba trains on" in err and "--validation_items N" in err


def test_one_of_several_runs_has_its_share_of_the_cores(monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(1) == {} and threads(3) == {"OMP_NUM_THREADS": "5"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(3) == {}


def test_one_of_several_runs_has_a_gpu(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    name = "CUDA_VISIBLE_DEVICES"
    assert devices(3) == [{name: "2"}, {name: "5"}, {name: "2"}]
    assert devices(1) == [{}]  # all, as without a comparison


def score(name: str, mean: float, low: float, high: float, size: float, task="t") -> Score:
    return Score(task, 9, "new", "old", name, 0.5, [mean], Difference(mean, low, high, size))


def test_sentences_are_for_everybody() -> None:
    nan = float("nan")
    block = [
        score("nll", -0.2, -0.3, -0.1, 0.1),
        score("exact_match", -0.03, -0.056, -0.004, 0.03),
        score("accuracy", 0.01, -0.01, 0.03, 0.021),
        score("macro_f1", 0.01, -0.01, 0.03, 0.034),
        score("accuracy", 0.01, -0.9, 0.9, 1.4, "u"),
        score("macro_f1", 0.0, 0.0, 0.0, nan, "u"),
    ]
    assert sentences(block) == [
        "new, compared with old, on t: better in loss by 0.200 nats per token (between 0.100 and "
        "0.300). Worse in exact match by 3.0 points (between 0.4 and 5.6). No difference found "
        "in accuracy and macro-F1; this comparison could have shown one of about 2.1 points and "
        "0.034.",
        "new, compared with old, on u: no difference found in accuracy; this comparison is too "
        "small to show any. No difference found in macro-F1, the same on every item.",
    ]
    assert block[-1].as_json()["difference"]["detectable"] is None


def test_picture_shows_every_interval() -> None:
    names = ("nll", "accuracy")
    scores = [score(n, 0.01, -0.02, 0.04, 0.1, t) for t in ("t", "u") for n in names]
    figure = differences(scores).figure
    figure.draw_without_rendering()
    assert [axis.get_title() for axis in figure.axes] == [
        "loss (nats per token)\nless is better", "accuracy (points)\nmore is better",
    ]  # fmt: skip
    lines = [line.get_xdata() for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    drawn = [list(map(float, x)) for x in lines if len(x) == 2]
    assert [pytest.approx([-2.0, 4.0])] * 2 == [x for x in drawn if x != [0, 0]]
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["t: new", "u: new"]
    boxes = [text.get_window_extent() for text in (*labels, *figure.axes[0].texts)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_real_runs_survive_a_kill(data, model_folder, tmp_path) -> None:
    """Killed after its first run, it goes on; its means are those of the runs' own results."""
    command = [
        *(sys.executable, "-m", "segloss.command", "compare", "--model", str(model_folder)),
        *("--data", str(data), "--output", str(tmp_path / "out"), "--steps", "6", "--lr", "0.05"),
        *("--batch-size", "4", "--eval-items", "12", "--seeds", "2", "--vary", "loss", "ce", "gce"),
        *("--max-length", "32", "--jobs", "2"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    first = tmp_path / "out" / "1-ce" / "seed-42" / "results.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    stamp = first.stat().st_mtime_ns
    wait_for_orphans(tmp_path / "out")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == stamp and "runs are finished already" in done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {s["name"] for s in found} == {"nll", "exact_match", "accuracy", "macro_f1"}
    for score in found:
        folder = "1-ce" if score["variant"] == "ce" else "2-gce"
        own = [json.loads((tmp_path / "out" / folder / f"seed-{s}" / "results.json").read_text())
               for s in (42, 43)]  # fmt: skip
        of_seeds = [result["tasks"][0][score["name"]][0] for result in own]
        assert score["mean"] == pytest.approx(np.mean(of_seeds), rel=1e-9)
    settings = json.loads((tmp_path / "out" / "2-gce" / "seed-43" / "segloss.json").read_text())
    assert settings["given"]["seed"] == 43 and settings["given"]["loss"] == "gce"


def wait_for_orphans(folder: Path) -> None:
    """A run that was begun before the kill is a process of its own, and ends as it would have."""
    for log in folder.glob("*/*.log"):
        while not (log.with_suffix("") / "results.json").exists():
            time.sleep(0.1)
