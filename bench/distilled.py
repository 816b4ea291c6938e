"""Whether a teacher helps a student from scratch on the demo's task; what it learns is stored.

    python -m bench.distilled OUTPUT [--steps N]

The teacher is SmolLM2 after 24 steps of 16 questions (`segloss train`, in OUTPUT/teacher, made
once). Its 16 likeliest classes at each label of 1000 training rows are written down; a Llama of 2
layers x 128 with the same tokenizer is trained on these rows from the labels alone, and from labels
and stored teacher. Prints the table of all three on the teacher's 300 held-out questions, and the
paired differences with 95 % bootstrap intervals over the questions. Needs the wheels of `make
demo`; what a call has done the next one finds again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from segloss.train import data as of_data
from segloss.train.config import settings

HERE = Path(__file__).parent / "demo"
LONGEST, ROWS, HELD_OUT, TOP = 59, 1000, 300, 16  # characters of a prompt; rows; classes
LOSSES = {"alone": "ce", "taught": "0.5*ce+0.5*distill(temperature=2)"}


def command(*words: object) -> None:
    code = "import sys; from segloss.command import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)


def questions(output: Path) -> Path:
    """The demo's questions, the shorter half of them."""
    every, file = output / "all.jsonl", output / "subjects.jsonl"
    if not file.exists():
        subprocess.run([sys.executable, HERE / "medmcqa.py", every], check=True)
        lines = every.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if len(json.loads(line)["prompt"]) <= LONGEST]
        file.write_text("".join(kept), encoding="utf-8")
    return file


def teach(output: Path, file: Path) -> Path:
    folder = output / "teacher"
    if not (folder / "results.json").exists():
        command(
            *("train", "--config", HERE / "demo.yaml", "--data", file, "--loss", "ce"),
            *("--batch-size", 16),
            *("--steps", 24, "--eval-items", HELD_OUT, "--no-evaluate-before", "--output", folder),
        )
    return folder


@torch.no_grad()
def store(output: Path, file: Path, teacher: Path) -> Path:
    """A data set of the teacher's held-out rows, and of training rows with its columns."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = output / "stored" / "subjects"
    if folder.exists():
        return folder
    given = {"model_name_or_path": str(teacher), "output_dir": str(output)}
    given |= {"data": [str(file)], "eval_items": HELD_OUT}
    split = of_data.load(settings([], given), chat=False)
    names = ("prompt", "completion")
    drawn = split.train.shuffle(seed=0).select(range(ROWS))
    rows = [{n: row[n] for n in names} for row in drawn]
    held_out = [{n: row[n] for n in names} for row in split.held_out]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    ends = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    ids = [
        tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(**padded).last_hidden_state
        for i, states in zip(batch, hidden, strict=True):
            first, last = len(ends[i]), len(ids[i])
            logits = states[first - 1 : last - 1].float() @ model.lm_head.weight.float().T
            log_prob, classes = logits.log_softmax(-1).topk(TOP)
            rows[i]["teacher_ids"] = [[]] * first + classes.tolist()
            rows[i]["teacher_log_prob"] = [[]] * first + log_prob.tolist()
    parts = {"train": Dataset.from_list(rows), "test": Dataset.from_list(held_out)}
    DatasetDict(parts).save_to_disk(str(folder))
    return folder


def student(output: Path, teacher: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = output / "student"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    config = LlamaConfig(
        vocab_size=json.loads((teacher / "config.json").read_text())["vocab_size"],
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(output: Path, name: str, steps: int, model: Path, data: Path) -> list[dict]:
    """Train the student; each held-out question's numbers."""
    folder = output / f"{name}-{steps}"
    if not (folder / "results.json").exists():
        command(
            *("train", "--config", HERE / "demo.yaml", "--model", model, "--data", data),
            *("--batch-size", 16),
            *("--loss", LOSSES[name], "--steps", steps, "--lr", 1e-3, "--warmup-steps", 20),
            *("--eval-items", HELD_OUT, "--no-evaluate-before", "--output", folder),
        )
    lines = (folder / "answers-after.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def compare(alone: list[dict], taught: list[dict]) -> list[str]:
    """Paired differences, taught less alone."""
    draws = np.random.default_rng(0).integers(len(alone), size=(2000, len(alone)))

    def column(rows: list[dict], name: str) -> np.ndarray:
        if name == "accuracy":
            return np.array([row["choice"] == row["expected"].strip() for row in rows], float)
        return np.array([row[name] for row in rows], float)

    tokens = column(alone, "tokens")
    lines = []
    for name, over in (("nll", tokens), ("accuracy", np.ones(len(alone)))):
        gain = column(taught, name) - column(alone, name)
        low, high = np.quantile(gain[draws].sum(1) / over[draws].sum(1), [0.025, 0.975])
        value = gain.sum() / over.sum()
        lines.append(f"{name}: {value:+.4f} ({low:+.4f} to {high:+.4f}), taught less alone")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    file = questions(output)
    teacher = teach(output, file)
    stored, model = store(output, file, teacher), student(output, teacher)
    found = [learn(output, name, arguments.steps, model, stored) for name in LOSSES]
    command("report", teacher, *(output / f"{name}-{arguments.steps}" for name in LOSSES))
    print(*compare(*found), sep="\n")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(each.ru_utime + each.ru_stime for each in used) / 60
    print(f"{minutes:.1f} minutes of one core's time in this call")
