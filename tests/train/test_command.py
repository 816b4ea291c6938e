"""The command: what it is called with, `evaluate`, and answers to what is misspelt."""

import json
import subprocess
import sys

import pytest
from train.tiny import examples, write_jsonl

import segloss


def fails(result, message):
    code, out, err = result
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err
    assert "Traceback" not in err and err.count("error:") == 1
    return True


def test_version_and_usage(command):
    assert command("--version") == (0, f"segloss {segloss.__version__}\n", "")
    code, out, _ = command("--help")
    assert code == 0 and all(
        f"\n  {name}" in out for name in ("train", "evaluate", "select", "report", "doctor")
    )
    assert command()[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["dance"], "there is no command dance; segloss --help lists them"),
        (["train", "--lr"], "--learning_rate/--learning-rate: expected one argument"),
        (["train", "--learning-rat", "1"], "did you mean --learning_rate?"),
        (["select", "--taget", "a"], "did you mean --target?"),
        (["evaluate"], "segloss evaluate takes a run folder or a model, then options"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "a", "--outptu", "b"], "unrecognized arguments: --outptu b"),
        (["train", "--resume"], "argument --resume: expected one argument"),
    ],
)
def test_bad_words(command, words, message):
    assert fails(command(*words), message)


def test_help_lists_trl_s_options_and_ours(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("train", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("--task-weights", "--report-to", "--lora-r", "--dataset-name", "--packing"):
        assert name in text
    for name in ("--fsdp", "--deepspeed", "--optim", "--lr-scheduler-type", "--push-to-hub"):
        assert name in text


def test_missing_packages(train, monkeypatch):
    for module, package in {"trl": "trl", "yaml": "pyyaml"}.items():
        with monkeypatch.context() as patch:
            for name in [n for n in sys.modules if n.startswith("segloss.train.")]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, module, None)  # as if it were not there
            assert fails(train(), f"{module} is not installed: pip install {package}")


def test_what_a_library_lacks_is_its_own_words(train, tmp_path, monkeypatch):
    """Found late, by the library that was asked for; an import that is a fault is not hidden."""
    from segloss.train.trainer import Trainer

    for message in ("You need to install `x`", "the 'x>=1' distribution is required by this"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", mock_of(ImportError(message)))
            assert fails(train("--no-evaluate-before", "--output", tmp_path / message[:3]), message)
    monkeypatch.setattr(Trainer, "train", mock_of(ImportError("no name y", name="trl")))
    with pytest.raises(ImportError, match="no name y"):
        train("--no-evaluate-before")


def mock_of(error):
    def raises(*args, **kwargs):
        raise error

    return raises


def test_evaluate_a_run_and_a_model(command, train, tmp_path, model_folder, data_file, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train("--lr", 0.01)[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    settings = tmp_path / "run" / "segloss.json"  # what several processes were told is no matter
    settings.write_text(
        settings.read_text().replace('"given": {', '"given": {"fsdp": "full_shard",')
    )
    code, out, err = command("evaluate", tmp_path / "run", "--json", tmp_path / "again.json")
    assert code == 0, err
    found = json.loads((tmp_path / "again.json").read_text())
    # float32 weights in a file, so the same bits
    assert found["tasks"] == results["tasks"] and "| parity |     4 | model " in out
    assert fails(command("evaluate", tmp_path / "run", "--json", tmp_path / "again.json"), "exists")

    code, _, err = command(
        *("evaluate", model_folder, "--data", data_file, "--eval-items", 4),
        *("--json", tmp_path / "model.json"),
    )
    assert code == 0, err
    assert json.loads((tmp_path / "model.json").read_text())["tasks"] == results["before"]
    other = write_jsonl(tmp_path / "other.jsonl", examples("new", 9))
    code, out, _ = command("evaluate", tmp_path / "run", "--data", other, "--eval-items", 9)
    assert code == 0 and "| new " in out and "parity" not in out
    assert not list((tmp_path / "here").iterdir())  # it leaves nothing behind


def test_evaluate_an_adapter(command, train, tmp_path):
    """A run of LoRA is evaluated with its adapter on its base."""
    assert train("--lora-rank", 2, "--lr", 0.5)[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    code, _, err = command("evaluate", tmp_path / "run", "--json", tmp_path / "again.json")
    assert code == 0, err
    found = json.loads((tmp_path / "again.json").read_text())
    for one, two in zip(found["tasks"], results["tasks"], strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)
    assert results["tasks"][0]["nll"] != results["before"][0]["nll"]


def test_evaluate_what_has_not_finished(command, tmp_path):
    (tmp_path / "segloss.json").write_text('{"given": {}}')
    assert fails(command("evaluate", tmp_path), "has no model yet; segloss train --resume")
    (tmp_path / "segloss.json").write_text('{"given": {"target": ["a"]}}')
    assert fails(command("evaluate", tmp_path), "a run of segloss select, which leaves no model")


def test_the_command_starts_without_transformers():
    code = (
        "import sys, segloss.command as c; assert c.main(['doctor']) == 0;"
        "assert not {'transformers', 'matplotlib', 'accelerate', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout
