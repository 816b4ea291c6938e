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
    description: dict[str, Any]  # with the options that were given as "given"
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)


def read_records(paths: Sequence[str]) -> list[Record]:
    """The runs in these folders. Raises `UserError` where one is no run's folder or unreadable."""
    whole = [os.path.abspath(path) for path in paths]
    if len(set(whole)) < len(paths):
        raise UserError("a run is given twice")
    names = [os.path.basename(path) for path in whole]
    names = names if len(set(names)) == len(names) else list(paths)
    records = []
    for folder, name in zip(map(Path, paths), names, strict=True):
        files = (SETTINGS, RESULTS, SELECTION)
        description, results, selection = (read_json(folder / file) for file in files)
        if "given" not in description:
            raise UserError(f"{folder} is no run's folder: there is no {SETTINGS} in it")
        for subset in selection.get("subsets", []):
            if not isinstance(subset, dict) or not {"tasks", "estimated"} <= set(subset):
                raise UserError(f'{folder / SELECTION}: a subset needs "tasks" and "estimated"')
        records.append(Record(name, description, read_lines(folder / METRICS), results, selection))
    return records


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


def scored(records: Sequence[Record]) -> tuple[list[dict[str, Any]], list[str]]:
    """Of each task a line before training, of each run, and of the guesses; and their scores."""
    lines: list[dict[str, Any]] = []  # rows of the results with a "label", if trained a "run"
    before = [(r.name, row) for r in records for row in r.results.get("before") or ()]
    first = {row["task"]: row for _, row in reversed(before)}
    alike = all(row == first[row["task"]] for _, row in before)
    for name, row in before:
        if not alike or row is first.pop(row["task"], None):
            label = "before training" if alike else f"{name} before training"
            lines.append(row | {"label": label})
    only = "after training" if before else "model"
    for place, record in enumerate(records):
        own = {"label": record.name if len(records) > 1 else only, "run": place}
        lines += [row | own for row in record.results.get("tasks", ())]
    for task, row in {line["task"]: line for line in lines}.items():
        if "majority" in row:
            usual = {name: [value] for name, value in row["majority"].items()}
            usual = usual if "accuracy" in row else {"exact_match": usual["accuracy"]}
            lines.append({"task": task, "label": "majority answer", **usual})
        if "chance" in row:
            lines.append({"task": task, "label": "chance", "accuracy": [row["chance"]]})
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    lines.sort(key=lambda line: tasks.index(line["task"]))
    return lines, [name for name in SCORES if any(name in line for line in lines)]


def table(records: Sequence[Record]) -> list[list[str]]:
    """A header, and a row for every task, run and guess."""
    lines, names = scored(records)
    rows, seen = [["task", "items", "", *(SCORES[name][0] for name in names)]], ""
    for line in lines:
        head = ["", ""] if line["task"] == seen else [line["task"], str(line["items"])]
        rows.append([*head, line["label"], *(cell(line.get(n), *SCORES[n][1:]) for n in names)])
        seen = line["task"]
    return rows


def cell(score: list[float] | None, scale: float, form: str) -> str:
    if score is None:
        return "-"
    value, *interval = (form.format(scale * number) for number in score)
    return f"{value} ({' to '.join(interval)})" if interval else value


def summary(records: Sequence[Record]) -> str:
    """The table as text."""
    if not any(record.results.get("tasks") for record in records):
        return "No items are held out, so there is nothing to say of the result."
    return f"{aligned(table(records))}\n\n{NOTES}"


def subsets(selection: dict[str, Any], of: str = "subset") -> list[list[str]]:
    """A header, and rows of the twelve lowest estimates; the true loss where it is known."""
    rows = [[of, "estimated loss", "true loss"]]
    for subset in sorted(selection["subsets"], key=lambda subset: subset["estimated"])[:12]:
        true = "-" if subset.get("true") is None else f"{subset['true']:.4f}"
        rows.append([" + ".join(subset["tasks"]), f"{subset['estimated']:.4f}", true])
    return rows


def aligned(rows: list[list[str]], words: Sequence[int] = (0, 2)) -> str:
    """A Markdown table, the header first: names in the columns of words, numbers in the others."""
    lines = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * w if i in words else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    forms = [f"{'<' if i in words else '>'}{width}" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(map(format, line, forms))} |" for line in lines)


def story(record: Record) -> str:
    """One paragraph: what was trained, for how long, and what ended it early."""
    given, results = record.description["given"], record.results
    if record.selection:
        chosen = ", ".join(record.selection.get("chosen", []))
        return f"{record.name}: gradients chose the tasks {chosen}."
    loss = given.get("loss") or given.get("loss_type") or "ce"
    text = f"{record.name}: {given.get('model_name_or_path', 'a model')}, loss {loss}"
    told = [n for n in ("use_peft", "lora_r", "task_weights", "sample_weights") if n in given]
    text += "".join(f", {name} {given[name]}" for name in told)
    if "steps" not in results:
        return f"{text}. It has not finished: segloss train --resume goes on with it."
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["timing"].items())
    text += f": {results['steps']} steps of {results['examples_per_step']} examples ({phases})."
    reasons = {"patience": "the validation loss did not fall any more"}
    reason = reasons.get(results["stopped"], f"of the {results['stopped']}")
    return f"{text} Training ended early, because {reason}." if results["stopped"] else text
