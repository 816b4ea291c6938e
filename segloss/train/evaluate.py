"""`segloss evaluate`: the held-out part of training, for a run's model or any other."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig, read_settings
from .errors import UserError
from .evaluation import bootstrap_interval, chance, majority
from .report import NOTES, markdown
from .run import FINAL, evaluations, kind_of, prepare


@dataclass(frozen=True)
class Row:
    """One task's result; rates are fractions of the items."""

    task: str
    items: int
    loss: float
    token_accuracy: float
    entropy: float
    exact_match: float
    low: float
    high: float
    chance: float | None
    majority: float | None
    """None where no example is left to take the most frequent answer from."""


HEADER = (
    "task", "items", "loss", "token accuracy", "entropy", "exact match (95 % interval)", "chance",
    "majority answer",
)  # fmt: skip


def evaluate(target: str, settings: dict[str, Any], json_path: str = "") -> None:
    """Print the table of a run's model or a model; with `json_path`, also write it as JSON.

    Args:
        target: a run folder, whose settings then hold where `settings` gives none, or a model.
        settings: fields of `TrainConfig`.
    """
    if json_path and os.path.lexists(json_path):
        raise UserError(f"--json {json_path} exists already; remove it or give another name")
    base = _base(target)
    if {"data", "tasks"} & set(settings):  # other examples than the run's
        base = {name: value for name, value in base.items() if name not in ("data", "tasks")}
    config = TrainConfig(**(base | settings)).resolved()
    run = prepare(config, to_train=False)
    rows = []
    for task, result in evaluations(run, "evaluating"):
        held_out = [item.example for item in task.held_out]
        train = [item.example for item in task.train]
        low, high = bootstrap_interval([False] * len(held_out), result.correct, seed=config.seed)
        rows.append(
            Row(
                task=task.task,
                items=len(held_out),
                **result.scores,
                low=low,
                high=high,
                chance=chance(held_out),
                majority=majority(train, held_out)[1] if train else None,
            )
        )
    print(f"\n{markdown(HEADER, [_cells(row) for row in rows])}\n\n{NOTES}")
    if json_path:
        _write_json(json_path, {"model": config.model, "tasks": [asdict(row) for row in rows]})


def _base(target: str) -> dict[str, Any]:
    """The settings to begin with."""
    file = Path(target) / "config.json"
    kind = kind_of(file)
    if kind == "select":
        raise UserError(f"{target} is a run of segloss select, which leaves no model")
    if not kind:
        return {"model": target}
    model = Path(target) / FINAL
    if not model.is_dir():
        raise UserError(
            f"{target} has no {FINAL}/: the run did not finish; segloss train --resume goes on"
        )
    settings = read_settings(str(file), TrainConfig)
    return settings | {"model": str(model), "lora_rank": 0, "tensorboard": False}


def _write_json(path: str, value: dict) -> None:
    try:
        Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _cells(row: Row) -> list[str]:
    percent = "{:.1f}".format
    return [
        row.task.replace("|", "\\|"),
        str(row.items),
        f"{row.loss:.3f}",
        percent(100 * row.token_accuracy),
        f"{row.entropy:.3f}",
        f"{100 * row.exact_match:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})",
        "-" if row.chance is None else percent(100 * row.chance),
        "-" if row.majority is None else percent(100 * row.majority),
    ]
