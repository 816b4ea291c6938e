"""Settings from a file: what goes over what, their types, and the messages for wrong ones."""

import json

import pytest

import segloss
from segloss.train.config import TrainConfig, read_settings
from segloss.train.errors import UserError


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["settings"]


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_command_line_over_file_over_default(train, tmp_path, kind):
    values = {"steps": 2, "lr": "2e-3", "sample-weights": "irdro", "weight_decay": 1}
    path = tmp_path / f"settings.{kind}"
    lines = "".join(f"{key}: {value}\n" for key, value in values.items())
    path.write_text(json.dumps(values) if kind == "json" else f"# mine\n{lines}")
    # the fixture gives --steps 3
    code, _, err = train("--config", path, "--sample-temperature", 2)
    assert code == 0, err
    settings = settings_of(tmp_path / "run")
    assert (settings["steps"], settings["lr"], settings["sample_weights"]) == (3, 2e-3, "irdro")
    assert (settings["weight_decay"], settings["sample_temperature"]) == (1.0, 2.0)
    assert settings["seed"] == TrainConfig.seed


def test_the_settings_of_a_run_are_a_file(command, train, tmp_path):
    assert train("--lr", 0.01, "--task-weights", "coba", "--validation-items", 2)[0] == 0
    again = tmp_path / "again"
    code, _, err = command("train", "--config", tmp_path / "run/config.json", "--output", again)
    assert code == 0, err
    assert settings_of(again) == settings_of(tmp_path / "run") | {"output": str(again)}
    first, second = [(tmp_path / n / "checkpoint/model.safetensors") for n in ("run", "again")]
    assert first.read_bytes() == second.read_bytes()


def test_the_band_of_ranks(train, tmp_path, monkeypatch):
    """The options reach the weights and the saved settings; wrong ones are named."""
    made = []

    class Recorded(segloss.SampleWeighting):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append((self.scheme, self.fraction, self.band))

    monkeypatch.setattr(segloss, "SampleWeighting", Recorded)
    options = ("--sample-weights", "rank", "--sample-fraction", 0.5, "--sample-band", 0.25)
    code, _, err = train(*options)
    assert code == 0, err
    assert set(made) == {("rank", 0.5, 0.25)}
    settings = settings_of(tmp_path / "run")
    assert (settings["sample_fraction"], settings["sample_band"]) == (0.5, 0.25)


def test_every_kind_of_value(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "tasks: [boolq, siqa]\ndata: one.jsonl\ntime_limit: null\ntensorboard: true\n"
        "steps: 1e2\nlr: 1e-3\nloss: focal(gamma=1.5)\nprecision: float32\n"
    )
    assert read_settings(str(path), TrainConfig) == {
        "tasks": ("boolq", "siqa"),
        "data": ("one.jsonl",),
        "time_limit": None,
        "tensorboard": True,
        "steps": 100,
        "lr": 1e-3,
        "loss": "focal(gamma=1.5)",
        "precision": "float32",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "there is no setting 'stepps'; did you mean steps?"),
        ("colour: 3", "there is no setting 'colour'; segloss train --help lists them"),
        ("steps: many", "steps is 'many'; it takes a whole number"),
        ("steps: 1.5", "steps is 1.5; it takes a whole number"),
        ("steps: true", "steps is True; it takes a whole number"),
        ("steps: .inf", "steps is inf; it takes a whole number"),
        ("steps: null", "steps is None; it takes a whole number"),
        ("lr: fast", "lr is 'fast'; it takes a number"),
        ("loss: 3", "loss is 3; it takes text"),
        ("tensorboard: perhaps", "tensorboard is 'perhaps'; it takes true or false"),
        ("tasks: 3", "tasks is 3; it takes a list of names"),
        ("head: cold", "head is 'cold'; it takes fused or logits"),
        ("- a\n- b", "settings are needed, one `name: value` a line"),
        ("steps: [1", "is not YAML"),
        ("a: b: c", "line 1 is not YAML: mapping values are not allowed here"),
        ("!!python/object/apply:os.system [exit]", "is not YAML"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_settings(str(path), TrainConfig)
    assert str(path) in str(error.value) and message in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read absent\.yaml: No such file"):
        read_settings("absent.yaml", TrainConfig)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is not JSON"):
        read_settings(str(tmp_path / "x.json"), TrainConfig)
    (tmp_path / "y.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="it is not UTF-8"):
        read_settings(str(tmp_path / "y.yaml"), TrainConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_fraction": 0.0}, "--sample-fraction is 0.0; it takes a number above 0, up to 1"),
        ({"sample_fraction": 1.5}, "--sample-fraction is 1.5; it takes a number above 0, up to 1"),
        ({"sample_band": -1.0}, "--sample-band is -1.0; it takes a number from 0 up"),
        ({"sample_band": float("nan")}, "--sample-band is nan; it takes a number from 0 up"),
    ],
)
def test_wrong_bands_are_named(settings, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings)
    assert str(error.value) == message


def test_defaults_of_weights_follow_the_steps():
    config = TrainConfig(steps=200, task_weights="coba", lora_rank=8).resolved()
    assert (config.coba_warmup, config.coba_history, config.validation_items) == (20, 80, 32)
    assert (config.lora_alpha, config.validate_every) == (16.0, 20)
    assert TrainConfig().resolved().validation_items == 0
    assert TrainConfig(patience=2).resolved().validation_items == 32
    with pytest.raises(UserError, match="--validation-items is 0; --task-weights coba needs some"):
        TrainConfig(task_weights="coba", validation_items=0)
