"""What runs have left: read back, as one table, and in words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

# the files of a run's folder that are read here
SETTINGS, METRICS, RESULTS = "segloss.json", "metrics.jsonl", "results.json"
# How sample weights are counted, as multiples of an equal one: below the first, between each two,
# above the last. 1 is in the middle of a bin.
WEIGHT_EDGES = [2.0 ** (k / 2 + 0.25) for k in range(-13, 13)]


@dataclass(frozen=True)
class Record:
    """One run folder as read; what it lacks is empty."""

    name: str
    given: dict[str, Any]
    description: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, description: dict, results: dict, **others: Any) -> Record:
        name = path.name or str(path)
        return cls(name, description.get("given", {}), description, results=results, **others)

    @property
    def tasks(self) -> list[str]:
        """Those it trains, in their order."""
        return self.description.get("tasks", [])

    @property
    def loss(self) -> str:
        return self.given.get("loss") or self.given.get("loss_type") or "ce"

    def series(self, name: str, part: str | None = None) -> tuple[list[int], list[float]]:
        """(steps, values) of a number of the metrics, where there is one."""
        pairs = [(row["step"], row.get(name)) for row in self.metrics]
        if part is not None:
            pairs = [(step, (value or {}).get(part)) for step, value in pairs]
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def has(self, name: str) -> bool:
        return any(row.get(name) is not None for row in self.metrics)

    def scores(self, phase: str, task: str) -> dict[str, Any] | None:
        """A task's row of the results, of phase "before" or "after"."""
        rows = self.results.get("tasks" if phase == "after" else phase) or []
        return next((row for row in rows if row["task"] == task), None)


def read_records(paths: Sequence[str]) -> list[Record]:
    """The runs in these folders. Raises `UserError` where one is no run's folder or unreadable."""
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise UserError("a run is given twice")
    names = [Path(os.path.abspath(path)).name for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    return [read_record(Path(p), name) for p, name in zip(paths, names, strict=True)]


def read_record(folder: Path, name: str) -> Record:
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such run folder")
    files = (SETTINGS, RESULTS, "selection.json")
    description, results, selection = (read_json(folder / file) for file in files)
    metrics = list(read_lines(folder / METRICS))
    if "given" not in description and not selection:
        raise UserError(f"{folder} is no run's folder: there is no {SETTINGS} in it")
    for subset in selection.get("subsets", []):
        if not isinstance(subset, dict) or not {"tasks", "estimated"} <= set(subset):
            raise UserError(f'{folder}/selection.json: a subset needs "tasks" and "estimated"')
    given = description.get("given", {})
    return Record(name, given, description, metrics, results, selection)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: a JSON object is needed")
    return value


def read_lines(path: Path):
    """The rows of metrics.jsonl; a last one that a kill cut off is left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON") from None


# ---------------------------------------------------------------------------------- one table

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


def scored(records: Sequence[Record]) -> list[str]:
    """The tasks that have results, in the order they first occur."""
    rows = [row for record in records for row in record.results.get("tasks", [])]
    return list(dict.fromkeys(row["task"] for row in rows))


def entries(records: Sequence[Record], task: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, scores) of a task: before training, of each run, of the guesses."""
    found: list[tuple[str, dict[str, Any]]] = []
    befores = [(r.name, r.scores("before", task)) for r in records if r.scores("before", task)]
    if befores and all(scores == befores[0][1] for _, scores in befores):
        befores = [("", befores[0][1])]
    found += [(f"{name} before training".strip(), scores or {}) for name, scores in befores]
    after = [(r.name, r.scores("after", task)) for r in records if r.scores("after", task)]
    label = "after training" if befores else "model"
    found += [(name if len(records) > 1 else label, scores or {}) for name, scores in after]
    first = after[0][1] if after else None
    if first and "majority" in first:
        guess = {k: [v] for k, v in first["majority"].items() if k != "answer"}
        if "accuracy" not in first:
            guess = {"exact_match": guess["accuracy"]}
        found.append(("majority answer", guess))
    if first and "chance" in first:
        found.append(("chance", {"accuracy": [first["chance"]]}))
    return found


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) with every task, run and guess."""
    tasks = scored(records)
    blocks = [(task, entries(records, task)) for task in tasks]
    names = [n for n in SCORES if any(n in s for _, block in blocks for _, s in block)]
    rows = []
    for task, block in blocks:
        items = next(str(scores["items"]) for _, scores in block if "items" in scores)
        for place, (label, scores) in enumerate(block):
            cells = [cell(scores.get(name), *SCORES[name][1:]) for name in names]
            rows.append([task, items, label, *cells] if place == 0 else ["", "", label, *cells])
    return ["task", "items", "", *(SCORES[name][0] for name in names)], rows


def cell(score: list[float] | None, scale: float, form: str) -> str:
    if score is None:
        return "-"
    value, *interval = (form.format(scale * number) for number in score)
    return f"{value} ({' to '.join(interval)})" if interval else value


def markdown(records: Sequence[Record]) -> str:
    header, rows = table(records)
    if not rows:
        return "No items are held out, so there is nothing to say of the result."
    return f"{aligned(header, rows)}\n\n{NOTES}"


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: a name, a number, a name, and numbers."""
    lines = [[c.replace("|", "\\|") for c in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = (True, False, True)

    def joined(cells: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if (left[i] if i < 3 else False) else text.rjust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < 3 and left[i] else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([joined(lines[0]), joined(rule), *map(joined, lines[1:])])


def story(record: Record) -> str:
    """One paragraph: what was trained, for how long, and what ended it early."""
    given, results = record.given, record.results
    if record.selection:
        text = f"{record.name}: the loss of a model trained on any subset of its tasks, estimated."
        return text + (" The curves are of its training on all tasks." if record.metrics else "")
    text = f"{record.name}: {given.get('model_name_or_path', 'a model')}, loss {record.loss}"
    if given.get("use_peft"):
        text += f", LoRA of rank {given.get('lora_r', 16)}"
    if given.get("task_weights", "none") != "none":
        text += ", task weights by CoBa"
    if given.get("sample_weights", "none") != "none":
        text += f", sample weights by {given['sample_weights']}"
    if "steps" not in results:
        return f"{text}. It has not finished: segloss train --resume goes on with it."
    timing = results["timing"]
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timing.items())
    text += f": {results['steps']} steps of {results['examples_per_step']} examples ({phases})."
    if results["stopped"]:
        why = {"patience": "the validation loss did not fall any more"}
        reason = why.get(results["stopped"], f"of the {results['stopped']}")
        text += f" Training ended early, because {reason}."
    return text
