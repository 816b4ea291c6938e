"""Whole runs on the tiny model: what they leave, and what they refuse."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.tiny import build_model, examples, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fails(result, message):
    code, out, err = result
    assert code == 2 and out == "", err
    last = err.strip().splitlines()[-1]
    assert last.startswith("segloss: error: ") and message in last, err
    assert "Traceback" not in err and err.count("error:") == 1
    return True


def test_what_a_run_leaves(train, tmp_path, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = train("--loss", "0.6*ce+0.4*lovasz", "--lr", 0.01, "--seed", 3)
    assert code == 0, err
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"segloss.json", "metrics.jsonl", "results.json", "results.md", "before.json"} <= names
    assert {"answers-before.jsonl", "answers-after.jsonl", "model.safetensors"} <= names

    settings = json.loads((folder / "segloss.json").read_text())
    assert settings["given"]["loss"] == "0.6*ce+0.4*lovasz" and settings["given"]["max_steps"] == 3
    counts = {"rows": 12, "repeated": 0, "train": 8, "held_out": 4, "validation": 0}
    assert settings["data"]["parity"] == counts and settings["tasks"] == ["parity", "echo"]
    assert {"segloss", "torch", "transformers", "trl"} <= set(settings["versions"])

    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy"} <= set(metrics[0])

    trained = AutoModelForCausalLM.from_pretrained(folder)
    untrained = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.equal(trained.lm_head.weight, untrained.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=2)

    results = json.loads((folder / "results.json").read_text())
    before, after = results["before"][0], results["tasks"][0]
    assert before["task"] == after["task"] == "parity" and after["items"] == 4
    assert after["nll"][0] < before["nll"][0] and after["chance"] == 0.5
    assert results["steps"] == 3 and not results["stopped"]
    table = (folder / "results.md").read_text()
    assert table.strip() in out and "| parity |" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    progress = [line for line in err.splitlines() if line.startswith("step ")]
    assert len(progress) == 3 and progress[0].startswith("step 1 of 3: loss ")


def test_the_loss_that_is_trained_is_the_one_asked_for(train, tmp_path):
    """A step on all rows: the logged loss is that of the reference on the model's own logits."""
    from segloss import reference
    from segloss.integrations.window import next_tokens
    from segloss.train.config import settings
    from segloss.train.run import Run

    options = ("--loss", "0.5*ce+0.5*dice", "--eval-items", 0, "--batch-size", 21, "--steps", 1)
    assert train(*options)[0] == 0
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    given = json.loads((tmp_path / "run" / "segloss.json").read_text())["given"]
    run = Run(settings([], given | {"output_dir": str(tmp_path / "x")}))
    batch = run.trainer.data_collator(list(run.trainer.train_dataset))
    target = next_tokens(batch.pop("labels"))
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = run.trainer.model(**ids).logits.double()
    expected = 0.5 * reference.cross_entropy(logits, target) + 0.5 * reference.dice_loss(
        logits, target
    )
    tolerance = 2e-2 if run.trainer.args.bf16 else 1e-5
    assert row["loss"] == pytest.approx(expected.item(), rel=tolerance)


def test_a_row_of_weight_two_is_a_row_twice(train, tmp_path, tokenizer):
    """And one of weight 0 is not there: the same weights after a step of gradient descent."""
    texts = [("aa", " yes"), ("bb", " no "), ("cc", " oui")]
    listed = [0, 0, 1]
    weights = [2, 1, 0]
    one = [{"prompt": f"{p}", "completion": c} for p, c in (texts[i] for i in listed)]
    # dropped as repeated, were it not for another weight of the same sum
    one = [row | {"weight": w} for row, w in zip(one, (1.5, 0.5, 1), strict=True)]
    two = [
        {"prompt": p, "completion": c, "weight": w}
        for (p, c), w in zip(texts, weights, strict=True)
    ]
    models = []
    for name, data in (("one", one), ("two", two)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", data)
        code, _, err = train(
            *("--data", path, "--eval-items", 0, "--steps", 1, "--batch-size", 3),
            *("--optim", "sgd", "--lr", 1.0, "--output", tmp_path / f"run-{name}", "--bf16"),
            *("false", "--max-grad-norm", 0),
        )
        assert code == 0, err
        models.append(load_file(tmp_path / f"run-{name}" / "model.safetensors"))
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-4, atol=1e-6)


# peft asks transformers by a name that is going out of use
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_lora(train, tmp_path, model_folder):
    """The adapter loads on its base, and the merged model is the two together."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    code, _, err = train(
        *("--lora-rank", 2, "--lora-targets", "q_proj", "lm_head", "--lora-dropout", 0),
        *("--lr", 0.1, "--merge", "true"),
    )
    assert code == 0, err
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_config.json" in names and "model.safetensors" not in names
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(ids).logits, expected, atol=1e-3)


def test_a_chat_model_answers_with_its_template(tmp_path, model_folder, tokenizer, command):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(model_folder, tmp_path / "model")
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    chatty.save_pretrained(folder)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yy"}]
    data = [{"prompt": talk[:1], "completion": talk[1:], "id": i, "weight": i} for i in (1, 2)]
    path = write_jsonl(tmp_path / "chat.jsonl", data)
    code, _, err = command(
        *("train", "--model", folder, "--data", path, "--output", tmp_path / "run"),
        *("--steps", 60, "--lr", 0.02, "--eval-items", 0, "--batch-size", 2),
    )
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    found = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = found.apply_chat_template(
        talk[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0]
    assert found.decode(answer[prompt["input_ids"].shape[1] :]) == "yy<eos>"


def test_time_limit_stops_training_and_says_so(train, tmp_path):
    code, out, _ = train("--time-limit", 0.001, "--steps", 50)
    assert code == 0 and "Training ended early, because of the time limit" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 1 and results["stopped"] == "time limit"
    _, out, _ = train("--time-limit", 0.001, "--steps", 1, "--output", tmp_path / "all")
    assert "1 steps of" in out and "ended early" not in out


def test_patience_keeps_the_best_weights(train, tmp_path, command):
    """Those of the checkpoint with the lowest validation loss, which is not the last one."""
    code, out, err = train(
        *("--patience", 2, "--validate-every", 1, "--validation-items", 3, "--eval-items", 3),
        *("--lr", 0.5, "--steps", 9),
    )
    assert code == 0 and "because the validation loss did not fall" in out, err
    folder = tmp_path / "run"
    losses = {
        row["step"]: row["eval_loss"]
        for row in rows(folder / "metrics.jsonl")
        if "eval_loss" in row
    }
    best = min(losses, key=losses.get)
    assert len(losses) == best + 2 < 9
    kept = (folder / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    assert kept == (folder / "model.safetensors").read_bytes()


def test_weights_of_tasks_and_samples_are_noted(train, tmp_path):
    code, _, err = train(
        *("--task-weights", "coba", "--coba-warmup", 1, "--coba-history", 2, "--steps", 4),
        *("--sample-weights", "irdro", "--validation-items", 3, "--eval-items", 3, "--lr", 0.1),
    )
    assert code == 0, err
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    for row in metrics:
        assert sum(row["task_weight"].values()) == pytest.approx(1)
        assert set(row["validation_loss"]) == {"parity", "echo"}
        assert 1 <= row["effective_sample_size"] <= 4
    assert metrics[-1]["task_weight"] != metrics[0]["task_weight"]


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path):
    code, _, err = train("--lr", 1e30, "--steps", 20)
    assert code == 2 and "the training's " in err and "nan at step" in err
    assert "a lower --learning_rate may help" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--task-weights", "coba"),
            "packing keeps only the tokens, and would lose --task",
        ),
        (
            ("--data", "weighed"),
            "sample_weights is a column of train_dataset, but not among the trai",
        ),
    ],
)
def test_packing_refuses_what_it_would_lose(train, tmp_path, options, message):
    path = write_jsonl(tmp_path / "weighed", [r | {"weight": 2} for r in examples("t", 50)])
    path.rename(tmp_path / "weighed.jsonl")
    words = [str(tmp_path / "weighed.jsonl") if o == "weighed" else o for o in options]
    result = train("--packing", "--validation-items", 3, "--eval-items", 3, *words)
    assert fails(result, message)


def test_what_is_refused(train, tmp_path, command, model_folder, data_file):
    assert fails(command("train", "--data", data_file), "there is no model: give --model")
    assert fails(command("train", "--model", model_folder), "nothing to train on: give --data")
    assert fails(train("--dataset-name", "x"), "it takes one of them")
    assert fails(train("--loss", "hinge"), "hinge")
    for option in ("--use-liger-kernel", "--activation-offloading"):
        assert fails(train(option, "--use-cpu"), "take a GPU; use_cpu is on")
    assert fails(train("--eval-items", 12), "has 12 different rows; 12 held-out and 0 validation")
    assert not (tmp_path / "run").exists()
    assert fails(train("--output", data_file / "run"), f"Not a directory: '{data_file}/run'")
    long = write_jsonl(tmp_path / "a.jsonl", [*examples("t", 8), *examples("p" * 140, 1)])
    assert fails(train("--data", long, "--eval-items", 0), "reads at most 128 tokens")
    assert train()[0] == 0
    assert fails(train(), "holds a run already: segloss train --resume")


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"],
)
def test_out_of_memory(train, monkeypatch, message):
    def fit(*args):
        raise RuntimeError(message)

    monkeypatch.setattr("segloss.train.run.Run.fit", fit)
    code, _, err = train()
    assert code == 2 and "lower --batch-size and raise --accumulation" in err


# --------------------------------------------------------------------------------- as others do


def test_trl_s_yaml_trains(tmp_path, command, model_folder):
    """`trl sft --config` with a folder of a data set, without one of our own options."""
    from datasets import Dataset, DatasetDict

    texts = [{"text": f"{i} is a number"} for i in range(16)]
    parts = {"train": Dataset.from_list(texts), "test": Dataset.from_list(texts[:4])}
    DatasetDict(parts).save_to_disk(tmp_path / "numbers")
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model_name_or_path: {model_folder}\ndataset_name: {tmp_path / 'numbers'}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nper_device_train_batch_size: 2\n"
        "eval_strategy: steps\neval_steps: 1\nreport_to: none\nlearning_rate: 1e-3\n"
        "packing: true\nmax_length: 32\nlogging_steps: 1\n"
    )
    code, out, err = command("train", "--config", config)
    assert code == 0, err
    metrics = rows(tmp_path / "out" / "metrics.jsonl")
    assert {"eval_loss", "loss"} <= {name for row in metrics for name in row}
    assert "| numbers |     4 | before training" in out


def test_two_processes_are_one(tmp_path, model_folder, data_file):
    """torchrun with gloo: the numbers and the weights of one process on the same batches."""
    common = [
        *("train", "--model", model_folder, "--data", data_file, "--steps", "3", "--eval-items"),
        *("4", "--lr", "0.01", "--logging-steps", "1", "--bf16", "false", "--report-to", "none"),
        *("--loss", "0.6*ce+0.4*focal", "--save-every", "2"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, launcher, size in (
        ("one", [], "4"),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "2"),
    ):
        done = subprocess.run(
            [
                *(sys.executable, *launcher, "-m", "segloss.command", *map(str, common)),
                *("--batch-size", size, "--output", str(tmp_path / name)),
            ],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("| parity |") == 1
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["mean_token_accuracy"] == pytest.approx(b["mean_token_accuracy"])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][key], rtol=1e-3, atol=1e-5)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    for a, b in zip(results[0]["before"], results[1]["before"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"]) and a["exact_match"] == b["exact_match"]
    assert (tmp_path / "two" / "checkpoint-2" / "rng_state_1.pth").exists()


def test_two_processes_go_on_to_the_same_bits(tmp_path, model_folder, data_file):
    """As one does; the state of CoBa and of the sample weights among it. By accelerate.

    With `--cpu` it would start one process whatever `--num_processes` says.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
    launch += ["2", "-m", "segloss.command", "train"]
    options = [
        *("--model", model_folder, "--data", data_file, "--steps", "4", "--eval-items", "2"),
        *("--batch-size", "2", "--save-every", "2", "--task-weights", "coba", "--lr", "0.01"),
        *("--sample-weights", "irdro", "--loss", "0.6*ce+0.4*lovasz", "--logging-steps", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*words):
        done = subprocess.run(
            [*launch, *map(str, words)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run(*options, "--output", tmp_path / "whole")
    assert (
        json.loads((tmp_path / "whole" / "segloss.json").read_text())["versions"]["processes"] == 2
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    for name in ("trained.json", "results.json", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    assert run("--resume", tmp_path / "cut").count("resuming after step 2") == 1
    for name in ("model.safetensors", "checkpoint-4/optimizer.pt", "checkpoint-4/coba.pt"):
        one, two = ((tmp_path / part / name).read_bytes() for part in ("whole", "cut"))
        assert one == two, name
    assert rows(tmp_path / "whole" / "metrics.jsonl") == rows(tmp_path / "cut" / "metrics.jsonl")


# ------------------------------------------------------------------------------------- models


@pytest.fixture
def own_model(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_no_such_model(train):
    assert fails(train("--model", "org/name"), "cannot read the model org/name")


def test_code_in_a_model_folder_is_not_run(train, own_model, tmp_path):
    settings = json.loads((own_model / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    settings["model_type"] = "mine"
    (own_model / "config.json").write_text(json.dumps(settings))
    (own_model / "mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    assert fails(train("--model", own_model), f"cannot read the model {own_model}")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_model_files(train, own_model, name):
    path = own_model / name
    path.write_bytes(path.read_bytes()[:100])
    assert fails(train("--model", own_model), f"cannot read the model {own_model}")


def test_gguf_files(train, own_model):
    (own_model / "model.safetensors").unlink()
    (own_model / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    assert fails(train("--model", own_model), f"cannot read the model {own_model}")
    (own_model / "b.gguf").touch()
    assert fails(train("--model", own_model), "holds 2 GGUF files; give the path of one")


def test_missing_weights_are_not_made_up(train, own_model):
    from safetensors.torch import save_file

    weights = load_file(own_model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, own_model / "model.safetensors", metadata={"format": "pt"})
    assert fails(train("--model", own_model), "lacks 1 of the model's weights, model.norm.weight")


def test_a_masked_model_is_refused(train, tmp_path, tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    folder = tmp_path / "bert"
    BertForMaskedLM(BertConfig(num_attention_heads=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    message = "is a masked model (BertForMaskedLM), which reads on both sides of a token"
    assert fails(train("--model", folder), message)


def test_tokenizer_larger_than_the_model(train, own_model):
    build_model(vocab_size=200).save_pretrained(own_model)
    assert fails(train("--model", own_model), "has 258 tokens, the model 200")


def test_tokenizer_without_padding(train, own_model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    build_model().save_pretrained(own_model)
    bare.save_pretrained(own_model)
    code, _, err = train("--model", own_model)
    assert code == 0, err


def test_four_bits_need_bitsandbytes(train):
    assert fails(train("--load-in-4bit"), "requires bitsandbytes: `pip install -U bitsandbytes")
