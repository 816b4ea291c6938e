"""How time grows with N and with V, one axis at a time: `python -m bench.growth [--quick]`.

A cell is one implementation at one size. Sizes go upwards, so the cells before predict the next
one; one predicted above 60 s or 16 GB is printed with the prediction and not run.

N tokens, D hidden size, V classes, bfloat16.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench import core, head, inputs, peers
from bench.common import Report, Section, elapsed, interleaved, options, quartiles, too_large
from bench.memory import EAGER_BYTES_PER_LOGIT
from segloss.head.inputs import CPU_CHUNK_BYTES, CPU_CHUNK_ROWS

TOKENS = (256, 512, 1024, 2048, 4096, 16384)
CLASSES = (8192, 16384, 32768, 65536, 131072, 262144)
QUICK_TOKENS, QUICK_CLASSES = (64, 128, 256), (2048, 4096, 8192)
WIDTH = 576  # of SmolLM2-135M
# --rounds at least; short cells more, as many as fit in a second
ROUND_SECONDS, MOST_ROUNDS = 1.0, 8
CE, DICE, LOVASZ, EAGER = head.CE, head.DICE, head.LOVASZ, peers.EAGER
FROZEN = head.FROZEN.format(CE)


# ----------------------------------------------------------------------------------------- fits


@dataclass
class Fit:
    """`seconds = start + slope * x`, by least squares of the relative residuals."""

    start: float
    slope: float
    residual: float  # the largest |fit / measured - 1|
    exponent: float  # of the best power law


def linear_fit(x: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Relative residuals, because the sizes span two orders of magnitude: absolute ones would fit
    the largest cell alone. Needs two sizes."""
    x, seconds = np.asarray(x, float), np.asarray(seconds, float)
    rows = np.stack([1 / seconds, x / seconds], axis=1)
    start, slope = np.linalg.lstsq(rows, np.ones(len(x)), rcond=None)[0]
    residual = np.abs((start + slope * x) / seconds - 1).max()
    exponent = np.polyfit(np.log(x), np.log(seconds), 1)[0]
    return Fit(*map(float, (start, slope, residual, exponent)))


def predicted(points: Sequence[tuple[float, float]], x: float) -> float:
    """Seconds at `x`, from (size, seconds) of smaller sizes: a line through the last two that does
    not go below proportion to nothing; proportion if there is one, 0 if there is none."""
    if not points:
        return 0.0
    (last, seconds) = points[-1]
    if len(points) == 1:
        return seconds * x / last
    (before, less) = points[-2]
    slope = max(0.0, (seconds - less) / (last - before))
    return seconds + slope * (x - last)


# ----------------------------------------------------------------------------------------- cells


def hidden_cell(num_tokens: int, num_classes: int) -> tuple[dict, Section]:
    """Checked steps of ours and of eager on hidden states."""
    tensors = inputs.head_of("zipf", num_tokens, WIDTH, num_classes)
    todo = head.our_todo((CE, LOVASZ), tensors) | head.our_todo((CE,), tensors, frozen=True)
    todo |= head.peer_todo({EAGER: peers.eager}, tensors)
    section = Section("", "", {}, facts={"classes": present(tensors[2])})
    head.checked(todo, section)
    return {name: head.step(todo[name]) for name in section.errors}, section


def logits_cell(num_tokens: int, num_classes: int) -> tuple[dict, Section]:
    """The same on logits; checked on the first rows, as hidden states are."""
    logits, target = inputs.zipf("zipf", num_tokens, num_classes)
    logits = logits.to(torch.bfloat16)
    names = {CE: core.CE, DICE: core.DICE, LOVASZ: core.LOVASZ, EAGER: core.TORCH}
    section = Section("", "", {}, facts={"classes": present(target)})
    rows = slice(0, head.CHECKED_ROWS)
    few = {name: (*core.IMPLEMENTATIONS[key], target[rows]) for name, key in names.items()}
    core.checked(few, logits[rows], section)
    return {
        name: core.forward_backward(few[name][0], logits, target) for name in section.errors
    }, section


def present(target: torch.Tensor) -> str:
    return str(target.unique().numel())


def cell_bytes(name: str, level: str, num_tokens: int, num_classes: int) -> float:
    """Roughly what a cell holds at its peak, inputs included."""
    logits = num_tokens * num_classes
    if name == EAGER:
        return EAGER_BYTES_PER_LOGIT * logits + 4 * WIDTH * num_classes
    if level == "logits":
        return 4 * logits  # bfloat16 logits and their gradient
    return 12 * WIDTH * num_classes + 2 * max(CPU_CHUNK_BYTES, 2 * CPU_CHUNK_ROWS * num_classes)


@dataclass
class Axis:
    letter: str
    level: str
    sizes: Sequence[int]
    other: int  # the size of the axis that stays
    cell: Callable[[int, int], tuple[dict, Section]]

    def at(self, size: int) -> tuple[int, int]:
        """(N, V)"""
        return (size, self.other) if self.letter == "N" else (self.other, size)


def axes(quick: bool) -> list[Axis]:
    tokens, classes = (QUICK_TOKENS, QUICK_CLASSES) if quick else (TOKENS, CLASSES)
    num_tokens, num_classes = (256, 8192) if quick else (1024, 32768)
    return [
        Axis(letter, level, sizes, other, cell)
        for level, cell in (("hidden states", hidden_cell), ("logits", logits_cell))
        for letter, sizes, other in (("N", tokens, num_classes), ("V", classes, num_tokens))
    ]


def rounds_of(seconds: float, least: int) -> int:
    return max(least, min(MOST_ROUNDS, int(ROUND_SECONDS / seconds)))


def grow(axis: Axis, report: Report) -> None:
    fixed = f"{'V' if axis.letter == 'N' else 'N'} {axis.other}"
    width = f", D {WIDTH}" if axis.level == "hidden states" else ""
    title = f"growth with {axis.letter}, {axis.level}, zipf, bfloat16, {fixed}{width}"
    section = Section(title, "growth", {})
    points: dict[str, list[tuple[int, float]]] = {}
    spread: dict[str, list] = {}
    classes: list[str] = []
    least = report.options.rounds
    twice = axis.level == "logits"  # short: what others left behind would show
    for size in axis.sizes:
        at = axis.at(size)
        runs, cell = axis.cell(*at)
        classes.append(f"{cell.facts['classes']} at {axis.letter} {size}")
        for table in ("wrong", "missing"):
            for name, reason in getattr(cell, table).items():
                getattr(section, table)[f"{name}, {axis.letter} {size}"] = reason
        for name in list(runs):
            # once before the rounds
            seconds = (1 + least * (1 + twice)) * predicted(points.get(name, []), size)
            reason = too_large(seconds, cell_bytes(name, axis.level, *at))
            if reason:
                section.missing[f"{name}, {axis.letter} {size}"] = f"not run, {reason}"
                del runs[name]
        rounds = {name: rounds_of(elapsed(run), least) for name, run in runs.items()}
        for name, seconds in interleaved(runs, rounds, twice).items():
            key = f"{name}, {axis.letter} {size}"
            section.seconds[key], section.errors[key] = seconds, cell.errors[name]
            low, median, high = quartiles(seconds)
            points.setdefault(name, []).append((size, median))
            spread.setdefault(name, []).append((size, low, median, high))
    section.data = {
        "axis": axis.letter,
        "level": axis.level,
        "points": spread,
        "fits": {
            name: asdict(linear_fit(*zip(*cells, strict=True)))
            for name, cells in points.items()
            if len(cells) > 1
        },
    }
    # tokens times these is what Dice and Lovász do on top of the passes over N x V
    section.facts["classes present"] = ", ".join(classes)
    for name, fit in section.data["fits"].items():
        if not math.isfinite(fit["residual"]):
            raise RuntimeError(f"{name}: times of 0 s cannot be fitted")
        section.facts[name] = (
            f"{1e3 * fit['start']:.3g} ms + {1e6 * fit['slope']:.3g} us x {axis.letter}, largest "
            f"residual {fit['residual']:.0%}; power law {axis.letter}^{fit['exponent']:.2f}"
        )
    report.add(section)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("growth", "How time grows with the number of tokens and of classes.", rounds=2)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rounds = 2
    warnings.filterwarnings("ignore", module="torch")
    report = Report("Growth with N and V, forward + backward", chosen)
    for axis in axes(chosen.quick):
        grow(axis, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
