"""`segloss select`: ends in a choice and a command that runs; `--check` compares with the truth."""

import json
import shlex

import numpy as np
import pytest
from train.tiny import examples, write_jsonl

from segloss.selection import Selection
from segloss.train import select as selecting
from segloss.train.run import prepare
from segloss.train.select import SelectConfig

# peft calls what transformers is to remove
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def data(tmp_path):
    """The target, a task with its answers, and two with others."""
    rows = [
        {"task": task, "prompt": f"{name} {i}:", "completion": answer}
        for task, name, answer in (
            ("target", "sky", " blue"), ("twin", "sky", " blue"), ("odd", "sky", " redd"),
        )
        for i in range(14)
    ]  # fmt: skip
    return write_jsonl(tmp_path / "tasks.jsonl", rows)


@pytest.fixture
def select(command, model_folder, data, tmp_path):
    def run(*arguments):
        return command(
            *("select", "--model", model_folder, "--data", data, "--output", tmp_path / "run"),
            *("--steps", 6, "--batch-size", 4, "--eval-items", 2, "--validation-items", 4),
            *("--items", 4, "--lora-rank", 2, "--lr", 0.05, "--precision", "float32"),
            *("--smallest", 1, *arguments),
        )

    return run


@pytest.fixture
def selected(select, tmp_path):
    code, out, err = select("--target", "target", "--check", 3)
    assert code == 0, err
    return out, json.loads((tmp_path / "run" / "selection.json").read_text())


def test_ends_in_a_choice_and_a_command_that_runs(selected, command, tmp_path):
    out, result = selected
    assert result["objective"] == "cross-entropy per token of target"
    subsets = [tuple(subset["tasks"]) for subset in result["subsets"]]
    assert len(set(subsets)) == 7  # every subset of three tasks
    values = [subset["estimated"] for subset in result["subsets"]]
    assert values == sorted(values) and result["chosen"] == list(subsets[0])
    assert "odd" not in result["chosen"]
    # the model was trained on all of them: nothing to be estimated
    (every,) = [s["estimated"] for s in result["subsets"] if len(s["tasks"]) == 3]
    assert every == pytest.approx(result["loss"]["all_tasks"], rel=1e-5)
    checked = [s for s in result["subsets"] if s["true"] is not None]
    assert len(checked) == 3 and checked[0] == result["subsets"][0]
    errors = [abs(s["estimated"] - s["true"]) / s["true"] for s in checked]
    assert result["relative_error"] == pytest.approx(np.mean(errors))
    assert f"mean |error| {result['relative_error']:.1%}" in out
    assert (tmp_path / "run" / "selection.png").read_bytes().startswith(b"\x89PNG")

    (line,) = [line.strip() for line in out.splitlines() if line.startswith("    segloss train")]
    words = shlex.split(line)[1:]
    assert words[words.index("--lora-rank") + 1] == "2"
    code, _, err = command(*words, "--output", tmp_path / "next", "--steps", 2)
    assert code == 0, err
    trained = json.loads((tmp_path / "next" / "config.json").read_text())
    assert set(trained["data"]) == set(result["chosen"])


def test_measured_scores(select, monkeypatch, tmp_path):
    """With `--score measured` what is written is what the moved model gives for the target."""
    from segloss.selection import GradEx

    measured = {}
    measure = GradEx.measure

    def keep(self, subset, samples):
        assert [s.task for s in samples] == ["target"] * 4
        return measured.setdefault(tuple(subset), measure(self, subset, samples))

    monkeypatch.setattr(GradEx, "measure", keep)
    code, _, err = select("--target", "target", "--score", "measured", "--check", 1)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "selection.json").read_text())
    found = {tuple(s["tasks"]): s["estimated"] for s in result["subsets"]}
    assert found == measured and len(found) == 7
    best = result["subsets"][0]
    assert result["relative_error"] == abs(best["estimated"] - best["true"]) / best["true"]


def test_a_killed_collection_goes_on(select, monkeypatch, tmp_path):
    """The same command over the same gradients takes none of them again, and ends the same."""
    store = tmp_path / "gradients"
    assert select("--gradients", store)[0] == 0
    first = json.loads((tmp_path / "run" / "selection.json").read_text())

    from segloss.selection.gradients import Collector

    monkeypatch.setattr(Collector, "add", None)
    assert select("--gradients", store, "--output", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "selection.json").read_text())
    assert again["subsets"] == first["subsets"]

    code, _, err = select("--gradients", store, "--dim", 7, "--output", tmp_path / "other")
    assert code == 2 and "holds gradients with dim=400, not 7" in err


def test_built_in_tasks_are_named_in_the_command():
    config = SelectConfig(output="runs/x", loss="focal(gamma=1.5)", lr=1e-3).resolved()
    selection = Selection("", "forward", ("boolq", "nq"), 1.0, [(("boolq", "nq"), 1.0)], {})
    maker = selecting.Selecting(config, None, None, None, {}, ())
    assert maker._command(selection) == (
        "segloss train --tasks boolq nq --loss 'focal(gamma=1.5)' --lr 0.001 --lora-rank 8 "
        "--lora-alpha 16.0"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nothing"], "--target has 'nothing'; the tasks are target twin odd"),
        (["--items", 0], "--items is 0; it takes a whole number from 1 up"),
        (["--validation-items", 0], "--validation-items is 0"),
        (["--smallest", 4], "--smallest is 4; it takes 1 to 3"),
        (["--check", -1], "--check is -1"),
        (["--method", "guess"], "invalid choice: 'guess'"),
    ],
)
def test_wrong_input(select, arguments, message):
    code, out, err = select(*arguments)
    assert code == 2 and out == "" and message in err


def test_one_task_leaves_no_choice(select, tmp_path):
    only = write_jsonl(tmp_path / "one.jsonl", examples("one", 20))
    code, _, err = select("--data", only)
    assert code == 2 and "there is 1 task; a selection takes at least 2" in err


def test_samples_for_gradients_are_not_held_out(model_folder, data, tmp_path):
    config = SelectConfig(
        model=str(model_folder), data=(str(data),), eval_items=2, validation_items=4, items=4,
        output=str(tmp_path / "run"),
    ).resolved()  # fmt: skip
    run = prepare(config)
    tasks = {task.task: task for task in run.tasks}
    maker = selecting.Selecting(config, run, None, None, tasks, ("target",))
    prompts = {sample.inputs[0].example.prompt for sample in maker._samples("target")}
    kept = {i.example.prompt for i in tasks["target"].validation + tasks["target"].held_out}
    assert len(prompts) == 4 and not prompts & kept
