"""What the JSON files hold: sections that were measured, by topic, and ready tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import Line, Section

TOPICS = {
    "logits": (
        "Losses on logits",
        "Forward + backward of a loss on logits that exist. The bound is one pass over the bytes: "
        "the logits read once, their gradient written once.",
    ),
    "segmentation": (
        "Segmentation libraries",
        "The same value from libraries made for pictures, a token a pixel. A library whose result "
        "is not what its documentation describes is named as wrong and has no time.",
    ),
    "head": (
        "Losses on hidden states",
        "Forward + backward from hidden states and a head's weight; ours never stores the "
        "logits. The bound is the bare matrix products (three; two with a frozen head) and one "
        "pass over the logits' bytes.",
    ),
    "models": (
        "Heads of models by name",
        "As many tokens as a minute allows.",
    ),
    "directions": (
        "Forward and backward apart",
        "On hidden states our token losses make their gradients in forward, while the logits are "
        "there, so their backward is nearly free and only the sum of both compares.",
    ),
    "ignored": ("Ignored tokens", "Prompt-masked fine-tuning ignores most tokens."),
    "growth": (
        "Growth with N and V",
        "One axis at a time; the line is fitted to relative residuals. Dice and Lovász also look "
        "at every token for each class present, and more tokens hold more classes: that part "
        "grows faster than N.",
    ),
    "memory": (
        "Memory",
        "Peak of resident memory of one forward and backward in a process of its own, above the "
        "inputs and without the gradients.",
    ),
    "filter": (
        "grad_filter",
        "Error of the gradients, and time, on hidden states of a real model.",
    ),
    "candidates": (
        "Lovász's candidates during training",
        "Only background entries above their class's least foreground error carry gradient. How "
        "many there are decides what Lovász costs.",
    ),
    "gradex": (
        "GradEx",
        "Estimates of the loss after training on a subset of groups of sums, some of them noise, "
        "against that training. Estimates and retraining took their seconds for all subsets.",
    ),
}
# topic -> the command that measures it
COMMANDS = {
    **dict.fromkeys(("logits", "directions"), "python -m bench.core"),
    "segmentation": "python -m bench.segmentation",
    **dict.fromkeys(("head", "models", "ignored", "memory", "filter"), "python -m bench.head"),
    "growth": "python -m bench.growth",
    "candidates": "python -m bench.candidates",
    "gradex": "python -m bench.gradex",
}
# what other files hold: title of their tables -> the command that writes them
ELSEWHERE = {
    "kernels": ("Kernels without a GPU", "make kernels"),
    "gpu": ("On a GPU", "make gpu"),
}


@dataclass
class Table(Section):
    """A section of a file, and the machine it was measured on."""

    machine: dict = field(default_factory=dict)
    quick: bool = False

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


@dataclass
class Other:
    """A file with ready tables: {"kind", "machine", "tables": [{"title", "header", "rows"}]}."""

    kind: str
    machine: dict
    tables: list[dict]


def read(paths: Iterable[str]) -> tuple[list[Table], list[Other]]:
    tables, others = [], []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} cannot be read: {error}") from None
        if "sections" in content:
            quick = bool(content["options"].get("quick"))
            tables += [table_of(s, content["machine"], quick) for s in content["sections"]]
        elif "tables" in content:
            kind = content.get("kind", Path(path).stem)
            others.append(Other(kind, content.get("machine", {}), content["tables"]))
        else:
            raise SystemExit(f"{path} has neither sections nor tables: not a file of ours")
    return tables, others


def table_of(section: dict, machine: dict, quick: bool) -> Table:
    lines = [Line(**{k: v for k, v in line.items() if k != "verdict"}) for line in section["lines"]]
    return Table(**{**section, "lines": lines}, machine=machine, quick=quick)
