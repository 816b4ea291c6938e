"""What runs have left: read back, as one table, and in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, json_rows, parsed, text_of

# the files of a run's folder that are read here
SETTINGS, METRICS, RESULTS = "segloss.json", "metrics.jsonl", "results.json"
SELECTION = "selection.json"


@dataclass(frozen=True)
class Record:
    """One run folder as read; what it lacks is empty."""

    name: str
    description: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        return self.description.get("given", {})

    def scores(self, phase: str, task: str) -> dict[str, Any]:
        """A task's row of the results, of "tasks" or of "before"."""
        return next((r for r in self.results.get(phase) or () if r["task"] == task), {})


def read_records(paths: Sequence[str]) -> list[Record]:
    """The runs in these folders. Raises `UserError` where one is no run's folder or unreadable."""
    whole = [os.path.abspath(path) for path in paths]
    if len(set(whole)) < len(paths):
        raise UserError("a run is given twice")
    names = [os.path.basename(path) for path in whole]
    names = names if len(set(names)) == len(names) else list(paths)
    return [read_record(Path(p), name) for p, name in zip(paths, names, strict=True)]


def read_record(folder: Path, name: str) -> Record:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    files = (SETTINGS, RESULTS, SELECTION)
    description, results, selection = (read_json(folder / file) for file in files)
    if "given" not in description and not selection:
        raise UserError(f"{folder} is no run's folder: there is no {SETTINGS} in it")
    for subset in selection.get("subsets", []):
        if not isinstance(subset, dict) or not {"tasks", "estimated"} <= set(subset):
            raise UserError(f'{folder / SELECTION}: a subset needs "tasks" and "estimated"')
    return Record(name, description, read_lines(folder / METRICS), results, selection)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none."""
    value = parsed(text_of(path), f"cannot read {path}") if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: a JSON object is needed")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last one that a kill cut off is left out."""
    whole = text_of(path).rpartition("\n")[0] if path.exists() else ""
    return [row for _, row in json_rows(whole, path)]


def json_lines(rows: Iterable[Any]) -> str:
    """A line of JSON for each row; null for numbers that are not finite, which JSON has not."""
    plain = (json.loads(json.dumps(row), parse_constant=lambda name: None) for row in rows)
    return "".join(json.dumps(row) + "\n" for row in plain)


def write(path: Path, value: Any) -> None:
    """Text, or what JSON can hold: on the disk all of it or nothing."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2) + "\n"
    partial = path.with_name(f"partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


SCORES = {
    "nll": ("loss (nats per token)", 1, "{:.3f}"),
    "exact_match": ("exact match (%)", 100, "{:.1f}"),
    "accuracy": ("accuracy (%)", 100, "{:.1f}"),
    "macro_f1": ("macro-F1", 1, "{:.3f}"),
}
NOTES = """\
Of each task's held-out items, which nothing was trained on; in brackets a 95 % bootstrap interval
over the items. Loss: cross-entropy of the right answer. Exact match: of greedy answers. Accuracy
and macro-F1: of the option that decoding chooses where only the options may come. Majority: always
the most frequent answer of the training rows."""


@dataclass(frozen=True)
class Line:
    """What a model, or a guess, scores on a task."""

    task: str
    label: str
    scores: dict[str, Any]  # [value, low, high] or [value], by the names of `SCORES`
    run: int | None = None  # the place of the record; None of guesses and before training


def scored(records: Sequence[Record]) -> tuple[list[Line], list[str]]:
    """Of each task a line before training, of each run, and of the guesses; and their scores."""
    lines = []
    for task in dict.fromkeys(row["task"] for r in records for row in r.results.get("tasks", ())):
        before = {r.name: s for r in records if (s := r.scores("before", task))}
        if len(set(map(json.dumps, before.values()))) == 1:
            before = {"": before.popitem()[1]}
        lines += [Line(task, f"{n} before training".strip(), s) for n, s in before.items()]
        only = "after training" if before else "model"
        after = [(i, r.name, s) for i, r in enumerate(records) if (s := r.scores("tasks", task))]
        lines += [Line(task, name if len(records) > 1 else only, s, i) for i, name, s in after]
        first = after[0][2]
        majority = {k: [v] for k, v in first.get("majority", {}).items() if k != "answer"}
        if majority and "accuracy" not in first:
            majority = {"exact_match": majority["accuracy"]}
        chance = {"accuracy": [first["chance"]]} if "chance" in first else {}
        guesses = {"majority answer": majority, "chance": chance}
        lines += [Line(task, label, scores) for label, scores in guesses.items() if scores]
    return lines, [name for name in SCORES if any(name in line.scores for line in lines)]


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) with every task, run and guess."""
    lines, names = scored(records)
    items = {line.task: str(line.scores["items"]) for line in lines if "items" in line.scores}
    rows, seen = [], ""
    for line in lines:
        head = [line.task, items[line.task]] if line.task != seen else ["", ""]
        rows.append([*head, line.label, *(cell(line.scores.get(n), *SCORES[n][1:]) for n in names)])
        seen = line.task
    return ["task", "items", "", *(SCORES[name][0] for name in names)], rows


def cell(score: list[float] | None, scale: float, form: str) -> str:
    if score is None:
        return "-"
    value, *interval = (form.format(scale * number) for number in score)
    return f"{value} ({' to '.join(interval)})" if interval else value


def summary(records: Sequence[Record]) -> str:
    """The table as text."""
    header, rows = table(records)
    if not rows:
        return "No items are held out, so there is nothing to say of the result."
    return f"{aligned(header, rows)}\n\n{NOTES}"


def subsets(selection: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the twelve lowest estimates; the true loss where it is known."""
    found = sorted(selection.get("subsets", []), key=lambda subset: subset["estimated"])[:12]
    rows = []
    for subset in found:
        true = "-" if subset.get("true") is None else f"{subset['true']:.4f}"
        rows.append([" + ".join(subset["tasks"]), f"{subset['estimated']:.4f}", true])
    return ["subset", "estimated loss", "true loss"], rows


def aligned(header: list[str], rows: list[list[str]], words: Sequence[int] = (0, 2)) -> str:
    """A Markdown table: names in the columns of words, numbers in the others."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i in words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, rule)
    forms = [f"{'<' if i in words else '>'}{width}" for i, width in enumerate(widths)]
    padded = [map(format, line, forms) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def story(record: Record) -> str:
    """One paragraph: what was trained, for how long, and what ended it early."""
    given, results, name = record.given, record.results, record.name
    if record.selection:
        return f"{name}: the loss of a model trained on any subset of its tasks, estimated."
    loss = given.get("loss") or given.get("loss_type") or "ce"
    text = f"{name}: {given.get('model_name_or_path', 'a model')}, loss {loss}"
    if given.get("use_peft"):
        text += f", LoRA of rank {given.get('lora_r', 16)}"
    if given.get("task_weights", "none") != "none":
        text += ", task weights by CoBa"
    if given.get("sample_weights", "none") != "none":
        text += f", sample weights by {given['sample_weights']}"
    if "steps" not in results:
        return f"{text}. It has not finished: segloss train --resume goes on with it."
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["timing"].items())
    text += f": {results['steps']} steps of {results['examples_per_step']} examples ({phases})."
    reasons = {"": "", "patience": "the validation loss did not fall any more"}
    reason = reasons.get(results["stopped"], f"of the {results['stopped']}")
    return f"{text} Training ended early, because {reason}." if reason else text
