"""The plots beside `bench/RESULTS.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench.report.comparing import grouped
from bench.report.reading import Table
from segloss.losses import LOSSES

# what begins so is a class of ours
OURS = tuple(loss.__name__ for loss in LOSSES.values())


def draw(tables: Sequence[Table], folder: Path) -> dict[str, str]:
    """PNG files of what there is to draw: name -> path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, plot in PLOTS.items():
        figure = plot(plt, tables)
        if figure is None:
            continue
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        plt.close(figure)
        drawn[name] = f"{folder.name}/{name}.png"
    return drawn


def plain_log(axis) -> None:
    """1, 2, 5, 10 ... in figures, or 1, 10 ... where those would run into each other."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def plot_ratios(plt, tables: Sequence[Table]):
    """One dot a cell: time of ours over the fastest right rival."""
    groups = grouped(tables)
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(groups)))
    colors = {"wins": "tab:green", "even": "tab:gray", "loses": "tab:red"}
    for row, group in enumerate(groups.values()):
        for found in group:
            axes.plot(found.ratio, row, "o", color=colors[found.verdict], alpha=0.7)
    axes.set_yticks(range(len(groups)), [f"{where}: {ours}" for where, ours in groups])
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of ours / time of the fastest right rival (left of 1: ours is faster)")
    return figure


def dots(axes, names: Sequence[str], values: Sequence[float], colors, unit: str) -> None:
    """A row each on a log axis: dots, since a bar would have to begin at 0."""
    axes.scatter(values, range(len(names)), c=colors, zorder=3)
    for row, value in enumerate(values):
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        axes.annotate(f"{text} {unit}", (value, row), (8, -3), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.3, -0.7)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.5, 3 * max(values))
    plain_log(axes.xaxis)


def stacked(plt, counts: Sequence[int]):
    """(figure, axes below each other, as tall as they have rows)."""
    figure, grid = plt.subplots(
        len(counts), 1, figsize=(8, sum(0.8 + 0.22 * n for n in counts)), squeeze=False,
        gridspec_kw={"height_ratios": [2.5 + n for n in counts]}, layout="constrained",
    )  # fmt: skip
    return figure, grid[:, 0]


def plot_head(plt, tables: Sequence[Table]):
    """Times of every implementation at every shape."""
    shown = [t for t in tables if t.topic == "head" and t.rivals]
    if not shown:
        return None
    figure, grid = stacked(plt, [len(t.seconds) for t in shown])
    for axes, table in zip(grid, shown, strict=True):
        rivals = {name for names in table.rivals.values() for name in names}
        names = sorted(table.seconds, key=table.median)
        bounds = {name for names in table.bounds.values() for name in names}
        colors = [
            "tab:gray" if n in bounds else "tab:orange" if n in rivals else "tab:blue"
            for n in names
        ]
        dots(axes, names, [table.median(name) for name in names], colors, "s")
        axes.set_title(table.title, fontsize=9)
    axes.set_xlabel("seconds, forward + backward (blue ours, orange others, gray bare operations)")
    return figure


def plot_growth(plt, tables: Sequence[Table]):
    shown = [t for t in tables if t.topic == "growth" and t.data["points"]]
    if not shown:
        return None
    rows = math.ceil(len(shown) / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(10, 4 * rows), squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, table in zip(grid.flat, shown, strict=False):
        for name, cells in table.data["points"].items():
            sizes, low, median, high = zip(*cells, strict=True)
            error = [
                [m - a for m, a in zip(median, low, strict=True)],
                [b - m for m, b in zip(median, high, strict=True)],
            ]
            mark = axes.errorbar(sizes, median, yerr=error, fmt="o", markersize=4, label=name)
            fit = table.data["fits"].get(name)
            if fit:
                line = [fit["start"] + fit["slope"] * size for size in sizes]
                axes.plot(sizes, line, color=mark[0].get_color(), linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        letter = table.data["axis"]
        axes.set_xlabel(f"{letter}, {'tokens' if letter == 'N' else 'classes'}")
        axes.set_ylabel("seconds, forward + backward")
        fixed = table.title.split("bfloat16, ")[-1]
        axes.set_title(f"{table.data['level']}, {fixed}; lines: linear fits", fontsize=9)
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def plot_memory(plt, tables: Sequence[Table]):
    shown = [t for t in tables if t.topic == "memory" and len(t.lines) > 1]
    if not shown:
        return None
    figure, grid = stacked(plt, [len(t.lines) for t in shown])
    for axes, table in zip(grid, shown, strict=True):
        lines = [line for line in table.lines if line.value is not None]
        colors = ["tab:blue" if line.what.startswith(OURS) else "tab:orange" for line in lines]
        # on a log axis nothing has no place
        values = [max(line.value, 1) for line in lines]
        dots(axes, [line.what for line in lines], values, colors, "MiB")
        limits = [line.limit for line in lines if line.limit is not None]
        if limits:
            axes.axvline(limits[0], color="tab:red", linewidth=1, label="limit: a tenth of eager")
            axes.legend(loc="lower right", fontsize=8)
        axes.set_title(table.title, fontsize=9)
    axes.set_xlabel("MiB above inputs and gradients (ours without the float32 sum of dweight)")
    return figure


def plot_candidates(plt, tables: Sequence[Table]):
    shown = [t for t in tables if t.topic == "candidates"]
    if not shown:
        return None
    data = shown[-1].data
    steps = range(1, len(data["tokens"]) + 1)
    per_token = [m / n for m, n in zip(data["candidates"], data["tokens"], strict=True)]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    top.plot(steps, per_token, ".-", label="candidates a token")
    top.plot(steps, data["classes"], color="tab:gray", label="classes present: a whole row")
    top.set_yscale("log")
    top.set_ylabel("entries a token")
    top.legend(fontsize=8)
    top.set_title(shown[-1].facts.get("run", ""), fontsize=8)
    bottom.plot(steps, data["p"], ".-", label="mean p of the target")
    bottom.plot(steps, data["saturated"], ".-", label="share of tokens with p = 1 in float32")
    bottom.set_ylim(-0.02, 1.02)
    bottom.set_xlabel("optimizer step")
    bottom.legend(fontsize=8)
    figure.tight_layout()
    return figure


def plot_gradex(plt, tables: Sequence[Table]):
    shown = [t for t in tables if t.topic == "gradex"]
    if not shown:
        return None
    data = shown[-1].data
    figure, axes = plt.subplots(figsize=(5.5, 5))
    span = [f(*data["estimated"], *data["true"]) for f in (min, max)]
    axes.plot(span, span, color="0.7", linewidth=1, label="estimated as it came out")
    axes.plot(data["true"], data["estimated"], "o", label="a subset")
    axes.set_xlabel("cross-entropy after training on the subset (nats per token)")
    axes.set_ylabel("estimated")
    axes.set_title(shown[-1].title, fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


PLOTS = {
    "ratios": plot_ratios,
    "head": plot_head,
    "growth": plot_growth,
    "memory": plot_memory,
    "candidates": plot_candidates,
    "gradex": plot_gradex,
}
