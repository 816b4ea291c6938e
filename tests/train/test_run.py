"""A whole run on the tiny model: the folder it leaves, and what survives when something fails."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segloss.train import run
from segloss.train.run_folder import RunFolder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_folder_contents(train, tmp_path, model_folder):
    from matplotlib.image import imread
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = train("--loss", "0.6*ce+0.4*lovasz", "--lr", 0.01)
    assert code == 0, err
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoint", "loss.png", "results.json", "results.md"),
        *("answers-before.jsonl", "answers-after.jsonl"),
    }

    settings = json.loads((folder / "config.json").read_text())
    assert settings["settings"]["loss"] == "0.6*ce+0.4*lovasz"
    assert settings["settings"]["max_prompt_tokens"] == 512
    assert settings["data"]["parity"] == {
        "examples": 12,
        "short_enough": 12,
        "train": 8,
        "held_out": 4,
    }
    assert set(settings["versions"]) == {"python", "segloss", "torch", "transformers", "numpy"}

    metrics = rows(folder / "metrics.jsonl")
    events = ["evaluation"] * 2 + ["step"] * 3 + ["evaluation"] * 2
    assert [row["event"] for row in metrics] == events
    assert [row["step"] for row in metrics[2:5]] == [1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "seconds"} <= set(metrics[2])

    checkpoint = folder / "checkpoint"
    assert {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors", ".jinja"}
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    untrained = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.equal(trained.lm_head.weight, untrained.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 258

    results = json.loads((folder / "results.json").read_text())
    parity, echo = results["tasks"]
    assert parity["task"] == "parity" and parity["items"] == 4
    assert parity["chance"] == 0.5 and echo["chance"] is None
    assert parity["majority_answer"] in ("yes", "no")
    assert parity["loss_before"] == metrics[0]["loss"]
    assert parity["loss_after"] == metrics[5]["loss"] < parity["loss_before"]
    assert results["timing"]["steps"] == 3 and not results["timing"]["stopped_by_time_limit"]

    table = (folder / "results.md").read_text()
    assert table.strip() in out and "| parity |" in table
    assert len({len(line) for line in table.splitlines() if line.startswith("|")}) == 1
    answers = rows(folder / "answers-before.jsonl")
    assert len(answers) == 8 and answers[0]["task"] == "parity"

    picture = imread(folder / "loss.png")
    assert picture.shape[1] > 1500 and picture.std() > 0.05


def test_the_same_seed_gives_the_same_run(train, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        assert train("--output", tmp_path / name, "--seed", seed)[0] == 0
    logs = [rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "three")]
    for log in logs:
        for row in log:
            row.pop("seconds", None)
    assert logs[0] == logs[1] != logs[2]


def test_a_checkpoint_is_a_model_folder(train, tmp_path):
    assert train()[0] == 0
    again = train("--model", tmp_path / "run" / "checkpoint", "--output", tmp_path / "again")
    assert again[0] == 0
    first, second = (rows(tmp_path / name / "metrics.jsonl") for name in ("run", "again"))
    assert [row["loss"] for row in second[:2]] == pytest.approx([row["loss"] for row in first[-2:]])


def test_time_limit_stops_training_and_says_so(train, tmp_path):
    code, out, _ = train("--time-limit", 0.001, "--steps", 50)
    assert code == 0
    assert "Training stopped at step 1 of 50 to keep to the time limit" in " ".join(out.split())
    timing = json.loads((tmp_path / "run" / "results.json").read_text())["timing"]
    assert timing["steps"] == 1 and timing["stopped_by_time_limit"]


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path):
    code, _, err = train("--lr", 1e30, "--steps", 20)
    assert code == 2
    assert "the training's loss is nan at step" in err and "Traceback" not in err
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] is None


# ----------------------------------------------------------------------------------- a full disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_the_checkpoint_still_evaluates(train, tmp_path, monkeypatch):
    def half_written(self, path):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        full_disk()

    monkeypatch.setattr(run, "_save", half_written)
    code, out, err = train()
    assert code == 2 and "| parity |" in out
    assert err.strip().splitlines()[-1] == (
        f"segloss: error: could not write to {tmp_path}/run: checkpoint (No space left on device)"
    )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"checkpoint", "partial-checkpoint"} & names
    assert {"results.json", "answers-after.jsonl"} <= names


def test_full_disk_reported_by_tokenizers(train, monkeypatch):
    def save(self, path):
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    monkeypatch.setattr(run, "_save", save)
    code, _, err = train()
    assert code == 2 and "checkpoint (No space left on device (os error 28))" in err


def test_full_disk_before_training_ends_the_run_at_once(train, tmp_path, monkeypatch):
    write_text = Path.write_text

    def full_for_answers(path, *args, **kwargs):
        full_disk() if "answers" in path.name else write_text(path, *args, **kwargs)

    monkeypatch.setattr("pathlib.Path.write_text", full_for_answers)
    code, out, err = train()
    assert code == 2 and out == ""
    assert "answers-before.jsonl (No space left on device)" in err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_full_disk_at_the_very_beginning_leaves_no_folder(train, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    code, out, err = train()
    assert code == 2 and out == ""
    assert f"cannot create the run folder {tmp_path}/run: No space left on device" in err
    assert not list(tmp_path.glob("*run*"))


class FullThenFree:
    """A file that takes 5 bytes of a line, then nothing, then everything."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, text):
        self.writes += 1
        if self.writes == 1:
            return self.file.write(text[:5])
        return full_disk() if self.writes == 2 else self.file.write(text)

    def close(self):
        self.file.close()


def test_metrics_wait_for_room(tmp_path):
    with RunFolder(str(tmp_path / "run")) as folder:
        folder._metrics = FullThenFree(folder._metrics)
        folder.log("step", step=1)
        assert folder.failures == ["metrics.jsonl (No space left on device)"]
        folder.log("step", step=2)
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


# ------------------------------------------------------------------------------------- a kill


def test_a_kill_loses_no_line_of_metrics(tmp_path, model_folder, data_file, monkeypatch):
    command = [
        *(sys.executable, "-m", "segloss.train.command", "train", "--model", model_folder),
        *("--data", data_file, "--output", tmp_path / "run", "--steps", "100000"),
        *("--batch-size", "2", "--eval-items", "2"),
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        stop = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < stop:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 6:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    lines = rows(metrics)
    assert [row["event"] for row in lines[:3]] == ["evaluation", "evaluation", "step"]
    steps = [row["step"] for row in lines[2:]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    assert (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "answers-before.jsonl").exists()
