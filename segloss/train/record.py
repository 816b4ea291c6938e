"""What run folders hold, read back: finished runs, unfinished ones and selections of tasks."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

# How `sample_weight_counts` sorts sample weights, as multiples of an equal weight: below the first,
# between each two, above the last. 1 is in the middle of a bin.
WEIGHT_EDGES = [2.0 ** (k / 2 + 0.25) for k in range(-13, 13)]


@dataclass(frozen=True)
class Record:
    """One run folder as read; what it lacks is empty."""

    name: str
    path: Path
    settings: dict[str, Any]
    description: dict[str, Any]
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl, one per optimizer step."""
    evaluations: dict[str, dict[str, dict[str, Any]]]
    """Phase ("before", "after") -> task -> row of metrics.jsonl."""
    results: dict[str, Any]
    selection: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Those it trains, in the order of the settings."""
        return list(self.evaluations.get("before", {})) or list(self._trained())

    def _trained(self) -> dict[str, Any]:
        return self.steps[0].get("task_loss", {}) if self.steps else {}

    def series(self, name: str, task: str | None = None) -> tuple[list[int], list[float]]:
        """(steps, values) of a number of the step rows, where there is one."""
        pairs = [(row["step"], _value(row, name, task)) for row in self.steps]
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def has(self, name: str) -> bool:
        return any(row.get(name) is not None for row in self.steps)


def _value(row: dict[str, Any], name: str, task: str | None):
    value = row.get(name)
    return value if task is None or value is None else value.get(task)


def read_records(paths: list[str]) -> list[Record]:
    """The runs in these folders. Raises `UserError` where one is no run's folder or unreadable."""
    names = _names(paths)
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _names(paths: list[str]) -> list[str]:
    """The folders' own names, or the paths where two have the same."""
    names = [Path(os.path.abspath(path)).name for path in paths]
    if len(set(paths)) < len(paths):
        raise UserError("a run is given twice")
    return names if len(set(names)) == len(names) else paths


def _read(path: str, name: str) -> Record:
    folder = Path(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such run folder")
    description = _json(folder / "config.json")
    selection = _json(folder / "selection.json")
    rows = list(_rows(folder / "metrics.jsonl"))
    if "settings" not in description and not selection and not rows:
        raise UserError(f"{path} is no run's folder: no settings, no metrics, no selection in it")
    _check_selection(selection, folder / "selection.json")
    evaluations: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("event") == "evaluation":
            evaluations.setdefault(row["phase"], {})[row["task"]] = row
    return Record(
        name=name,
        path=folder,
        settings=description.get("settings", {}),
        description=description,
        steps=_first_training([row for row in rows if row.get("event") == "step"]),
        evaluations=evaluations,
        results=_json(folder / "results.json"),
        selection=selection,
    )


def _first_training(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A selection of tasks trains on all of them, then on some: the steps of the first."""
    for index, (before, row) in enumerate(itertools.pairwise(steps), start=1):
        if row["step"] <= before["step"]:
            return steps[:index]
    return steps


def _json(path: Path) -> dict[str, Any]:
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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a kill cut off is left out."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON") from None


def _check_selection(selection: dict[str, Any], path: Path) -> None:
    for subset in selection.get("subsets", []):
        if not isinstance(subset, dict) or not {"tasks", "estimated"} <= set(subset):
            raise UserError(f'{path}: a subset needs "tasks" and "estimated"')
