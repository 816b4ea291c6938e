"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.figure import Figure
from pandas import DataFrame, json_normalize

from .errors import UserError
from .report import NOTES, SCORES, Record, read_records, scored, story, subsets, summary, table

PAGE = "report.html"
TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; margin: 2rem max(1rem, 50% - 33rem); }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9rem; } tr { vertical-align: top; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb; }
img + table :is(th, td):not(:nth-child(1), :nth-child(3)) { text-align: right; }
.note { color: #52606d; font-size: 0.92rem; max-width: 52rem; }
</style>
<h1>{{ title }}</h1>
{% for text in texts %}<p>{{ text }}</p>{% endfor %}
{% for section, image in sections %}<h2>{{ section.name|capitalize }}</h2>
{% if image %}<img alt="{{ section.name }}" src="data:image/png;base64,{{ image }}">{% endif %}
<table>{% for row in section.table %}<tr>{% set cell = "th" if loop.first else "td" %}
{% for text in row %}<{{ cell }}>{{ text }}</{{ cell }}>{% endfor %}</tr>{% endfor %}</table>
<p class="note">{{ section.caption }}</p>{% endfor %}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a picture, a table or both, and what is said of them."""

    name: str
    caption: str
    table: Sequence[Sequence[Any]] = ()  # the header first
    figure: Any = None

    def save(self, folder: Path) -> str:
        """Write the picture as PNG; the same in base64, as a page has it."""
        file = folder / f"{self.name}.png"
        with warnings.catch_warnings():
            # a task's name in a script that the font lacks is drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            self.figure.savefig(file, dpi=130)
        return base64.b64encode(file.read_bytes()).decode()


def report(runs: Sequence[str], output: str | None = None) -> None:
    """Write report.html and its pictures for the runs in some folders."""
    records = read_records(runs)
    folder = Path(output or Path(runs[0]) / "report")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).exists():
        raise UserError(f"{folder} exists and holds no report; give another --output")
    told = {r.name: r.description.get("versions", {}) | r.description["given"] for r in records}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = "segloss: " + ", ".join(record.name for record in records)
        write_page(folder, title, map(story, records), [*pictures(records), settings(told)])
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if any(record.results for record in records):
        print(summary(records), end="\n\n")
    print(folder / PAGE)


def write_page(folder: Path, title: str, texts: Iterable[str], sections: list[Section]) -> None:
    """The template filled in, and the sections' pictures beside it."""
    saved = [(section, section.figure and section.save(folder)) for section in sections]
    template = Environment(autoescape=True, finalize=shown).from_string(TEMPLATE)
    text = template.render(title=title, texts=texts, sections=saved)
    (folder / PAGE).write_text(text, encoding="utf-8")


def settings(given: dict[str, dict[str, Any]]) -> Section:
    """What each run or variant was told, side by side."""
    names = sorted({name for options in given.values() for name in options})
    rows = [[name, *(options.get(name) for options in given.values())] for name in names]
    return Section("settings", "What is not listed had its default.", [["setting", *given], *rows])


def shown(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value


# Okabe and Ito: told apart with any colour vision
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
GREY, DARK = "#9aa5b1", "#52606d"
STYLE = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": "medium", "axes.ymargin": 0.08, "grid.color": "#e5e7eb",
    "legend.fontsize": 9, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


@matplotlib.rc_context(STYLE)
def pictures(records: Sequence[Record]) -> list[Section]:
    """Every picture that the records have data for."""
    return [section for draw in (results, training, selection) if (section := draw(records))]


def panels_of(height: float, count: int, **options: Any) -> tuple[Figure, Any]:
    """(figure, array of so many axes in it, each so high, up to four side by side)."""
    rows = -(-count // 4)
    figure = Figure(figsize=(11.0, height * rows), layout="constrained")
    axes = figure.subplots(rows, min(4, count), squeeze=False, **options).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def results(records: Sequence[Record]) -> Section | None:
    """One panel per score: a row per task, in it a dot with its interval per run and guess."""
    lines, names = scored(records)
    if not names:
        return None
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure, panels = panels_of(1.2 + 0.3 * (len(lines) + len(tasks)), len(names), sharey=True)
    places = [-i - 0.6 * tasks.index(line["task"]) for i, line in enumerate(lines)]
    for name, axis in zip(names, panels, strict=True):
        title, scale, form = SCORES[name]
        axis.set(title=title, xmargin=0.16)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        for place, line in zip(places, lines, strict=True):
            if name in line:
                value, *interval = (scale * number for number in line[name])
                shade = COLORS[line["run"] % len(COLORS)] if "run" in line else GREY
                axis.plot(interval, [place] * len(interval), color=shade, lw=2)
                axis.plot(value, place, "o" if interval else "D", color=shade)
                note(axis, form.format(value), value, place)
    panels[0].set_yticks(places, [f"{line['task']}: {line['label']}" for line in lines])
    caption = f"{NOTES} Grey: before training, guesses. Only what is better than both is learnt."
    return Section("results", caption, table(records), figure)


def training(records: Sequence[Record]) -> Section | None:
    """What is logged of the training batches, and by CoBa of the tasks."""
    titles = {
        "loss": "training loss, as weighted", "nll": "cross-entropy (nats per token)",
        "mean_token_accuracy": "token accuracy", "entropy": "entropy (nats)",
        "effective_sample_size": "effective sample size", "task_weight": "weights of the tasks",
        "validation_loss": "validation loss of the tasks",
    }  # fmt: skip
    curves: dict[str, list[tuple[str, str, Any]]] = {}
    for record in [record for record in records if record.metrics]:
        metrics = json_normalize(record.metrics, sep="\n").set_index("step")
        for column, series in metrics.astype(float).items():
            name, _, part = column.partition("\n")
            curves.setdefault(name, []).append((record.name, part, series.dropna()))
    names = [name for name in titles if name in curves]
    if not names:
        return None
    figure, grid = panels_of(3.4, len(names))
    for name, axis in zip(names, grid, strict=True):
        for index, (run, part, series) in enumerate(curves[name]):
            label = part if len(records) == 1 else f"{run}: {part}"
            shade = COLORS[index % len(COLORS)]
            axis.plot(series, ".", color=shade, alpha=0.35, ms=4)
            around = series.rolling(2 * (len(series) // 20) + 1, center=True, min_periods=1)
            axis.plot(around.mean(), color=shade, lw=1.8, label=label if part else run)
        axis.set(title=titles[name], xlabel="step")
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        if part:
            axis.legend()
    if len(records) > 1:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "The training batches: the loss with all weights in it (runs with other losses or weights "
        "cannot be compared there), and what can be compared. Dots are lines of the log. Effective "
        "sample size: 1 / sum of squared sample weights, that of the batch if all weigh the same. "
        "CoBa's weights rise where a task's validation loss, of few items each step, falls more "
        "slowly than the others', and fall where it has begun to rise."
    )
    return Section("training", caption, figure=figure)


def selection(records: Sequence[Record]) -> Section | None:
    """Every subset's loss, best first; where subsets were checked, beside the true one."""
    records = [record for record in records if record.selection.get("subsets")]
    if not records:
        return None
    table = [row for record in records for row in subsets(record.selection, record.name)]
    figure, (axis,) = panels_of(4.4, 1)
    for index, record in enumerate(records):
        found = DataFrame(record.selection["subsets"], columns=["tasks", "estimated", "true"])
        found = found.sort_values("estimated", ignore_index=True)
        found.index += 1
        true, shade = found.dropna(subset="true"), COLORS[index % len(COLORS)]
        axis.plot(found.estimated, "o", ms=4, color=shade, label=f"{record.name}: estimated")
        if len(true):
            axis.plot(true.true, "D", mfc="none", color=shade, label=f"{record.name}: trained on")
        for i, subset in true.iterrows() if len(true) <= 12 else ():
            note(axis, "+".join(subset.tasks), i, subset.true)
    axis.set(xlabel="subset of tasks, best estimate first", ylabel="loss (nats per token)")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.legend()
    caption = (
        "Each dot is a subset of tasks, with the loss that gradients predict for a model trained "
        "on it; each diamond one that a model was really trained on. For choosing, it is enough "
        "that diamonds further right are further up."
    )
    return Section("selection", caption, table, figure)


def note(axis: Any, text: str, x: float, y: float, **options: Any) -> None:
    """A number or name above a dot."""
    options |= {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(text, (x, y), **options)
