"""`segloss select` on the tiny model, and the training that it ends in."""

import json

import pytest
from train.tiny import write_jsonl


@pytest.fixture
def files(tmp_path):
    found = []
    for name, answer in (("a", " yes"), ("b", " yes"), ("c", " other")):
        rows = [{"prompt": f"{name}{i}:", "completion": answer, "weight": 1} for i in range(20)]
        found.append(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    return found


@pytest.fixture
def select(command, model_folder, files, tmp_path):
    def run(*words):
        return command(
            *("select", "--model", model_folder, "--data", *files, "--output", tmp_path / "choice"),
            *("--steps", 6, "--batch-size", 6, "--lr", 0.05, "--validation-items", 5),
            *("--items", 8, "--dim", 30, "--smallest", 1, *words),
        )

    return run


def test_select_then_train(select, command, tmp_path):
    full = ("--use-peft", "false", "--lr", 0.02, "--steps", 12, "--dim", 100)
    code, out, err = select("--target", "a", "--check", 2, *full)
    assert code == 0, err
    found = json.loads((tmp_path / "choice" / "selection.json").read_text())
    assert len(found["subsets"]) == 7 and found["loss"]["all_tasks"] < found["loss"]["before"]
    # of three tasks one has other answers: alone it is the worst, as is seen without training
    estimated = {tuple(s["tasks"]): s["estimated"] for s in found["subsets"]}
    assert max(estimated, key=estimated.get) == ("c",)
    true = {tuple(s["tasks"]): s["true"] for s in found["subsets"] if s["true"] is not None}
    best, worst = min(estimated, key=estimated.get), max(estimated, key=estimated.get)
    assert set(true) == {best, worst} and true[best] < true[worst]
    assert "checked by fine-tuning" in out and f"chosen: {' '.join(found['chosen'])}" in out

    config = tmp_path / "choice" / "chosen.json"
    assert f"segloss train --config {config}" in out
    told = json.loads(config.read_text())
    assert told["tasks"] == found["chosen"] and "validation_items" not in told
    own = {"target", "check", "items", "dim", "smallest", "output_dir"}  # of a selection alone
    assert len(told["data"]) == 3 and not own & set(told)
    code, out, err = command(
        "train", "--config", config, "--eval-items", 4, "--output", tmp_path / "run"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "segloss.json").read_text())
    assert record["given"]["use_peft"] is False and record["given"]["learning_rate"] == 0.02
    counts = {"rows": 20, "repeated": 0, "train": 16, "held_out": 4, "validation": 0}
    assert record["data"] == dict.fromkeys(found["chosen"], counts)
    code, _, err = command("report", tmp_path / "choice")
    assert code == 0 and (tmp_path / "choice" / "report" / "selection.png").exists(), err
    assert (tmp_path / "choice" / "report" / "training.png").exists()  # on all tasks


def test_gradients_are_kept_for_the_next_command(select, tmp_path, monkeypatch):
    folder = tmp_path / "gradients"
    assert select("--gradients", folder)[0] == 0
    rows = sorted(path.name for path in folder.glob("rows-*.npz"))
    assert rows
    code, _, err = select("--gradients", folder, "--output", tmp_path / "two")
    assert code == 0, err
    assert sorted(path.name for path in folder.glob("rows-*.npz")) == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "x"), "--target has 'x'; the tasks are a b c"),
        (("--smallest", "4"), "--smallest is 4; it takes 1 to 3, the tasks"),
        (("--items", "0"), "--items is 0; it takes a number from 1 up"),
        (("--validation-items", "0"), "--validation_items is 0; it takes a number from 1 up"),
    ],
)
def test_what_is_refused(select, words, message):
    code, out, err = select(*words)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_one_task_is_no_choice(command, model_folder, files, tmp_path):
    code, _, err = command(
        *("select", "--model", model_folder, "--data", files[0], "--output", tmp_path / "choice"),
        *("--validation-items", 4),
    )
    assert code == 2 and "there is 1 task; a selection takes at least 2" in err
