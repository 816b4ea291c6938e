"""The pictures of `segloss report`: each draws some records, or returns None without their data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .record import WEIGHT_EDGES, Record

# Okabe and Ito: told apart with any colour vision
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
GREY = "#9aa5b1"
WIDTH = 11.0


@dataclass(frozen=True)
class Picture:
    """A figure and what the page says around it."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(records: Sequence[Record]) -> list[Picture]:
    """Every picture that the records have data for."""
    draw: list[Callable[[Sequence[Record]], Picture | None]] = [
        results,
        task_losses,
        task_weights,
        sample_weights,
        training,
        selection,
    ]
    drawn = [function(records) for function in draw]
    return [picture for picture in drawn if picture is not None]


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


# ------------------------------------------------------------------------------------- results


def results(records: Sequence[Record]) -> Picture | None:
    """Held-out loss and exact match of each task, before and after each run."""
    records = [record for record in records if record.evaluations.get("after")]
    if not records:
        return None
    figure = _figure(4.2)
    axes = figure.subplots(1, 2)
    tasks = _tasks(records)
    for axis, key, scale, form in (
        (axes[0], "loss", 1.0, "{:.2f}"),
        (axes[1], "exact_match", 100.0, "{:.0f}"),
    ):
        _bars(axis, records, tasks, key, scale, form)
    axes[0].set_title("loss (nats per token), lower is better")
    axes[1].set_title("exact match (%), higher is better")
    _guesses(axes[1], records, tasks)
    handles = dict(
        zip(*reversed(axes[1].get_legend_handles_labels()), strict=True)
    )  # each label once
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    caption = (
        "Each task's held-out items, which no run trained on: the loss is the cross-entropy of the "
        "right answer per token, exact match the share of greedy answers that are the right one. "
        "The black line is what guessing scores, by chance or by always giving the most frequent "
        "answer, whichever is more: only what is above it has been learnt beyond the form of an "
        "answer."
    )
    return Picture("results", "Results on held-out items", caption, figure)


def _bars(axis, records: Sequence[Record], tasks: list[str], key: str, scale: float, form) -> None:
    groups = [("before", [_score(records, "before", task, key) for task in tasks], GREY)]
    for index, record in enumerate(records):
        label = "after" if len(records) == 1 else f"after {record.name}"
        values = [_score([record], "after", task, key) for task in tasks]
        groups.append((label, values, color(index)))
    places, width = np.arange(len(tasks)), 0.8 / len(groups)
    for index, (label, values, shade) in enumerate(groups):
        heights = [scale * value for value in values]
        shift = (index - (len(groups) - 1) / 2) * width
        bars = axis.bar(places + shift, heights, 0.92 * width, color=shade, label=label)
        if len(groups) * len(tasks) <= 20:
            texts = [form.format(height) if np.isfinite(height) else "" for height in heights]
            axis.bar_label(bars, texts, padding=2, fontsize=8)
    _named(axis, tasks)
    axis.margins(y=0.1)
    _plain(axis)


def _score(records: Sequence[Record], phase: str, task: str, key: str) -> float:
    """Of the first record that has the task."""
    for record in records:
        row = record.evaluations.get(phase, {}).get(task)
        if row is not None and row[key] is not None:
            return row[key]
    return float("nan")


def _guesses(axis, records: Sequence[Record], tasks: list[str]) -> None:
    for record in records:
        for row in record.results.get("tasks", []):
            guess = 100 * max(row["chance"] or 0.0, row["majority"])
            place = tasks.index(row["task"])
            axis.hlines(guess, place - 0.44, place + 0.44, color="black", label="guessing")


# -------------------------------------------------------------------------------------- curves


def task_losses(records: Sequence[Record]) -> Picture | None:
    """One panel per task: its loss in training batches and on validation items."""
    records = [record for record in records if record.has("task_loss")]
    if not records:
        return None
    tasks = _tasks(records)
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(2.9 * rows + 0.4)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axis in grid.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(grid.flat, tasks, strict=False):
        for index, record in enumerate(records):
            label = record.name if len(records) > 1 else "training"
            _curve(axis, *record.series("task_loss", task), color(index), label)
            steps, values = record.series("validation_loss", task)
            if steps:
                label = "validation" if len(records) == 1 else f"{record.name}, validation"
                axis.plot(steps, _smooth(values), color=color(index), ls="--", label=label)
        axis.set_title(task, parse_math=False)
        axis.set_ylim(bottom=0)
        _plain(axis)
    for axis in grid[:, 0]:
        axis.set_ylabel("nats per token")
    _legend(figure, grid.flat[0])
    _steps(grid.flat[max(0, len(tasks) - columns) : len(tasks)])
    caption = (
        "Cross-entropy per token of each task while it is trained (whatever the training loss is). "
        "Dots are single steps, lines a running mean."
    )
    if any(record.has("validation_loss") for record in records):
        caption += (
            " Dashed: the same on the few validation items that CoBa reads after each step, which "
            "are not trained on. A dashed line that turns up while the solid one falls is a task "
            "being learnt by heart."
        )
    return Picture("task-losses", "Loss of each task", caption, figure)


def task_weights(records: Sequence[Record]) -> Picture | None:
    """CoBa's weights over the steps, and how much its two scores have in them."""
    records = [record for record in records if record.has("task_weight")]
    if not records:
        return None
    figure = _figure(4.6)
    grid = figure.subplots(2, len(records), height_ratios=[3, 1], sharex="col", squeeze=False)
    for column, record in enumerate(records):
        _weights_panel(grid[0, column], record)
        steps, share = record.series("divergence_factor")
        axis = grid[1, column]
        axis.plot(steps, share, color="black", lw=1.2)
        axis.set_ylim(-0.05, 1.05)
        _plain(axis)
        grid[0, column].set_title(record.name, parse_math=False)
    for axis in grid[0]:
        axis.set_ylim(0, max(other.get_ylim()[1] for other in grid[0]))
    grid[0, 0].set_ylabel("weight in the loss")
    grid[1, 0].set_ylabel("share of the\nrelative score")
    _steps(grid[1])
    caption = (
        "How much CoBa lets each task count at each step; the weights of a step add up to 1. The "
        "grey band is the warm-up, in which all are equal (dotted). Afterwards the relative score "
        "raises the tasks whose validation loss falls more slowly than the others', and the "
        "absolute score lowers those whose own loss has begun to rise. Below: the share of the "
        "relative score in the weights, 1 at first and small once the losses have flattened or "
        "one rises. Few validation items a step make the weights jump."
    )
    return Picture("task-weights", "Task weights (CoBa)", caption, figure)


def _weights_panel(axis, record: Record) -> None:
    tasks = record.tasks
    ends = []
    for index, task in enumerate(tasks):
        steps, weights = record.series("task_weight", task)
        axis.plot(steps, weights, color=color(index), lw=1.8, label=task)
        ends.append(weights[-1])
    axis.axhline(1 / len(tasks), color=GREY, ls=":", lw=1.2)
    warmup = record.settings.get("coba_warmup") or 0
    axis.axvspan(steps[0] - 0.5, min(warmup, steps[-1]) + 0.5, color="#f1f3f5", zorder=0)
    spread = np.ptp(axis.get_ylim()) * 0.07
    for index, place in enumerate(_apart(ends, spread)):
        axis.annotate(
            tasks[index],
            (1, place),
            xycoords=axis.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            color=color(index),
            va="center",
            fontsize=9,
            annotation_clip=False,
            parse_math=False,
        )
    axis.margins(x=0.01)
    _plain(axis)


def _apart(places: Sequence[float], spread: float) -> list[float]:
    """The places moved up where they are closer than `spread`, in their order."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + spread)
    return moved


def sample_weights(records: Sequence[Record]) -> Picture | None:
    """The histogram of all sample weights, and how many examples are left of a batch."""
    records = [record for record in records if record.has("sample_weight_counts")]
    if not records:
        return None
    figure = _figure(3.8)
    histogram, effective = figure.subplots(1, 2)
    edges = [WEIGHT_EDGES[0] / 2**0.5, *WEIGHT_EDGES, WEIGHT_EDGES[-1] * 2**0.5]
    for index, record in enumerate(records):
        rows = [row for row in record.steps if "sample_weight_counts" in row]
        counts = np.sum([row["sample_weight_counts"] for row in rows], axis=0)
        histogram.stairs(
            100 * counts / counts.sum(),
            edges,
            fill=len(records) == 1,
            color=color(index),
            lw=1.8,
            label=_weighting(record),
        )
        steps, size = record.series("effective_sample_size")
        batch = rows[0]["samples"]
        _curve(effective, steps, size, color(index), f"of {batch}: {_weighting(record)}")
        effective.axhline(batch, color=GREY, ls=":")
    histogram.axvline(1, color="black", lw=1)
    histogram.set_xscale("log", base=2)
    ticks = [1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]
    histogram.set_xticks(ticks, ["1/64", "1/16", "1/4", "1", "4", "16", "64"])
    histogram.minorticks_off()
    histogram.set_xlim(edges[0], edges[-1])
    histogram.set_title("weight of an example, as a multiple of an equal one")
    histogram.set_ylabel("% of all examples")
    effective.set_title("effective sample size of a step")
    effective.set_ylim(bottom=0)
    for axis in (histogram, effective):
        axis.legend(frameon=False, fontsize=9)
        _plain(axis)
    _steps([effective])
    caption = (
        "Left: how the weights of all examples of all steps are spread; at the black line an "
        "example counts as without weighting, left of it less, right of it more. Right: 1 / sum of "
        "squared weights, which is the size of the batch (dotted) if all weigh the same and 1 if a "
        "single example has all the weight: a small value means noisy steps."
    )
    return Picture("sample-weights", "Sample weights", caption, figure)


def _weighting(record: Record) -> str:
    scheme = record.settings.get("sample_weights", "")
    return f"{record.name} ({scheme})" if scheme else record.name


def training(records: Sequence[Record]) -> Picture | None:
    """The training objective, token accuracy and entropy."""
    records = [record for record in records if record.steps]
    if not records:
        return None
    figure = _figure(3.4)
    axes = figure.subplots(1, 3)
    for axis, key, title in (
        (axes[0], "loss", "training loss, as weighted"),
        (axes[1], "token_accuracy", "token accuracy (%)"),
        (axes[2], "entropy", "entropy (nats)"),
    ):
        for index, record in enumerate(records):
            steps, values = record.series(key)
            values = [100 * value for value in values] if key == "token_accuracy" else values
            if steps:
                _curve(axis, steps, values, color(index), record.name)
        axis.set_title(title)
        _plain(axis)
    if len(records) > 1:
        _legend(figure, axes[0])
    _steps(axes)
    caption = (
        "What the optimizer sees: the loss with all weights in it (runs with other losses or "
        "weights cannot be compared here), how often the right token was the most probable one, "
        "and how undecided the predictions are."
    )
    return Picture("training", "Training", caption, figure)


# ----------------------------------------------------------------------------------- selection


def selection(records: Sequence[Record]) -> Picture | None:
    """Estimated against true losses of subsets of tasks."""
    records = [
        record
        for record in records
        if any(subset.get("true") is not None for subset in record.selection.get("subsets", []))
    ]
    if not records:
        return None
    figure = _figure(5.0, width=7.5)
    (axis,) = figure.subplots(1, 1, squeeze=False).flat
    values: list[float] = []
    for index, record in enumerate(records):
        subsets = [s for s in record.selection["subsets"] if s.get("true") is not None]
        estimated = [subset["estimated"] for subset in subsets]
        true = [subset["true"] for subset in subsets]
        values += estimated + true
        axis.plot(estimated, true, "o", color=color(index), label=record.name)
        chosen = set(record.selection.get("chosen", []))
        for subset in subsets:
            if set(subset["tasks"]) == chosen:
                place = subset["estimated"], subset["true"]
                axis.plot(*place, "o", ms=14, mfc="none", color=color(index), label="chosen")
        if len(subsets) <= 12:
            _name_subsets(axis, subsets)
    low, high = min(values), max(values)
    margin = 0.08 * (high - low or 1.0)
    line = [low - margin, high + margin]
    axis.plot(line, line, color=GREY, ls=":", label="estimated = true")
    axis.set_xlabel("estimated loss (no training)")
    axis.set_ylabel("true loss (trained on the subset)")
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(axis)
    caption = (
        "Each dot is a subset of tasks: the loss that gradients predict for a model trained on it, "
        "against the loss after really training on it. On the dotted line the estimate is exact; "
        "for choosing, it is enough that dots further right are also further up."
    )
    return Picture("selection", "Selection of tasks: estimated and true losses", caption, figure)


def _name_subsets(axis, subsets: list[dict]) -> None:
    for subset in subsets:
        axis.annotate(
            "+".join(subset["tasks"]),
            (subset["estimated"], subset["true"]),
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=7,
            color="#52606d",
            parse_math=False,
        )


# --------------------------------------------------------------------------------------- style


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tasks(records: Sequence[Record]) -> list[str]:
    """Of all records, in the order they first occur."""
    return list(dict.fromkeys(task for record in records for task in record.tasks))


def _curve(axis, steps, values, shade: str, label: str) -> None:
    """Faint dots and their running mean; nothing of a run that has no such values."""
    if not len(values):
        return
    axis.plot(steps, values, ".", color=shade, alpha=0.35, ms=4)
    axis.plot(steps, _smooth(values), color=shade, lw=1.8, label=label)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """The mean of a tenth of the values around each, fewer at the ends."""
    reach = len(values) // 20
    padded = np.convolve(values, np.ones(2 * reach + 1), mode="same")
    counts = np.convolve(np.ones(len(values)), np.ones(2 * reach + 1), mode="same")
    return padded / counts


def _named(axis, tasks: Sequence[str]) -> None:
    many = {"rotation": 30, "ha": "right"} if len(tasks) > 5 else {}
    axis.set_xticks(np.arange(len(tasks)), tasks, parse_math=False, **many)


def _steps(axes) -> None:
    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb")
    axis.set_axisbelow(True)
