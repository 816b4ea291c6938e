"""A run that was killed, or whose checkpoint is damaged, ends like one that was left alone."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from segloss.train.run_folder import RunFolder

KILLED = Path(__file__).with_name("killed.py")
SHORT = (
    *("--steps", "7", "--batch-size", "3", "--eval-items", "3", "--lr", "0.01"),
    *("--save-every", "2", "--validation-items", "3"),
)
WEIGHTED = (
    *("--loss", "0.6*ce+0.4*lovasz", "--accumulation", "2"),
    *("--task-weights", "coba", "--coba-warmup", "2", "--coba-history", "3"),
    *("--sample-weights", "irdro", "--sample-burn-in", "1"),
)
LORA = (
    *("--lora-rank", "2", "--lora-dropout", "0.3", "--lora-targets", "all-linear", "head"),
    *("--accumulation", "2", "--sample-weights", "irdro"),
    *("--patience", "2", "--validate-every", "1", "--lr", "0.3"),
)


def rows(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


def state(folder):
    """The last checkpoint's numbers, times apart."""
    last = max((folder / "resume").iterdir())
    values = json.loads((last / "state.json").read_text())
    for name in ("seconds", "timing", "metrics_bytes"):  # times are text of varying length
        values.pop(name)
    return last.name, values, load_file(last / "state.safetensors")


def assert_same(one, two):
    """Weights, metrics, results, optimizer, CoBa and random state, bit for bit."""
    assert rows(one / "metrics.jsonl") == rows(two / "metrics.jsonl")
    for name in ("checkpoint/model.safetensors", "answers-before.jsonl", "answers-after.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    results = [json.loads((folder / "results.json").read_text())["tasks"] for folder in (one, two)]
    assert results[0] == results[1]
    (step, numbers, tensors), (other_step, other_numbers, other_tensors) = state(one), state(two)
    assert (step, numbers) == (other_step, other_numbers)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():  # NaN is the same as NaN
        assert tensor.numpy().tobytes() == other_tensors[name].numpy().tobytes(), name
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


@pytest.mark.parametrize(
    ("options", "points"),
    [(WEIGHTED, 8), (LORA, 3)],
    ids=["coba-irdro-lovasz-accumulated", "lora-dropout-irdro-accumulated-patience"],
)
def test_killed_at_any_point(tmp_path, model_folder, data_file, monkeypatch, options, points):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    arguments = ["--model", model_folder, "--data", data_file, *SHORT, *options]
    done = subprocess.run(
        [sys.executable, KILLED, tmp_path, str(points), *arguments], capture_output=True, text=True
    )
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    found = json.loads(done.stdout)
    assert found["total"] > 40
    for index, (moment, first, second) in enumerate(found["codes"]):
        assert (first, second) == (-9, 0), f"moment {moment}: {log[-2000:]}"
        assert_same(tmp_path / "whole", tmp_path / f"killed-{index}")
    assert "resuming after step" in log and "killed-0" in log


# ----------------------------------------------------------------------- damaged checkpoints


def pickled(*args, **kwargs):
    raise AssertionError("a pickle")


@pytest.fixture
def weighted(train, tmp_path, monkeypatch):
    """A finished run, put back to before its results were there; nothing is pickled in it, nor
    unpickled in the test."""
    monkeypatch.setattr("torch.save", pickled)
    monkeypatch.setattr("torch.load", pickled)
    code, _, err = train(*SHORT, *WEIGHTED, "--keep", 3, "--output", tmp_path / "whole")
    assert code == 0, err
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", tmp_path / "whole", copy], check=True)
    (copy / "results.json").unlink()
    return copy


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("state.safetensors", truncate, "bytes, "),
        ("state.safetensors", flip, "state.safetensors differs from what was written (SHA-256)"),
        ("state.json", flip, "state.json differs"),
        ("trainer_state.json", flip, "trainer_state.json differs"),
        ("manifest.json", truncate, ""),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    weighted, command, tmp_path, name, damage, message
):
    last = weighted / "resume" / "step-00000007"
    damage(last / name)
    if name == "manifest.json" and damage is truncate:  # its last byte is a line's end
        damage(last / name)
        message = "manifest.json cannot be read"
    code, _, err = command("train", "--resume", weighted)
    assert code == 0, err
    assert f"checkpoint {last} is damaged" in err and message in err
    assert "resuming after step 6" in err
    assert_same(weighted, tmp_path / "whole")


def test_without_a_whole_checkpoint_it_starts_again(weighted, command, tmp_path):
    for path in (weighted / "resume").glob("step-*/state.json"):
        truncate(path)
    damaged = {path.name: path.stat().st_ino for path in (weighted / "resume").iterdir()}
    code, _, err = command("train", "--resume", weighted)
    assert code == 0 and err.count("is damaged") == 3
    assert "starting at the beginning" in err
    # the damaged ones made room: those that are there now were all written anew
    for path in (weighted / "resume").iterdir():
        assert damaged.get(path.name) != path.stat().st_ino
    assert_same(weighted, tmp_path / "whole")


def test_metrics_that_lost_lines(weighted, command, tmp_path):
    lines = (weighted / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (weighted / "metrics.jsonl").write_bytes(b"".join(lines[:7]))
    code, _, err = command("train", "--resume", weighted)
    assert code == 0 and "metrics.jsonl has lost lines" in err and "after step 4" in err
    assert_same(weighted, tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [("--time-limit", "0.001"), ("--lr", "0.5", "--patience", "1", "--validate-every", "1")],
    ids=["time-limit", "patience"],
)
def test_a_run_that_stopped_early_takes_no_further_step(
    train, command, tmp_path, monkeypatch, options
):
    """Interrupted before its results; it still ends with the best weights."""
    assert train(*SHORT, *options, "--output", tmp_path / "whole")[0] == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("segloss.train.run._report", interrupted)
        assert train(*SHORT, *options)[0] == 130
    code, _, err = command("train", "--resume", tmp_path / "run")
    assert code == 0, err
    step = json.loads((tmp_path / "run" / "results.json").read_text())["timing"]["steps"]
    assert step < 7 and f"resuming after step {step}" in err
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_nothing_is_unpickled(weighted):
    names = {path.name for path in weighted.rglob("*") if path.is_file()}
    kinds = {Path(name).suffix for name in names}
    assert kinds == {".json", ".jsonl", ".safetensors", ".png", ".md"}


# ------------------------------------------------------------------------------ wrong requests


def fails(result, message):
    code, _, err = result
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err
    return True


def test_what_cannot_be_resumed(weighted, command, tmp_path, data_file):
    assert fails(command("train", "--resume", tmp_path / "none"), "no such run folder")
    assert fails(command("train", "--resume", tmp_path), "there is no config.json")
    model = tmp_path / "whole" / "checkpoint"
    assert fails(command("train", "--resume", model), "is not that of a segloss train run")
    assert fails(command("train", "--resume", tmp_path / "whole"), "the run is finished")
    assert fails(
        command("train", "--resume", weighted, "--lr", 1), "only --time-limit goes with it"
    )
    with RunFolder.reopen(str(weighted)):
        assert fails(command("train", "--resume", weighted), "still going on in another process")
    data_file.write_text(data_file.read_text().replace("parity 0", "parity zero"))
    assert fails(command("train", "--resume", weighted), "the data changed since the run began")


def test_of_the_best_weights_only_those_in_use_are_kept(train, tmp_path, monkeypatch):
    """The best so far and what was it at the two kept checkpoints, at every moment."""
    seen = []
    write = RunFolder.write

    def spy(self, name, save):
        write(self, name, save)
        best = self.path / "best"
        seen.append(sorted(path.name for path in best.iterdir()) if best.exists() else [])

    monkeypatch.setattr(RunFolder, "write", spy)
    options = ("--patience", 9, "--validate-every", 1, "--lr", 0.001, "--steps", 8)
    assert train(*SHORT, *options)[0] == 0
    (at_the_end,) = [names for names in seen if names][:1]
    assert at_the_end == [f"step-{step:08d}" for step in (6, 8)]


# ---------------------------------------------------------------------------------- a full disk


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_a_checkpoint_does_not_end_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr("segloss.train.checkpoint.flush", full_disk)
    code, out, err = train(*SHORT)
    assert code == 2 and "| parity |" in out and "Traceback" not in err
    assert f"could not write to {tmp_path}/run: resume (No space left on device)" in err
    assert not list((tmp_path / "run" / "resume").iterdir())
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
    assert (tmp_path / "run" / "results.json").exists()


PATIENT = ("--patience", "1", "--validate-every", "1", "--lr", "0.5")


@pytest.mark.parametrize("file", ["checkpoint", "results.json"])
def test_full_disk_at_the_end_leaves_what_a_resumed_run_needs(
    train, command, tmp_path, monkeypatch, file
):
    """The best weights among it, which are not those of the last step."""
    assert train(*SHORT, *PATIENT, "--output", tmp_path / "whole")[0] == 0
    timing = json.loads((tmp_path / "whole" / "results.json").read_text())["timing"]
    assert timing["kept_step"] < timing["steps"]
    write = RunFolder.write
    with monkeypatch.context() as patch:
        patch.setattr(
            RunFolder, "write", lambda self, name, save: write(
                self, name, full_disk if name == file else save
            ),
        )  # fmt: skip
        code, _, err = train(*SHORT, *PATIENT)
        assert code == 2 and f"{file} (No space left on device)" in err
    code, _, err = command("train", "--resume", tmp_path / "run")
    assert code == 0, err
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_best_weights_that_could_not_be_written_do_not_count(train, tmp_path, monkeypatch):
    """The best before them stays, and the results name the step whose weights they are of."""
    from segloss.train import checkpoint

    write, written = checkpoint.write, []

    def once(folder, step, *values):
        if folder.name == "best" and written:
            full_disk()
        written.append(step)
        return write(folder, step, *values)

    monkeypatch.setattr(checkpoint, "write", once)
    options = ("--patience", 9, "--validate-every", 1, "--lr", 0.001, "--save-every", 0)
    code, _, err = train(*SHORT, *options)
    assert code == 2 and "best (No space left on device)" in err
    losses = [r for r in rows(tmp_path / "run" / "metrics.jsonl") if r["event"] == "validation"]
    assert losses[-1]["mean_validation_loss"] < losses[0]["mean_validation_loss"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["timing"]["kept_step"] == 1 == written[0]


def test_a_scaler_in_a_checkpoint_is_not_read(weighted, command, tmp_path):
    """The Trainer would unpickle it."""
    shutil.rmtree(max((weighted / "resume").iterdir()))  # so that there are steps to go on with
    for step in (weighted / "resume").iterdir():
        (step / "scaler.pt").write_bytes(b"not a pickle")
    code, _, err = command("train", "--resume", weighted)
    assert code == 0, err
    for step in (weighted / "resume").iterdir():
        (step / "scaler.pt").unlink(missing_ok=True)
    assert_same(weighted, tmp_path / "whole")


def test_state_of_another_transformers_is_named(weighted, command, monkeypatch):
    def of_another(cls, path):
        raise TypeError("unexpected keyword argument 'phase'")

    monkeypatch.setattr("transformers.TrainerState.load_from_json", classmethod(of_another))
    result = command("train", "--resume", weighted)
    assert fails(result, "trainer_state.json is of another release of transformers")


def test_the_environment_of_accelerate_changes_no_arithmetic(train, tmp_path, monkeypatch):
    # the model's own forward is what accelerate wraps
    options = (*SHORT, "--head", "logits", "--precision", "float32")
    assert train(*options, "--output", tmp_path / "plain")[0] == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(*options, "--output", tmp_path / "launched")[0] == 0
    assert_same(tmp_path / "plain", tmp_path / "launched")
