"""`segloss report`: runs as one web page that needs no other file, and as pictures."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame, json_normalize

from .errors import UserError
from .report import NOTES, SCORES, Record, read_records, scored, story, subsets, summary, table

PAGE = "report.html"
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb;
         vertical-align: top; }
.scores :is(th, td):not(:nth-child(1), :nth-child(3)) { text-align: right; }
figure { margin: 0; } img { max-width: 100%; }
figcaption, .note { color: #52606d; font-size: 0.92rem; max-width: 52rem; }
</style>
</head>
<body>
{% macro grid(header, rows, kind="") %}<table class="{{ kind }}">
{% for row in [header] + rows %}<tr>{% set cell = "th" if loop.first else "td" %}
{% for text in row %}<{{ cell }}>{{ text }}</{{ cell }}>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
<h1>{{ title }}</h1>
{% for text in stories %}<p>{{ text }}</p>
{% endfor %}
{% if results[1] %}<h2>In numbers</h2>
{{ grid(*results, kind="scores") }}
<p class="note">{{ notes }}</p>{% endif %}
{% for picture, image in pictures %}<h2>{{ picture.title }}</h2>
<figure><img alt="{{ picture.title }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% for record in chosen %}<h2>Chosen tasks of {{ record.name }}</h2>
<p>{{ record.selection.get("chosen", [])|join(", ") or "nothing" }}</p>
{{ grid(*subsets(record.selection)) }}
{% endfor %}
<h2>Settings</h2>
{{ grid(["setting"] + given|list, settings) }}
<p class="note">{{ where }} What is not listed had its default.</p>
</body>
</html>
"""


def report(runs: Sequence[str], output: str | None = None) -> None:
    """Write report.html and its pictures for the runs in some folders."""
    records = read_records(runs)
    folder = Path(output or Path(runs[0]) / "report")
    taken = os.path.lexists(folder) and not (folder / PAGE).exists()
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no report; give another --output")

    given = {record.name: record.given for record in records if record.given}
    about = next((record.description for record in records if record.given), {})
    versions = [f"{name} {version}" for name, version in about.get("versions", {}).items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(
            folder / PAGE,
            title="segloss: " + ", ".join(record.name for record in records),
            stories=map(story, records),
            results=table(records),
            notes=NOTES,
            pictures=[(picture, picture.save(folder)) for picture in pictures(records)],
            chosen=[record for record in records if record.selection],
            given=given,
            where=f"{', '.join(versions)}.",
        )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if table(records)[1]:
        print(summary(records), end="\n\n")
    print(folder / PAGE)


def write_page(path: Path, given: dict[str, dict[str, Any]], **parts: Any) -> None:
    """The template filled in; `given` are the settings of each run or variant."""
    names = sorted({name for options in given.values() for name in options})
    values = [[name, *(options.get(name) for options in given.values())] for name in names]
    rows = [list(map(shown, row)) for row in values]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    text = template.render(subsets=subsets, given=given, settings=rows, **parts)
    path.write_text(text, encoding="utf-8")


def shown(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value


# Okabe and Ito: told apart with any colour vision
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
GREY, DARK = "#9aa5b1", "#52606d"
STYLE = {
    "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlesize": "medium", "grid.color": "#e5e7eb",
    "legend.fontsize": 9, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure and what the page says around it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> str:
        """Write it as PNG; the same in base64, as a page has it."""
        file = folder / f"{self.name}.png"
        with warnings.catch_warnings():
            # a task's name in a script that the font lacks is drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            self.figure.savefig(file, dpi=130)
        return base64.b64encode(file.read_bytes()).decode()


def pictures(records: Sequence[Record]) -> list[Picture]:
    """Every picture that the records have data for."""
    with matplotlib.rc_context(STYLE):
        draw = (results, training, selection)
        return [picture for function in draw if (picture := function(records)) is not None]


def panels_of(height: float, columns: int, count: int, **options: Any) -> tuple[Figure, Any]:
    """(figure, array of so many axes in it)."""
    figure = Figure(figsize=(11.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, **options).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def results(records: Sequence[Record]) -> Picture | None:
    """One panel per score: a row per task, in it a dot with its interval per run and guess."""
    lines, names = scored(records)
    if not names:
        return None
    tasks = list(dict.fromkeys(line.task for line in lines))
    height, count = 1.2 + 0.3 * (len(lines) + len(tasks)), len(names)
    figure, panels = panels_of(height, count, count, sharey=True)
    places = [-i - 0.6 * tasks.index(line.task) for i, line in enumerate(lines)]
    for name, axis in zip(names, panels, strict=True):
        title, scale, form = SCORES[name]
        for place, line in zip(places, lines, strict=True):
            if name in line.scores:
                value, *interval = (scale * number for number in line.scores[name])
                shade = GREY if line.run is None else color(line.run)
                axis.plot(interval, [place] * len(interval), color=shade, lw=2)
                axis.plot(value, place, "o" if interval else "D", color=shade)
                note(axis, form.format(value), value, place)
        axis.set_title(title)
        axis.margins(x=0.16, y=0.08)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
    one = len(tasks) == 1
    panels[0].set_yticks(places, [x.label if one else f"{x.task}: {x.label}" for x in lines])
    caption = (
        "Held-out items, which no run trained on, with 95 % intervals over them. Grey: before, and "
        "what guessing scores; only what is better than both has been learnt."
    )
    return Picture("results", "Results on held-out items", caption, figure)


def training(records: Sequence[Record]) -> Picture | None:
    """What is logged of the training batches, and by CoBa of the tasks."""
    titles = {
        "loss": "training loss, as weighted",
        "nll": "cross-entropy (nats per token)",
        "mean_token_accuracy": "token accuracy",
        "entropy": "entropy (nats)",
        "effective_sample_size": "effective sample size",
        "task_weight": "weights of the tasks",
        "validation_loss": "validation loss of the tasks",
    }
    curves: dict[str, list[tuple[str, str, Any]]] = {}
    for record in [record for record in records if record.metrics]:
        metrics = json_normalize(record.metrics, sep="\n").set_index("step")
        for column in metrics:
            name, _, part = column.partition("\n")
            series = metrics[column].astype(float).dropna()
            curves.setdefault(name, []).append((record.name, part, series))
    names = [name for name in titles if name in curves]
    if not names:
        return None
    columns = min(4, len(names))
    figure, grid = panels_of(0.4 + 3.2 * -(-len(names) // columns), columns, len(names))
    for name, axis in zip(names, grid, strict=True):
        for index, (run, part, series) in enumerate(curves[name]):
            label = part if len(records) == 1 else f"{run}: {part}"
            axis.plot(series, ".", color=color(index), alpha=0.35, ms=4)
            around = series.rolling(2 * (len(series) // 20) + 1, center=True, min_periods=1)
            axis.plot(around.mean(), color=color(index), lw=1.8, label=label if part else run)
        axis.set(title=titles[name], xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if part:
            axis.legend()
    if len(records) > 1:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "The training batches: the loss with all weights in it (runs with other losses or weights "
        "cannot be compared there), and what can be compared. Dots are lines of the log. Effective "
        "sample size: 1 / sum of squared sample weights, the size of the batch if all weigh the "
        "same and 1 if a single example has all the weight. CoBa's weights rise where a task's "
        "validation loss, of few items each step, falls more slowly than the others' and fall "
        "where it has begun to rise."
    )
    return Picture("training", "Training", caption, figure)


def selection(records: Sequence[Record]) -> Picture | None:
    """Every subset's loss, best first; where subsets were checked, beside the true one."""
    records = [record for record in records if record.selection.get("subsets")]
    if not records:
        return None
    figure, (axis,) = panels_of(4.4, 1, 1)
    for index, record in enumerate(records):
        subsets = DataFrame(record.selection["subsets"], columns=["tasks", "estimated", "true"])
        subsets = subsets.sort_values("estimated", ignore_index=True)
        subsets.index += 1
        shade, name = color(index), record.name
        axis.plot(subsets.estimated, "o", ms=4, color=shade, label=f"{name}: estimated")
        true = subsets.dropna(subset="true")
        if len(true):
            label = f"{name}: after training on it"
            axis.plot(true.true, "D", mfc="none", color=shade, label=label)
        for i, subset in true.iterrows() if len(true) <= 12 else ():
            note(axis, "+".join(subset.tasks), i, subset.true)
    axis.set(xlabel="subset of tasks, best estimate first", ylabel="loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.margins(y=0.1)
    axis.legend()
    caption = (
        "Each dot is a subset of tasks, with the loss that gradients predict for a model trained "
        "on it; each diamond one that a model was really trained on. For choosing, it is enough "
        "that diamonds further right are further up."
    )
    return Picture("selection", "Selection of tasks: estimated and true losses", caption, figure)


def note(axis: Any, text: str, x: float, y: float, **options: Any) -> None:
    """A number or name above a dot."""
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(text, (x, y), xytext=(0, 7), **style, **options)


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]
