"""Every bad input gives exit code 2 and one message; help says every default."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys

import pytest
from train.tiny import build_model, examples, write_jsonl

from segloss.train import config, run
from segloss.train.command import main
from segloss.train.config import TrainConfig


def fails(result, message):
    code, out, err = result
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err
    assert "Traceback" not in err and err.count("error:") == 1
    return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--steps", "0"], "--steps is 0; it takes a whole number from 1 up"),
        (["train", "--batch-size", "-1"], "--batch-size is -1"),
        (["train", "--max-prompt-tokens", "-2"], "--max-prompt-tokens is -2"),
        (["train", "--lr", "nan"], "--lr is nan; it takes a positive number"),
        (["train", "--seed", "-1"], "--seed is -1"),
        (["train", "--coba-warmup", "0"], "--coba-warmup is 0; it takes a whole number from 1"),
        (["train", "--coba-history", "0"], "--coba-history is 0; it takes a whole number from 2"),
        (["train", "--validate-every", "0"], "--validate-every is 0"),
        (["train", "--time-limit", "-1"], "--time-limit is -1"),
        (["train", "--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),
        (["train", "--loss", "hinge"], "unknown loss 'hinge'; the losses are ce"),
        (["train", "--loss", "focal(beta=1)"], "focal has no option 'beta'; it takes gamma"),
        (["train", "--tasks", "gsm8k"], "unknown task 'gsm8k'"),
        (["train", "--data", "absent.jsonl"], "cannot read absent.jsonl: No such file"),
        (["train", "--data", "x.jsonl", "--tasks", "boolq"], "does not go with --data"),
    ],
)
def test_bad_arguments(command, arguments, message):
    assert fails(command(*arguments), message)


def test_malformed_data_names_file_and_line(train, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"task": "t", "prompt": "p", "completion": "c"}\n{"task": "t"\n')
    assert fails(train("--data", path), f"{path}, line 2: not JSON")


def test_existing_run_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    assert fails(train(), "exists already; remove it or give another --output")
    assert not list((tmp_path / "run").iterdir())


def test_run_folder_that_cannot_be_made(train, tmp_path):
    (tmp_path / "file").touch()
    assert fails(train("--output", tmp_path / "file" / "run"), "cannot create the run folder")


def test_too_few_examples_leave_no_run_folder(train, tmp_path):
    assert fails(train("--eval-items", 12), "has 12 usable examples; --eval-items 12 leaves none")
    assert not (tmp_path / "run").exists()


def test_prompts_all_too_long(train):
    assert fails(
        train("--max-prompt-tokens", 1),
        "task 'parity' has no example within --max-prompt-tokens 1 and --max-completion-tokens 128",
    )


def test_more_tokens_than_the_model_has_positions(train, tmp_path):
    rows = [*examples("t", 8), {"task": "t", "prompt": "p" * 140, "completion": "c"}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    assert fails(train("--data", path), "reads at most 128 tokens")


def test_missing_packages(train, monkeypatch):
    find_spec = run.importlib.util.find_spec
    monkeypatch.setattr(
        run.importlib.util, "find_spec", lambda n: None if n == "accelerate" else find_spec(n)
    )
    assert fails(train(), "segloss train needs accelerate, which is not installed: pip install")


def test_not_enough_room_for_the_checkpoint(train, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr("segloss.train.run_folder.shutil.disk_usage", lambda path: usage)
    assert fails(train(), "MB of free disk space; the run's checkpoints need")


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"],
)
def test_out_of_memory(train, monkeypatch, message):
    def fit(*args):
        raise RuntimeError(message)

    monkeypatch.setattr("segloss.train.fit.Fit.train", fit)
    assert fails(train(), "lower --batch-size and raise --accumulation")


# ------------------------------------------------------------------------------------- models


@pytest.fixture
def own_model(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_no_such_model(train):
    assert fails(train("--model", "org/name"), "--model org/name: no such folder")


def test_model_without_weights(train, own_model):
    (own_model / "model.safetensors").unlink()
    assert fails(train("--model", own_model), "holds no weights")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_pickled_weights_are_refused_unread(train, own_model, tmp_path):
    (own_model / "model.safetensors").unlink()
    (own_model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert fails(train("--model", own_model), "pytorch_model.bin, a pickle, which can run code")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_not_read(train, own_model, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (own_model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    code, _, _ = train("--model", own_model)
    assert code == 0 and not (tmp_path / "mark").exists()


def test_code_in_a_model_folder_is_not_run(train, own_model, tmp_path):
    settings = json.loads((own_model / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    settings["model_type"] = "mine"
    (own_model / "config.json").write_text(json.dumps(settings))
    (own_model / "mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    assert fails(train("--model", own_model), f"cannot read the model in {own_model}")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_model_files(train, own_model, name):
    path = own_model / name
    path.write_bytes(path.read_bytes()[:100])
    assert fails(train("--model", own_model), f"cannot read the model in {own_model}")


def test_garbled_gguf(train, own_model):
    (own_model / "model.safetensors").unlink()
    (own_model / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    assert fails(train("--model", own_model), f"cannot read the model in {own_model}")


def test_two_gguf_files(train, own_model):
    (own_model / "model.safetensors").unlink()
    (own_model / "a.gguf").touch()
    (own_model / "b.gguf").touch()
    assert fails(train("--model", own_model), "holds 2 GGUF files; one is needed")


def test_missing_weights_are_not_made_up(train, own_model):
    from safetensors.torch import load_file, save_file

    weights = load_file(own_model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, own_model / "model.safetensors", metadata={"format": "pt"})
    assert fails(train("--model", own_model), "lacks 1 of the model's weights, model.norm.weight")


def test_adapter_folder(train, own_model):
    (own_model / "adapter_config.json").write_text("{}")
    assert fails(train("--model", own_model), "holds an adapter; merge it")


def test_tokenizer_larger_than_the_model(train, own_model):
    build_model(vocab_size=200).save_pretrained(own_model)
    assert fails(train("--model", own_model), "has 258 tokens, the model only 200")


# ------------------------------------------------------------------------------------ settings


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    docs = config.field_docs(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        assert docs[field.name] in text
        assert "--" + field.name.replace("_", "-") in text
    assert text.count("(default: ") == len(dataclasses.fields(TrainConfig))


def test_defaults_that_depend_on_others():
    built_in, own = TrainConfig().resolved(), TrainConfig(data=("x",), output="y").resolved()
    assert (built_in.max_prompt_tokens, built_in.time_limit) == (96, 540.0)
    assert (own.max_prompt_tokens, own.time_limit) == (512, None)
    assert own.tasks == () and own.output == "y" and built_in.output.startswith("runs/")
    assert TrainConfig(max_prompt_tokens=7, time_limit=0).resolved().time_limit == 0


def test_the_command_starts_without_transformers():
    code = (
        "import sys, segloss.train.command as c; assert c.main(['doctor']) == 0;"
        "assert not {'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout
