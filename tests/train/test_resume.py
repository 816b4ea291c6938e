"""A run that was killed, or whose checkpoint is damaged, ends like one that was left alone."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLED = Path(__file__).with_name("killed.py")
SHORT = ("--steps", "7", "--batch-size", "3", "--eval-items", "3", "--lr", "0.01")
SAVED = ("--save-every", "2", "--validation-items", "3", "--report-to", "none")
WEIGHTED = (
    *("--loss", "0.6*ce+0.4*lovasz", "--accumulation", "2"),
    *("--task-weights", "coba", "--coba-warmup", "2", "--coba-history", "3"),
    *("--sample-weights", "irdro", "--sample-burn-in", "1"),
)
LORA = (
    *("--lora-rank", "2", "--lora-dropout", "0.3", "--lora-targets", "q_proj", "v_proj"),
    *("--accumulation", "2", "--sample-weights", "irdro", "--merge"),
    *("--patience", "2", "--validate-every", "2", "--lr", "0.3"),
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(values):
    return {k: v for k, v in values.items() if "runtime" not in k and "per_second" not in k}


def assert_same(one, two):
    """Weights, metrics, answers, results, optimizer and random state, bit for bit."""
    metrics = [[timeless(row) for row in rows(f / "metrics.jsonl")] for f in (one, two)]
    assert metrics[0] == metrics[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for name in ("tasks", "before", "steps", "stopped"):
        assert results[0][name] == results[1][name]
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".safetensors", "answers-before.jsonl", "answers-after.jsonl")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        if name.endswith(("optimizer.pt", "scheduler.pt", "coba.pt", "sample_weighting.pt")):
            states = [torch.load(folder / name) for folder in (one, two)]
            assert flat(states[0]) == flat(states[1]), name


def flat(value):
    """With tensors as bytes, so that NaN is the same as NaN."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    ("options", "points"),
    [(WEIGHTED, 12), (LORA, 8)],
    ids=["coba-irdro-lovasz-accumulated", "lora-dropout-irdro-accumulated-patience"],
)
def test_killed_at_any_point(tmp_path, model_folder, data_file, monkeypatch, options, points):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    arguments = ["--model", model_folder, "--data", data_file, *SHORT, *SAVED, *options]
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


def test_ctrl_c_saves_once_and_says_where_to_go_on(train, command, tmp_path, monkeypatch):
    from segloss.train.trainer import Trainer

    assert train(*SHORT, *SAVED, "--output", tmp_path / "whole")[0] == 0

    def press(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "on_step_begin", press)
        code, out, err = train(*SHORT, *SAVED)
    run = tmp_path / "run"
    assert code == 130 and out == ""
    assert err.splitlines()[-1] == (
        f"segloss: interrupted after step 3, saved in {run}/checkpoint-3: segloss train --resume "
        f"{run} goes on from there"
    )
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    code, _, err = command("train", "--resume", run)
    assert code == 0 and "resuming after step 3" in err
    shutil.rmtree(run / "checkpoint-3")
    assert_same(tmp_path / "whole", run)


def test_ctrl_c_in_the_last_step_saves_as_well(train, command, tmp_path, monkeypatch):
    from segloss.train.trainer import Trainer

    def press(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(*SHORT, "--output", tmp_path / "whole")[0] == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "on_step_begin", press)
        code, _, err = train(*SHORT, "--save-strategy", "no")
    assert code == 130 and f"interrupted after step 7, saved in {run}/checkpoint-7: " in err
    code, _, err = command("train", "--resume", run)
    assert code == 0 and "resuming after step 7" in err
    for folder in (run, tmp_path / "whole"):
        shutil.rmtree(folder / "checkpoint-7", ignore_errors=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    assert_same(tmp_path / "whole", run)


# ----------------------------------------------------------------------- damaged checkpoints


@pytest.fixture
def weighted(train, tmp_path):
    """A finished run, put back to before its model and its results were there."""
    code, _, err = train(*SHORT, *SAVED, *WEIGHTED, "--keep", 3, "--output", tmp_path / "whole")
    assert code == 0, err
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", tmp_path / "whole", copy], check=True)
    for name in ("results.json", "trained.json", "model.safetensors"):
        (copy / name).unlink()
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
        (
            "model.safetensors",
            truncate,
            "model.safetensors differs from what was written (SHA-256)",
        ),
        ("model.safetensors", flip, "model.safetensors differs from what was written (SHA-256)"),
        ("optimizer.pt", flip, "optimizer.pt differs"),
        ("coba.pt", Path.unlink, "[Errno 2] No such file or directory: '{last}/coba.pt'"),
        (
            "manifest.json",
            Path.unlink,
            "[Errno 2] No such file or directory: '{last}/manifest.json'",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    weighted, command, tmp_path, name, damage, message
):
    last = weighted / "checkpoint-7"
    damage(last / name)
    code, _, err = command("train", "--resume", weighted)
    assert code == 0, err
    assert f"{last} is damaged: {message.format(last=last)}" in err
    assert "resuming after step 6" in err
    assert_same(weighted, tmp_path / "whole")


def test_without_a_whole_checkpoint_it_starts_again(weighted, command, tmp_path):
    for path in weighted.glob("checkpoint-*/trainer_state.json"):
        truncate(path)
    code, _, err = command("train", "--resume", weighted)
    assert code == 0 and err.count("is damaged") == 3
    assert "starting at the beginning" in err
    assert_same(weighted, tmp_path / "whole")


def test_killed_after_the_last_step_the_best_weights_are_kept(train, command, tmp_path):
    """With a patience they are those of the lowest validation loss, which is not the last."""
    options = ("--lr", "0.5", "--patience", "9", "--validate-every", "1", "--keep", "9")
    assert train(*SHORT, *SAVED, *options, "--output", tmp_path / "whole")[0] == 0
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("results.json", "trained.json", "model.safetensors"):
        (run / name).unlink()
    code, _, err = command("train", "--resume", run)
    assert code == 0 and "resuming after step 7" in err, err
    assert_same(tmp_path / "whole", run)
    last = (run / "checkpoint-7" / "model.safetensors").read_bytes()
    assert last != (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [("--time-limit", "0.001"), ("--lr", "0.5", "--patience", "1", "--validate-every", "1")],
    ids=["time-limit", "patience"],
)
def test_a_run_that_stopped_early_takes_no_further_step(
    train, command, tmp_path, monkeypatch, options
):
    """Interrupted before its results; it still ends with the same weights."""
    assert train(*SHORT, *SAVED, *options, "--output", tmp_path / "whole")[0] == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("segloss.train.run.Run.after", interrupted)
        assert train(*SHORT, *SAVED, *options)[0] == 130
    code, _, err = command("train", "--resume", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] < 7
    assert_same(tmp_path / "whole", tmp_path / "run")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "coba.pt"])
def test_a_pickle_that_runs_code_is_refused(weighted, command, tmp_path, name):
    """Even one that the manifest names as if it had been written so."""
    from segloss.train.trainer import seal

    last = weighted / "checkpoint-6"
    shutil.rmtree(weighted / "checkpoint-7")
    (last / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), 2))
    (last / "training_args.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), 2))
    seal(last)
    code, _, err = command("train", "--resume", weighted)
    assert code == 2 and "Traceback" not in err, err
    assert not (tmp_path / "mark").exists()


# ------------------------------------------------------------------------------ wrong requests


def fails(result, message):
    code, _, err = result
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err
    return True


def test_what_cannot_be_resumed(weighted, command, tmp_path, data_file):
    assert fails(command("train", "--resume", tmp_path / "none"), "none is no run's folder")
    assert fails(command("train", "--resume", tmp_path), "there is no segloss.json in it")
    assert fails(command("train", "--resume", tmp_path / "whole"), "the run is finished")
    assert fails(
        command("train", "--resume", weighted, "--lr", 1), "only --time-limit goes with it"
    )
    with (weighted / "metrics.jsonl.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fails(command("train", "--resume", weighted), "still going on in another process")
    data_file.write_text(data_file.read_text().replace("parity 0", "parity zero"))
    assert fails(command("train", "--resume", weighted), "the data changed since it began")


# ---------------------------------------------------------------------------------- a full disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["torch.save", "segloss.train.trainer.seal"])
def test_full_disk_at_a_checkpoint_does_not_end_the_run(train, tmp_path, monkeypatch, place):
    monkeypatch.setattr(place, full_disk)
    code, out, err = train(*SHORT, *SAVED)
    assert code == 2 and "| parity |" in out and "Traceback" not in err
    assert f"could not write to {tmp_path}/run: checkpoint-2 (No space left on device)" in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert (tmp_path / "run" / "results.json").exists()


def test_full_disk_at_the_model_leaves_what_a_resumed_run_needs(
    train, command, tmp_path, monkeypatch
):
    assert train(*SHORT, *SAVED, "--output", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("segloss.train.trainer.Trainer.save_model", full_disk)
        code, out, err = train(*SHORT, *SAVED)
    assert code == 2 and "| parity |" in out and "the model (No space left on device)" in err
    assert not (tmp_path / "run" / "trained.json").exists()
    code, _, err = command("train", "--resume", tmp_path / "run")
    assert code == 0, err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def noting(path):
    """A trainer of which only the file of its metrics is there."""
    from segloss.train.trainer import Trainer

    trainer = Trainer.__new__(Trainer)
    trainer.metrics, trainer.failures = path, {}
    return trainer


def test_metrics_wait_for_room(tmp_path, monkeypatch):
    """A line of which half fits, one that finds a full disk, and one after that."""
    path, history = tmp_path / "metrics.jsonl", [{"step": 0}]
    trainer = noting(path)
    trainer._note(history)
    with monkeypatch.context() as patch:
        whole = type(path).open

        def half(self, *args, **kwargs):
            with whole(self, *args, **kwargs) as file:
                file.write('{"st')
            return full_disk()

        for place in (half, full_disk):
            patch.setattr(type(path), "open", place)
            history.append({"step": len(history)})
            trainer._note(history)
            assert list(trainer.failures) == ["metrics.jsonl"]
    history.append({"step": 3})
    trainer._note(history)
    trainer._note([*history, {"step": 4}])
    assert not trainer.failures
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3, 4]


def test_what_is_not_as_it_was_is_told(weighted, command):
    file = weighted / "segloss.json"
    now = json.loads(file.read_text())
    for was in ({"processes": 2}, {"torch": "2.0.0"}, None):
        versions = now["versions"] | was if was else {}
        file.write_text(json.dumps(now | {"versions": versions}))
        code, _, err = command("train", "--resume", weighted)
        assert code == 0, err
        (weighted / "results.json").unlink()
        notes = [line for line in err.splitlines() if line.startswith("note: ")]
        assert notes == [
            f"note: {name} was {versions.get(name)}, is {value}: the last bits may differ"
            for name, value in now["versions"].items()
            if versions.get(name) != value
        ]
        assert len(notes) == (len(was) if was else len(now["versions"]))
