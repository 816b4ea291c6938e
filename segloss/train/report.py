"""The results of a run as JSON, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .data import TaskData
from .evaluation import Evaluation, bootstrap_interval, chance, majority


@dataclass(frozen=True)
class TaskResult:
    """One row of the table; rates are fractions of the held-out items."""

    task: str
    items: int
    loss_before: float
    loss_after: float
    exact_match_before: float
    exact_match_after: float
    gain_low: float
    gain_high: float
    chance: float | None
    majority: float
    majority_answer: str


def task_result(data: TaskData, before: Evaluation, after: Evaluation, seed: int) -> TaskResult:
    held_out = [item.example for item in data.held_out]
    answer, rate = majority([item.example for item in data.train], held_out)
    low, high = bootstrap_interval(before.correct, after.correct, seed=seed)
    return TaskResult(
        task=data.task,
        items=len(held_out),
        loss_before=before.loss,
        loss_after=after.loss,
        exact_match_before=before.exact_match,
        exact_match_after=after.exact_match,
        gain_low=low,
        gain_high=high,
        chance=chance(held_out),
        majority=rate,
        majority_answer=answer,
    )


def as_json(results: Sequence[TaskResult], timing: dict) -> dict:
    return {"tasks": [asdict(result) for result in results], "timing": timing}


# ---------------------------------------------------------------------------------- the table

HEADER = (
    "task", "items", "loss before", "after", "exact match before", "after",
    "gain (95 % interval)", "chance", "majority answer",
)  # fmt: skip

NOTES = """\
Loss: held-out cross-entropy per completion token, in nats. Exact match: greedy answer equal to the
completion, in % of the held-out items, after case folding, collapsing white space and removing
surrounding punctuation; of an answer only as many lines count as the completion has. Interval:
paired bootstrap over the items. Chance: a uniform guess among the options. Majority answer: always
giving the training part's most frequent answer. A model that has not seen the form of the answers
starts near 0, so part of a gain is the form; compare the last columns too."""


def table(results: Sequence[TaskResult]) -> str:
    """A markdown table with its columns aligned, so that it also reads well on a terminal."""
    rows = [HEADER, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [_line(row, widths) for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def _cells(result: TaskResult) -> list[str]:
    gain = result.exact_match_after - result.exact_match_before
    return [
        result.task.replace("|", "\\|"),
        str(result.items),
        f"{result.loss_before:.3f}",
        f"{result.loss_after:.3f}",
        _percent(result.exact_match_before),
        _percent(result.exact_match_after),
        f"{100 * gain:+.1f} ({100 * result.gain_low:+.1f} to {100 * result.gain_high:+.1f})",
        "-" if result.chance is None else _percent(result.chance),
        _percent(result.majority),
    ]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    return f"| {' | '.join(padded)} |"


# -------------------------------------------------------------------------------- the picture

BEFORE, AFTER, GUESS = "#9aa5b1", "#2563a8", "#c2410c"


def plot(path, losses: Sequence[float], results: Sequence[TaskResult], loss_name: str) -> None:
    """Training loss per step; held-out loss and exact match per task, before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out, match = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    _plot_training(training, losses, loss_name)
    _plot_pairs(
        held_out,
        results,
        "held-out cross-entropy (nats per token)",
        [result.loss_before for result in results],
        [result.loss_after for result in results],
        "{:.2f}",
    )
    _plot_pairs(
        match,
        results,
        "held-out exact match (%)",
        [100 * result.exact_match_before for result in results],
        [100 * result.exact_match_after for result in results],
        "{:.0f}",
    )
    _plot_guessing(match, results)
    figure.savefig(path, dpi=150, format="png")


def _plot_training(axes, losses: Sequence[float], loss_name: str) -> None:
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=BEFORE, linewidth=1, marker="." if len(losses) < 3 else None)
    window = max(1, len(losses) // 10)
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        label = f"mean of {window} steps"
        axes.plot(steps[window - 1 :], mean, color=AFTER, linewidth=2, label=label)
        axes.legend(frameon=False)
    axes.set_title(f"training loss: {loss_name}", parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=min(0, *losses))
    _plain(axes)


def _plot_pairs(axes, results, title: str, before, after, form: str) -> None:
    places = np.arange(len(results))
    for shift, values, color, label in (
        (-0.2, before, BEFORE, "before"),
        (0.2, after, AFTER, "after"),
    ):
        bars = axes.bar(places + shift, values, width=0.38, color=color, label=label)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=9)
    axes.set_xticks(places, [result.task for result in results], parse_math=False)
    axes.margins(y=0.25)
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper right")
    _plain(axes)


def _plot_guessing(axes, results: Sequence[TaskResult]) -> None:
    """A line over each task at what the better of chance and the majority answer scores."""
    guesses = [100 * max(result.chance or 0.0, result.majority) for result in results]
    places = np.arange(len(results))
    axes.hlines(guesses, places - 0.42, places + 0.42, color=GUESS, linewidth=1.5, label="guessing")
    axes.legend(frameon=False, loc="upper right")


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
