"""TRL's options and ours, from the command line and from files."""

import json

import pytest

from segloss.train.config import ALIASES, settings
from segloss.train.errors import UserError

# as `trl sft` documents it
SFT_YAML = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: '<|im_end|>'
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
output_dir: Qwen2-0.5B-SFT
push_to_hub: true
bf16: false
env:
  SEGLOSS_TEST: "7"
"""


def test_yaml_of_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGLOSS_TEST", "1")
    path = tmp_path / "sft.yaml"
    path.write_text(SFT_YAML)
    found = settings(["--config", str(path), "--lora-r", "4", "--loss=ce"])
    training, model = found.training, found.model
    assert (model.model_name_or_path, found.script.dataset_name) == (
        *("Qwen/Qwen2-0.5B", "trl-lib/Capybara"),
    )
    assert (training.learning_rate, training.num_train_epochs, training.packing) == (2e-4, 1, True)
    assert (training.eval_steps, training.push_to_hub, training.bf16) == (100, True, False)
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 4, 16)
    assert model.lora_target_modules == ["q_proj", "v_proj"] and found.options.loss == "ce"
    import os

    assert os.environ["SEGLOSS_TEST"] == "7"
    json.dumps(found.given)  # which a run keeps


def test_what_trl_s_own_parser_makes_of_it_is_the_same(tmp_path):
    """Field by field, but for what is set for a machine without a GPU."""
    import dataclasses

    import trl

    path = tmp_path / "sft.yaml"
    path.write_text(SFT_YAML + "use_cpu: true\nlogging_nan_inf_filter: false\n")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = parser.parse_args_and_config(["--config", str(path)])
    ours = settings(["--config", str(path)])
    for one, two in zip((ours.script, ours.training, ours.model), theirs, strict=True):
        for field in dataclasses.fields(two):
            mine, its = getattr(one, field.name, None), getattr(two, field.name, None)
            assert not field.init or mine == its or repr(mine) == repr(its), field.name


def test_what_no_word_can_say_comes_from_a_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "datasets: [{path: a/b, split: test}]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "report_to: [wandb, tensorboard]\nsave_total_limit: null\n"
    )
    found = settings(["--config", str(path)])
    (mixed,) = found.mixture.datasets
    assert (mixed.path, mixed.split) == ("a/b", "test")
    assert found.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.training.report_to == ["wandb", "tensorboard"]
    assert found.given["datasets"] == [{"path": "a/b", "split": "test"}]  # which a run keeps
    again = settings([], found.given)
    assert again.given == found.given


def test_json_and_a_run_s_own_settings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"lr": 1e-3, "save-every": 5, "data": ["a", "b"]}))
    found = settings(["--config", str(path)])
    assert found.training.learning_rate == 1e-3 and found.training.save_steps == 5
    assert found.options.data == ["a", "b"]
    path.write_text(json.dumps({"given": found.given | {"output_dir": "runs/one"}}))
    again = settings([f"--config={path}", "--output", "two"])
    assert again.given == found.given | {"output_dir": "two"}


@pytest.mark.parametrize("short", ALIASES)
def test_short_names(short):
    value = {"model": "m", "output": "o", "lora_targets": "q_proj"}.get(short, "3")
    found = settings([f"--{short.replace('_', '-')}", value])
    assert found.given[ALIASES[short]] in (value, 3, [value])
    assert found.model.use_peft == short.startswith("lora")


def test_a_flag_alone_is_yes():
    found = settings(["--bf16", "--gradient-checkpointing", "--no-evaluate-before", "--merge"])
    assert found.training.bf16 and found.training.gradient_checkpointing and found.options.merge
    assert not found.options.evaluate_before


def test_patience_is_early_stopping():
    training = settings(["--patience", "2", "--validate-every", "5"]).training
    assert training.load_best_model_at_end and training.metric_for_best_model == "eval_loss"
    assert training.eval_steps == training.save_steps == 5


def test_bfloat16_only_where_a_cpu_has_it(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for flags, bf16 in (({"avx2"}, False), ({"avx512_bf16"}, True)):
        monkeypatch.setattr("segloss.doctor.cpu_flags", lambda flags=flags: flags)
        assert settings([]).training.bf16 == bf16
    assert settings([]).training.use_cpu
    monkeypatch.setattr("segloss.doctor.cpu_flags", lambda: {"avx2"})
    assert settings(["--bf16", "true"]).training.bf16


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "max_steps: 2.5", "invalid int value: '2.5'"),
        ("a.yaml", "lerning_rate: 3", "there is no option --lerning_rate; did you mean --learning"),
        ("a.yaml", "task_weights: cobra", "task-weights: invalid choice: 'cobra' (choose from"),
        ("a.yaml", "truncation_mode: x", "truncation-mode: invalid choice: 'x'"),
        (
            "a.yaml",
            "steps: [",
            "expected the node content, but found '<stream end>' in \"<unicode st",
        ),
        ("a.yaml", "- 1", "settings are needed, one `name: value` a line"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.yaml", "data: [[a]]", "--data is [['a']]; it takes text and numbers, and lists of"),
        ("a.yaml", "loss: {ce: 1}", "--loss is {'ce': 1}; it takes text and numbers"),
        ("a.yaml", "sample_band: -1", "--sample_band is -1.0; it takes a number from 0 up"),
        ("a.yaml", "min_class_items: null", "--min_class_items is None; it takes a number from 1"),
    ],
)
def test_wrong_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        settings(["--config", str(tmp_path / name)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--lerning-rate", "1"],
            "there is no option --lerning_rate; did you mean --learning_rate",
        ),
        (["--xyzzy"], "there is no option --xyzzy; segloss train --help lists them"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--config", "absent.yaml"], "cannot read absent.yaml: No such file"),
        (["--config"], "--config: expected one argument"),
        (["extra"], "'extra' is no option"),
        (["--validation-batch", "0"], "--validation_batch is 0; it takes a number from 1 up"),
        (["--coba-history", "1"], "--coba_history is 1; it takes a number from 2 up"),
        (["--coba-tau", "nan"], "--coba_tau is nan; it takes a number from 1e-06 up"),
        (["--fp16", "--bf16"], "At most one of fp16 and bf16"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(UserError) as error:
        settings(words)
    assert message in str(error.value)
