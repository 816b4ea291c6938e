"""A comparison as one picture, and as one web page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from segloss.train.page import COLORS, DARK, GREY, PAGE, STYLE, Section, note, panels_of, settings
from segloss.train.page import write_page as write
from segloss.train.report import SCORES

from .result import NOTES, Score, table

COLOR = {"better": COLORS[0], "worse": COLORS[1], "": GREY}


def write_page(
    folder: Path, scores: Sequence[Score], sentences: Sequence[str], given: dict[str, dict]
) -> Path:
    """Write both into the folder; the page's path."""
    seeds = len(next(score.by_seed for score in scores if score.by_seed))
    texts = [*sentences, f"Each variant was trained with {seeds} seeds."]
    told = {v: {k: x for k, x in of.items() if k != "seed"} for v, of in given.items()}
    title = f"segloss: {folder.resolve().name}"
    write(folder, title, texts, [differences(scores), settings(told)])
    return folder / PAGE


@rc_context(STYLE)
def differences(scores: Sequence[Score]) -> Section:
    """One panel per score: a row per task and variant, in it the difference with its interval."""
    found = [score for score in scores if score.difference is not None]
    names = [name for name in SCORES if any(score.name == name for score in found)]
    tasks = list(dict.fromkeys(score.task for score in found))
    rows: dict[tuple[str, str], float] = {}
    for score in found:
        key = (score.task, score.variant)
        rows.setdefault(key, -len(rows) - 0.6 * tasks.index(score.task))
    height = 1.2 + 0.5 * len(rows) + 0.3 * len(tasks)
    figure, panels = panels_of(height, len(names), sharey=True)
    for name, axis in zip(names, panels, strict=True):
        for score in found:
            if score.name == name:
                draw(axis, rows[score.task, score.variant], score)
        axis.axvline(0, color="black", lw=1, zorder=0)
        what, better = SCORES[name][0].replace("%", "points"), "less" if name == "nll" else "more"
        axis.set(title=f"{what}\n{better} is better", xmargin=0.12)
        axis.set_ylim(min(rows.values()) - 0.6, 0.7)
        axis.locator_params(axis="x", nbins=3)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    labels = [f"{t}: {v}" if len(tasks) > 1 else v for t, v in rows]
    panels[0].set_yticks(list(rows.values()), labels)
    caption = (
        f"Each variant less {found[0].first}, the line at 0, with 95 % intervals over seeds and "
        "items; below it each seed. Blue: better. Orange: worse. Grey: no difference found."
    )
    # a line ends before an interval, not in it
    cells = [
        [c.replace(" (", "\xa0(").replace(" to ", "\xa0to\xa0") for c in r] for r in table(scores)
    ]
    return Section("differences", f"{caption} {NOTES}", cells, figure)


def draw(axis: Any, place: float, score: Score) -> None:
    _, scale, form = SCORES[score.name]
    found, shade = score.difference, COLOR[score.verdict]
    assert found is not None
    seeds = [scale * value for value in score.by_seed]
    axis.plot(seeds, [place - 0.25] * len(seeds), "o", color=shade, ms=3, alpha=0.7, mew=0)
    axis.plot([scale * found.low, scale * found.high], [place, place], color=shade, lw=2)
    axis.plot([scale * found.mean], [place], "o", color=shade, ms=7)
    signed = form.replace("{:", "{:+").format(scale * found.mean)
    note(axis, signed, scale * found.mean, place, color=DARK, bbox={"color": "white", "pad": 0.5})
