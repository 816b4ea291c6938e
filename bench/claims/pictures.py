"""The pictures beside `bench/CLAIMS.md`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.claims import coba, gradex, irdro, losses, own, smollm2
from bench.claims.cells import Store, slug
from bench.claims.findings import (
    RIVALS,
    choice_scores,
    gradex_cell,
    loss_gain,
    own_gain,
    weighting_gain,
)
from bench.claims.verdicts import Compared
from bench.report.drawing import plain_log

COLORS = {"better": "tab:green", "worse": "tab:red"}


def draw(store: Store, folder: Path) -> dict[str, str]:
    """PNG files of the kinds that have cells: kind -> path from the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    style = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120}
    with plt.rc_context(style):
        for kind, picture in PICTURES.items():
            figure = picture(plt, store)
            if figure is None:
                continue
            name = f"claims-{kind}.png"
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
            drawn[kind] = f"{folder.name}/{name}"
    return drawn


def forest(axes, gains: list[Compared | None], names: list[str], unit: float = 100) -> None:
    """A row for each gain: its mean, its interval, the margin; coloured where it excludes 0."""
    if not any(gains):
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
        axes.grid(False)
        return
    for row, found in enumerate(gains):
        if found is None:
            continue
        gain = found.gain
        color = COLORS.get(found.outcome, "tab:gray")
        axes.plot([unit * gain.low, unit * gain.high], [row, row], color=color, linewidth=1.5)
        axes.plot(unit * gain.mean, row, "o", color=color, markersize=4)
    margin = next((found.margin for found in gains if found is not None), 0.0)
    axes.axvline(0, color="black", linewidth=1)
    axes.axvspan(-unit * margin, unit * margin, color="tab:gray", alpha=0.15, linewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def of_losses(plt, store: Store):
    names = [*losses.CLAIMED]
    names += [n for n in losses.LOSSES + losses.SUMS if n not in names and n != "ce"]
    table = {task: [loss_gain(store, task, name) for name in names] for task in losses.TASKS}
    table = {task: gains for task, gains in table.items() if any(gains)}
    kept = [i for i in range(len(names)) if any(gains[i] for gains in table.values())]
    if not kept:
        return None
    figure, grid = plt.subplots(
        1, len(table), figsize=(3 * len(table), 1.2 + 0.24 * len(kept)), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, (task, gains) in zip(grid[0], table.items(), strict=True):
        forest(axes, [gains[i] for i in kept], [slug(names[i]) for i in kept])
        axes.set_title(task)
        axes.set_xlabel("exact match less ce's, points")
    return figure


def of_smollm2(plt, store: Store):
    names = smollm2.LOSSES[1:]
    gains = [loss_gain(store, "smollm2", name) for name in names]
    if not any(gains):
        return None
    figure, axes = plt.subplots(figsize=(6, 1.6), layout="constrained")
    forest(axes, gains, list(names))
    axes.set_xlabel("exact match less ce's, points")
    return figure


def of_coba(plt, store: Store):
    """Validation losses of each task by step, mean over the seeds."""
    mixes = [m for m in coba.MIXES if any(f"coba/{m}/{w}" in store for w in coba.WEIGHTS)]
    if not mixes:
        return None
    figure, grid = plt.subplots(
        len(mixes), len(coba.NAMES), figsize=(12, 2.8 * len(mixes)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, mix in zip(grid, mixes, strict=True):
        for number, weights in enumerate(coba.WEIGHTS):
            result = store.find(f"coba/{mix}/{weights}")
            if result is None:
                continue
            curves = np.mean([run["curve"] for run in result["runs"]], 0)
            steps = coba.EVERY * np.arange(1, len(curves) + 1)
            for axes, curve in zip(row, curves.T, strict=True):
                axes.plot(steps, curve, color=f"C{number}", label=weights, linewidth=1.2)
                axes.plot(steps[curve.argmin()], curve.min(), "o", color=f"C{number}", markersize=4)
        for axes, name in zip(row, coba.NAMES, strict=True):
            axes.set_title(f"{mix}: {name}")
            axes.set_yscale("log")
            plain_log(axes.yaxis)
            axes.set_xlabel("step")
        row[0].set_ylabel("validation loss, nats")
    grid[0][-1].legend(fontsize=7)
    return figure


def of_gradex(plt, store: Store):
    """Estimates against retrained subsets, and the choice against its rivals."""
    lengths = [steps for steps in gradex.LENGTHS if gradex_cell(steps) in store]
    if not lengths:
        return None
    figure, grid = plt.subplots(
        1, len(lengths) + 1, figsize=(3.2 * (len(lengths) + 1), 3.2), layout="constrained"
    )
    for axes, steps in zip(grid, lengths, strict=False):
        for number, seed in enumerate(store[gradex_cell(steps)]["seeds"]):
            axes.plot(seed["true"], seed["estimated"], ".", color=f"C{number}", alpha=0.7)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="black", linewidth=1)
        axes.set_title(f"{steps} steps")
        axes.set_xlabel("loss after retraining")
    grid[0].set_ylabel("estimated loss (colours: seeds)")
    for number, name in enumerate(("chosen", *RIVALS)):
        found = [choice_scores(store[gradex_cell(s)], name).nll.mean(1) for s in lengths]
        for place, values in enumerate(found):
            grid[-1].plot(
                [place + 0.12 * (number - 1.5)] * len(values), values, "o", markersize=4,
                color=f"C{number}", label=name if place == 0 else None,
            )  # fmt: skip
    grid[-1].set_xticks(range(len(lengths)), [f"{s} steps" for s in lengths])
    grid[-1].set_title("nll of the sums to test (dots: seeds)")
    grid[-1].legend(fontsize=7)
    return figure


def of_weights(plt, store: Store):
    names = [name for name in irdro.VARIANTS if name != "none"]
    table = {
        (setting, kind): [weighting_gain(store, setting, kind, name) for name in names]
        for setting in irdro.SETTINGS
        for kind in irdro.DATA
    }
    kept = [i for i in range(len(names)) if any(gains[i] for gains in table.values())]
    if not kept:
        return None
    figure, grid = plt.subplots(
        len(irdro.SETTINGS), len(irdro.DATA), sharey=True, squeeze=False,
        figsize=(12, len(irdro.SETTINGS) * (1.1 + 0.22 * len(kept))), layout="constrained",
    )  # fmt: skip
    for axes, ((setting, kind), gains) in zip(grid.flat, table.items(), strict=True):
        text = setting == "text"
        forest(axes, [gains[i] for i in kept], [names[i] for i in kept], 1 if text else 100)
        axes.set_title(f"{setting}: {kind}")
        axes.set_xlabel("gain over no weights, " + ("nats" if text else "points"))
    return figure


def of_own(plt, store: Store):
    names = [name for name in own.VARIANTS if name != "float32"]
    gains = [own_gain(store, name) for name in names]
    if not any(gains):
        return None
    figure, axes = plt.subplots(figsize=(6, 1.6), layout="constrained")
    forest(axes, gains, names, 1)
    axes.set_xlabel("gain over float32 without a filter, nats (gray: within the margin)")
    return figure


PICTURES = {
    "losses": of_losses, "coba": of_coba, "gradex": of_gradex, "irdro": of_weights, "own": of_own,
    "smollm2": of_smollm2,
}  # fmt: skip
