"""The pictures of `segloss report`: each draws some records, or returns None without their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .report import SCORES, WEIGHT_EDGES, Record, entries, scored

# Okabe and Ito: told apart with any colour vision
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
GREY, DARK = "#9aa5b1", "#52606d"
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
        training,
        task_weights,
        sample_weights,
        selection,
    ]
    drawn = [function(records) for function in draw]
    return [picture for picture in drawn if picture is not None]


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def results(records: Sequence[Record]) -> Picture | None:
    """One panel per score: a row per task, in it a dot with its interval per run and guess."""
    tasks = scored(records)
    blocks = {task: entries(records, task) for task in tasks}
    names = [n for n in SCORES if any(n in s for block in blocks.values() for _, s in block)]
    if not names:
        return None
    labels = list(dict.fromkeys(label for block in blocks.values() for label, _ in block))
    trained = [label for label in labels if is_trained(label)]
    rows = sum(map(len, blocks.values())) + len(tasks)
    figure = new_figure(1.2 + 0.3 * rows)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    places: list[tuple[float, str]] = []
    place = 0.0
    for task, block in blocks.items():
        for label, scores in block:
            shade = color(trained.index(label)) if label in trained else GREY
            for name, axis in zip(names, panels, strict=True):
                draw_score(axis, place, scores.get(name), name, shade)
            places.append((place, f"{task}: {label}" if len(tasks) > 1 else label))
            place -= 1
        place -= 0.6
    for name, axis in zip(names, panels, strict=True):
        axis.set_title(SCORES[name][0])
        axis.margins(x=0.16, y=0.08)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", color="#e5e7eb")
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks([p for p, _ in places], [text for _, text in places], parse_math=False)
    caption = (
        "Held-out items, which no run trained on, with 95 % intervals over them. Grey: before, and "
        "what guessing scores; only what is better than both has been learnt."
    )
    return Picture("results", "Results on held-out items", caption, figure)


def is_trained(label: str) -> bool:
    return label not in ("majority answer", "chance") and not label.endswith("before training")


def draw_score(axis: Any, place: float, score: Any, name: str, shade: str) -> None:
    if score is None:
        return
    _, scale, form = SCORES[name]
    value, *interval = (scale * number for number in score)
    if interval:
        axis.plot(interval, [place, place], color=shade, lw=2)
    axis.plot([value], [place], "o" if interval else "D", color=shade, ms=7 if interval else 5)
    axis.annotate(
        form.format(value), (value, place), xytext=(0, 6), textcoords="offset points",
        ha="center", fontsize=8, color=DARK,
    )  # fmt: skip


def training(records: Sequence[Record]) -> Picture | None:
    """The training objective, cross-entropy, token accuracy and entropy, as far as logged."""
    series = {
        "loss": "training loss, as weighted",
        "nll": "cross-entropy (nats per token)",
        "mean_token_accuracy": "token accuracy",
        "entropy": "entropy (nats)",
    }
    names = [name for name in series if any(record.has(name) for record in records)]
    if not names:
        return None
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axis in zip(names, panels, strict=True):
        for index, record in enumerate(records):
            curve(axis, *record.series(name), color(index), record.name)
        axis.set_title(series[name])
        plain(axis)
    legend(figure, panels[0])
    on_steps(panels)
    caption = (
        "The training batches: the loss with all weights in it (runs with other losses or weights "
        "cannot be compared there), and what can be compared. Dots are lines of the log."
    )
    return Picture("training", "Training", caption, figure)


def task_weights(records: Sequence[Record]) -> Picture | None:
    """CoBa's weights over the steps, above the validation losses that they follow."""
    records = [record for record in records if record.has("task_weight")]
    if not records:
        return None
    figure = new_figure(5.4)
    grid = figure.subplots(3, len(records), height_ratios=[3, 2, 1], sharex="col", squeeze=False)
    for column, record in enumerate(records):
        weights, losses, share = grid[:, column]
        for index, task in enumerate(record.tasks):
            weights.plot(*record.series("task_weight", task), color=color(index), label=task)
            losses.plot(*record.series("validation_loss", task), color=color(index))
        share.plot(*record.series("divergence_factor"), color="black", lw=1.2)
        share.set_ylim(-0.05, 1.05)
        weights.axhline(1 / len(record.tasks), color=GREY, ls=":", lw=1.2)
        weights.set_title(record.name, parse_math=False)
        names = weights.get_legend_handles_labels()
        share.legend(*names, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.6))
        for axis in (weights, losses):
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        for axis in (weights, losses, share):
            axis.margins(x=0.01)
            plain(axis)
    grid[0, 0].set_ylabel("weight in the loss")
    grid[1, 0].set_ylabel("validation loss")
    grid[2, 0].set_ylabel("relative\nscore")
    on_steps(grid[2])
    caption = (
        "How much CoBa lets each task count at each step (dotted: all alike). The relative score "
        "raises the tasks whose validation loss, measured on few items each step, falls more "
        "slowly than the others'; the absolute score lowers those whose own loss has begun to "
        "rise. Below: the share of the relative score, 1 at first."
    )
    return Picture("task-weights", "Task weights (CoBa)", caption, figure)


def sample_weights(records: Sequence[Record]) -> Picture | None:
    """The histogram of all sample weights, and how many examples are left of a batch."""
    records = [record for record in records if record.has("sample_weight_counts")]
    if not records:
        return None
    figure = new_figure(3.8)
    histogram, effective = figure.subplots(1, 2)
    edges = [WEIGHT_EDGES[0] / 2**0.5, *WEIGHT_EDGES, WEIGHT_EDGES[-1] * 2**0.5]
    for index, record in enumerate(records):
        rows = [row for row in record.metrics if "sample_weight_counts" in row]
        counts = np.sum([row["sample_weight_counts"] for row in rows], axis=0)
        label = f"{record.name} ({record.given.get('sample_weights', '')})"
        share = 100 * counts / counts.sum()
        histogram.stairs(
            share, edges, fill=len(records) == 1, color=color(index), lw=1.8, label=label
        )
        batch = rows[0]["samples"]
        series = record.series("effective_sample_size")
        curve(effective, *series, color(index), f"of {batch}: {label}")
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
        plain(axis)
    on_steps([effective])
    caption = (
        "Left: the weights of all examples of all steps; at the black line an example counts as "
        "without weighting. Right: 1 / sum of squared weights, which is the size of the batch "
        "(dotted) if all weigh the same and 1 if a single example has all the weight."
    )
    return Picture("sample-weights", "Sample weights", caption, figure)


def selection(records: Sequence[Record]) -> Picture | None:
    """Every subset's loss, best first; where subsets were checked, against the true one."""
    records = [record for record in records if record.selection.get("subsets")]
    if not records:
        return None
    checked = [r for r in records if any(s.get("true") is not None for s in r.selection["subsets"])]
    figure = new_figure(4.4, WIDTH if checked else 6.4)
    panels = figure.subplots(1, 1 + bool(checked), squeeze=False)[0]
    for index, record in enumerate(records):
        values = sorted(subset["estimated"] for subset in record.selection["subsets"])
        places = range(1, len(values) + 1)
        panels[0].plot(places, values, "o", ms=4, color=color(index), label=record.name)
    panels[0].set_xlabel("subset of tasks, best first")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("estimated loss (nats per token)")
    if len(records) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    if checked:
        against_truth(panels[1], records)
    for axis in panels:
        plain(axis)
    caption = (
        "Each dot is a subset of tasks, with the loss that gradients predict for a model trained "
        "on it. Right: against the loss after really training on it; for choosing, it is enough "
        "that dots further right are further up."
    )
    return Picture("selection", "Selection of tasks: estimated and true losses", caption, figure)


def against_truth(axis: Any, records: Sequence[Record]) -> None:
    values: list[float] = []
    for index, record in enumerate(records):
        subsets = [s for s in record.selection["subsets"] if s.get("true") is not None]
        subsets.sort(key=lambda subset: subset["true"])
        chosen = set(record.selection.get("chosen", []))
        for number, subset in enumerate(subsets):
            place = subset["estimated"], subset["true"]
            values += place
            mark = {"ms": 9, "mec": "black"} if set(subset["tasks"]) == chosen else {"ms": 6}
            axis.plot(*place, "o", color=color(index), **mark)
            if len(subsets) <= 12:  # names on both sides in turn, so that neighbours stay apart
                side = {"xytext": (7, -3), "ha": "left"}
                if number % 2:
                    side = {"xytext": (-7, -3), "ha": "right"}
                axis.annotate(
                    "+".join(subset["tasks"]), place, textcoords="offset points", fontsize=7,
                    color=DARK, parse_math=False, **side,
                )  # fmt: skip
    low, high = min(values), max(values)
    margin = 0.25 * (high - low or 1.0)
    line = [low - margin, high + margin]
    axis.plot(line, line, color=GREY, ls=":", label="estimated = true")
    axis.plot([], [], "o", ms=9, mfc="none", mec="black", ls="", label="chosen")
    axis.set(xlim=line, ylim=line, xlabel="estimated loss", ylabel="loss after training on it")
    axis.legend(frameon=False, fontsize=9, loc="upper left")


# --------------------------------------------------------------------------------------- style


def new_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curve(axis: Any, steps: Any, values: Any, shade: str, label: str) -> None:
    """Faint dots and the mean of a tenth of the values around each; nothing without values."""
    if not len(values):
        return
    reach = np.ones(2 * (len(values) // 20) + 1)
    counts = np.convolve(np.ones(len(values)), reach, mode="same")
    axis.plot(steps, values, ".", color=shade, alpha=0.35, ms=4)
    smooth = np.convolve(values, reach, mode="same") / counts
    axis.plot(steps, smooth, color=shade, lw=1.8, label=label)


def on_steps(axes: Any) -> None:
    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb")
    axis.set_axisbelow(True)
