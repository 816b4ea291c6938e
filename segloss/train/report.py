"""The results of a run as JSON, as a table and as a picture."""

from __future__ import annotations

import warnings
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
    return markdown(HEADER, [_cells(result) for result in results])


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [header, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
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
GUESSING = "chance or majority"
TITLE_PAD = 28
# the line at what guessing scores must not cross out a number
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}


def plot(path, losses: Sequence[float], results: Sequence[TaskResult], loss_name: str) -> None:
    """Training loss per step; held-out loss and exact match per task, before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out, match = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    figure.suptitle(f"loss: {loss_name}", parse_math=False)
    _plot_training(training, losses)
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
    with warnings.catch_warnings():
        # a task's name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(path, dpi=150, format="png")


def _plot_training(axes, losses: Sequence[float]) -> None:
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=BEFORE, linewidth=1, marker=".", label="each step")
    window = max(1, len(losses) // 10)
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = np.arange(len(mean)) + (window + 1) / 2
        axes.plot(middle, mean, color=AFTER, linewidth=2, label=f"mean of {window} steps")
    axes.set_title("training loss", pad=TITLE_PAD)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.update_datalim([(1, 0)])
    axes.autoscale_view()
    _legend_above(axes)
    _plain(axes)


def _plot_pairs(axes, results, title: str, before, after, form: str) -> None:
    places = np.arange(len(results))
    for shift, values, color, label in (
        (-0.2, before, BEFORE, "before"),
        (0.2, after, AFTER, "after"),
    ):
        bars = axes.bar(places + shift, values, width=0.38, color=color, label=label)
        texts = [form.format(value) for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize=9, bbox=LABEL_BOX, zorder=4)
    many = {"rotation": 30, "ha": "right"} if len(results) > 4 else {}
    axes.set_xticks(places, [result.task for result in results], parse_math=False, **many)
    axes.margins(y=0.12)
    axes.set_title(title, pad=TITLE_PAD)
    _legend_above(axes)
    _plain(axes)


def _plot_guessing(axes, results: Sequence[TaskResult]) -> None:
    """A line over each task at what the better of chance and the majority answer scores."""
    guesses = [100 * max(result.chance or 0.0, result.majority) for result in results]
    places = np.arange(len(results))
    axes.hlines(guesses, places - 0.42, places + 0.42, color=GUESS, linewidth=1.5, label=GUESSING)
    _legend_above(axes)


def _legend_above(axes) -> None:
    """Between title and axes, where no bar is."""
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3)


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
