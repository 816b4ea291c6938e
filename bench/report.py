"""`bench/RESULTS.md` and its plots, from JSON files: `python -m bench.report FILE ...`.

Nothing is measured here. What no file holds is named as not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import (
    LINE_HEADER,
    TIME_HEADER,
    Line,
    Section,
    quartiles,
    round_ratios,
    time_rows,
)
from segloss.losses import LOSSES

# what begins so is a class of ours
OURS = tuple(loss.__name__ for loss in LOSSES.values())
# ratios of medians closer to 1 than this are called even
EVEN = 0.05

TOPICS = {
    "logits": (
        "Losses on logits",
        "Forward + backward of a loss on logits that exist. The bound is one pass over the bytes: "
        "the logits read once, their gradient written once.",
    ),
    "segmentation": (
        "Segmentation libraries",
        "The same value from libraries made for pictures, a token a pixel. A library whose result "
        "is not what its documentation describes is named as wrong and has no time.",
    ),
    "head": (
        "Losses on hidden states",
        "Forward + backward from hidden states and a head's weight; ours never stores the "
        "logits. The bound is the bare matrix products (three; two with a frozen head) and one "
        "pass over the logits' bytes.",
    ),
    "models": (
        "Heads of models by name",
        "As many tokens as a minute allows.",
    ),
    "directions": (
        "Forward and backward apart",
        "On hidden states our token losses make their gradients in forward, while the logits are "
        "there, so their backward is nearly free and only the sum of both compares.",
    ),
    "ignored": ("Ignored tokens", "Prompt-masked fine-tuning ignores most tokens."),
    "growth": (
        "Growth with N and V",
        "One axis at a time; the line is fitted to relative residuals. Dice and Lovász also look "
        "at every token for each class present, and more tokens hold more classes: that part "
        "grows faster than N.",
    ),
    "memory": (
        "Memory",
        "Peak of resident memory of one forward and backward in a process of its own, above the "
        "inputs and without the gradients.",
    ),
    "filter": (
        "grad_filter",
        "Error of the gradients, and time, on hidden states of a real model.",
    ),
    "candidates": (
        "Lovász's candidates during training",
        "Only background entries above their class's least foreground error carry gradient. How "
        "many there are decides what Lovász costs.",
    ),
    "gradex": (
        "GradEx",
        "Estimates of the loss after training on a subset of groups of sums, some of them noise, "
        "against that training. Estimates and retraining took their seconds for all subsets.",
    ),
}
# topic -> the command that measures it
COMMANDS = {
    **dict.fromkeys(("logits", "directions"), "python -m bench.core"),
    "segmentation": "python -m bench.segmentation",
    **dict.fromkeys(("head", "models", "ignored", "memory", "filter"), "python -m bench.head"),
    "growth": "python -m bench.growth",
    "candidates": "python -m bench.candidates",
    "gradex": "python -m bench.gradex",
}
# what other files hold: title of their tables -> the command that writes them
ELSEWHERE = {
    "kernels": ("Kernels without a GPU", "make kernels"),
    "gpu": ("On a GPU", "make gpu"),
}


# --------------------------------------------------------------------------------------- reading


@dataclass
class Table(Section):
    """A section of a file, and the machine it was measured on."""

    machine: dict = field(default_factory=dict)
    quick: bool = False

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


@dataclass
class Other:
    """A file with ready tables: {"kind", "machine", "tables": [{"title", "header", "rows"}]}."""

    kind: str
    machine: dict
    tables: list[dict]


def read(paths: Iterable[str]) -> tuple[list[Table], list[Other]]:
    tables, others = [], []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} cannot be read: {error}") from None
        if "sections" in content:
            quick = bool(content["options"].get("quick"))
            tables += [table_of(s, content["machine"], quick) for s in content["sections"]]
        elif "tables" in content:
            kind = content.get("kind", Path(path).stem)
            others.append(Other(kind, content.get("machine", {}), content["tables"]))
        else:
            raise SystemExit(f"{path} has neither sections nor tables: not a file of ours")
    return tables, others


def table_of(section: dict, machine: dict, quick: bool) -> Table:
    lines = [Line(**{k: v for k, v in line.items() if k != "verdict"}) for line in section["lines"]]
    return Table(**{**section, "lines": lines}, machine=machine, quick=quick)


# -------------------------------------------------------------------------------------- comparing


@dataclass
class Comparison:
    """Ours against the fastest other implementation of the same value that is right."""

    table: Table
    ours: str
    rival: str
    ratio: float
    to_bound: float | None

    @property
    def verdict(self) -> str:
        if self.ratio < 1 - EVEN:
            return "wins"
        return "loses" if self.ratio > 1 + EVEN else "even"


def comparisons(table: Table) -> list[Comparison]:
    """One for each of ours that was timed beside a right rival."""
    found = []
    for ours, rivals in table.rivals.items():
        timed = [name for name in rivals if name in table.seconds]
        if ours not in table.seconds or not timed:
            continue
        best = min(timed, key=table.median)
        ratio = table.median(ours) / table.median(best)
        found.append(Comparison(table, ours, best, ratio, bound_ratio(table, ours)))
    return found


def bound_ratio(table: Table, name: str) -> float | None:
    parts = table.bounds.get(name, [])
    if not parts or name not in table.seconds or any(p not in table.seconds for p in parts):
        return None
    return table.median(name) / sum(table.median(part) for part in parts)


def span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def level(table: Table) -> str:
    """Which topics hold both; the title has D where there are hidden states."""
    return ", hidden states" if ", D " in table.title else ", logits"


def place(table: Table) -> str:
    name = TOPICS[table.topic][0]
    return name + level(table) if table.topic in ("ignored", "directions") else name


def grouped(tables: Sequence[Table]) -> dict[tuple[str, str], list[Comparison]]:
    """(where, ours) -> a comparison of each table, in the topics' order."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for topic in TOPICS:
        for table in tables:
            if table.topic == topic != "directions":
                for found in comparisons(table):
                    groups.setdefault((place(table), found.ours), []).append(found)
    return groups


def summary(tables: Sequence[Table]) -> list[list[str]]:
    """A row for each of ours within a topic, over all tables of the topic."""
    rows = []
    for (where, ours), group in grouped(tables).items():
        bounds = [c.to_bound for c in group if c.to_bound]
        count = {v: sum(c.verdict == v for c in group) for v in ("wins", "even", "loses")}
        rivals = dict.fromkeys(c.rival for c in group)
        rows.append(
            [
                where,
                ours,
                ", ".join(rivals),
                span([c.ratio for c in group]),
                ", ".join(f"{verdict} {n}" for verdict, n in count.items() if n),
                span(bounds) if bounds else "-",
            ]
        )
    return rows + alone(tables)


def alone(tables: Sequence[Table]) -> list[list[str]]:
    """A row for each of ours that nobody else has, against the bound alone."""
    groups: dict[tuple[str, str], list[float]] = {}
    for table in tables:
        for name in table.bounds:
            ratio = bound_ratio(table, name)
            if ratio is not None and name not in table.rivals and not compared(tables, table, name):
                groups.setdefault((place(table), name), []).append(ratio)
    return [
        [where, ours, "none here", "-", "-", span(ratios)]
        for (where, ours), ratios in groups.items()
    ]


def compared(tables: Sequence[Table], table: Table, name: str) -> bool:
    """Whether another table of the topic has a rival of it."""
    return any(name in other.rivals for other in tables if other.topic == table.topic)


SUMMARY_HEADER = [
    "", "ours", "fastest right rival", "time, ours / rival", "of these cells", "time, ours / bound"
]  # fmt: skip


def extremes(tables: Sequence[Table]) -> list[str]:
    """The largest win and the largest loss in words."""
    found = [c for t in tables for c in comparisons(t) if t.topic not in ("directions",)]
    if not found:
        return []
    best, worst = min(found, key=lambda c: c.ratio), max(found, key=lambda c: c.ratio)
    text = [f"- Largest win: {sentence(best)}"] if best.ratio < 1 else []
    if worst.ratio > 1:
        text.append(f"- Largest loss: {sentence(worst)}")
    else:
        text.append(f"- No loss; the nearest to one: {sentence(worst)}")
    return text


def sentence(c: Comparison) -> str:
    return f"{c.ours} takes {c.ratio:.2g} x the time of {c.rival} ({c.table.title})."


# ---------------------------------------------------------------------------------------- writing


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)]) + "\n"


def machine_line(machine: dict) -> str:
    """What has to stand beside every figure of a CPU."""
    if "gpu" in machine:
        return f"Measured on {machine['gpu']}, {machine.get('date', 'no date')}."
    return (
        f"Measured on {machine.get('processor', '?')}, {machine.get('cores', '?')} cores, "
        f"{machine.get('threads', '?')} threads; AMX: {machine.get('AMX', '?')}; "
        f"AVX-512: {machine.get('AVX-512', '?')}; torch {machine.get('torch', '?')}; "
        f"{machine.get('date', 'no date')}."
    )


def time_table(table: Table) -> str:
    """Every implementation: timed, wrong or not measured."""
    header = [*TIME_HEADER, "x bound"]
    rows = []
    for row in time_rows(table.seconds, table.errors):
        bound = bound_ratio(table, row[0])
        rows.append([*row, "-" if bound is None else f"{bound:.2f}"])
    rows += [[name, "WRONG", "", "", why, ""] for name, why in table.wrong.items()]
    rows += [[name, "not measured", "", "", why, ""] for name, why in table.missing.items()]
    return markdown(header, rows)


def ratio_table(table: Table) -> str:
    """Ours over each rival, with the quartiles of the ratios within a round."""
    rows = []
    for ours, rivals in table.rivals.items():
        for rival in rivals:
            if ours in table.seconds and rival in table.seconds:
                rounds = round_ratios(table.seconds[ours], table.seconds[rival])
                low, _, high = quartiles(rounds)
                ratio = table.median(ours) / table.median(rival)
                rows.append([ours, rival, f"{ratio:.3g}", f"{low:.3g} to {high:.3g}"])
    header = ["ours", "rival", "ours / rival", "quartiles"]
    return markdown(header, rows) + "\n" if rows else ""


def targets(tables: Sequence[Table]) -> list[tuple[Table, Line]]:
    return [(table, line) for table in tables for line in table.lines if line.limit is not None]


def target_table(found: Sequence[tuple[Table, Line]]) -> str:
    rows = [[table.title, *line.cells()] for table, line in found]
    return markdown(["where", *LINE_HEADER], rows)


def topic_text(topic: str, tables: Sequence[Table], plots: dict[str, str]) -> str:
    title, about = TOPICS[topic]
    text = [f"## {title}\n", f"{about}\n"]
    tables = [table for table in tables if table.topic == topic]
    if not tables:
        return "\n".join([*text, f"Not measured: `{COMMANDS[topic]}` measures it.\n"])
    if topic in plots:
        text.append(f"![{title}]({plots[topic]})\n")
    machine = None
    for table in tables:
        text.append(f"### {table.title}\n")
        if machine_line(table.machine) != machine:
            machine = machine_line(table.machine)
            text.append(f"{machine}\n")
        text += [f"- {name}: {fact}" for name, fact in table.facts.items()]
        text.append("")
        if topic == "growth":
            text.append(growth_table(table))
        elif topic == "gradex":
            text.append(subset_table(table))
        elif table.seconds or table.wrong or table.missing:
            text.append(time_table(table))
            text.append(ratio_table(table))
        notes = {n: note for n, note in table.data.get("notes", {}).items() if note}
        text += [f"- {name}: {note}" for name, note in notes.items() if name in table.seconds]
        if table.lines:
            text.append("\n" + markdown(LINE_HEADER, [line.cells() for line in table.lines]))
        if topic == "candidates":
            text.append(candidate_table(table))
    return "\n".join(text)


def growth_table(table: Table) -> str:
    """ms of each implementation by size; the fits are facts of the table."""
    points = table.data["points"]
    sizes = sorted({cell[0] for cells in points.values() for cell in cells})
    rows = []
    letter = table.data["axis"]
    for name, cells in points.items():
        known = {size: f"{1e3 * median:.4g}" for size, _, median, _ in cells}
        rows.append([name, *(known.get(size, "not run") for size in sizes)])
    text = markdown([f"median ms at {letter} =", *map(str, sizes)], rows)
    for kind, reasons in (("WRONG", table.wrong), ("Not run", table.missing)):
        text += "".join(f"\n- {kind}: {name}: {why}" for name, why in reasons.items())
    return text + "\n"


def candidate_table(table: Table) -> str:
    data = table.data
    steps = len(data["tokens"])
    rows = []
    for step in sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1}):
        share = data["candidates"][step] / (data["tokens"][step] * data["classes"][step])
        rows.append(
            [
                step + 1,
                f"{data['tokens'][step]:.0f}",
                f"{data['classes'][step]:.0f}",
                f"{data['candidates'][step] / data['tokens'][step]:.2f}",
                f"{share:.2%}",
                f"{data['p'][step]:.2f}",
                f"{data['saturated'][step]:.1%}",
            ]
        )
    header = [
        "step", "tokens", "classes present", "candidates a token", "share of the N x K panel",
        "mean p of the target", "tokens with p = 1",
    ]  # fmt: skip
    return markdown(header, rows)


def subset_table(table: Table) -> str:
    """What each part took, then estimated beside true losses, the best first."""
    data = table.data
    text = "".join(f"- {name}: {table.median(name):.3g} s\n" for name in table.seconds)
    every = zip(data["true"], data["estimated"], data["subsets"], strict=True)
    rows = [[f"{e:.4f}", f"{t:.4f}", " ".join(subset)] for t, e, subset in sorted(every)]
    return f"{text}\n{markdown(['estimated', 'after training on it', 'subset'], rows)}"


def results(tables: list[Table], others: list[Other], plots: dict[str, str]) -> str:
    found = targets(tables)
    count = {v: sum(line.verdict == v for _, line in found) for v in ("pass", "MISS")}
    unmeasured = len(found) - sum(count.values())
    wrong = [(t, name, why) for t in tables for name, why in t.wrong.items()]
    text = ["# Results\n"]
    text.append(
        "Made by `make results` from JSON files; not to be edited by hand. Times are medians of "
        "interleaved rounds in one process; a ratio below 1 means ours is faster. A row has a time "
        "only if that implementation's value and gradients agreed with float64 beforehand.\n"
    )
    if any(table.quick for table in tables):
        text.append("**From a `--quick` run: small sizes; the limits mean nothing here.**\n")
    text += ["## Where this package wins, and where it loses\n"]
    for machine in dict.fromkeys(machine_line(t.machine).rsplit("; ", 1)[0] for t in tables):
        text.append(f"{machine}.\n")
    text.append(markdown(SUMMARY_HEADER, summary(tables)))
    text += extremes(tables)
    text += memory_sentences(tables)
    text += growth_sentences(tables)
    for table in tables:
        if table.topic == "gradex":
            figures = "; ".join(f"{line.what} {line.value:.3g}" for line in table.lines)
            text.append(f"- GradEx, {table.title}: {figures}.")
    text.append(
        f"- Targets: {count['pass']} passed, {count['MISS']} missed"
        + (f", {unmeasured} not measured" if unmeasured else "")
        + (", all listed [below](#targets)." if found else ".")
    )
    if wrong:
        text.append("- Wrong results: " + "; ".join(f"{n} ({t.title})" for t, n, _ in wrong) + ".")
    for kind, (title, command) in ELSEWHERE.items():
        if kind not in {other.kind for other in others}:
            text.append(f"- {title}: not measured here; `{command}` does it.")
    if "ratios" in plots:
        text.append(f"\n![Time of ours over the fastest right rival]({plots['ratios']})")
    text.append("\n## Targets\n")
    if not found:
        text.append("None was measured.\n")
    for verdict, title in (("MISS", "Missed"), ("not measured", "Not measured"), ("pass", "Met")):
        some = [pair for pair in found if pair[1].verdict == verdict]
        if some:
            text += [f"{title}:\n", target_table(some)]
    for topic in TOPICS:
        text.append(topic_text(topic, tables, plots))
    for kind, (title, command) in ELSEWHERE.items():
        text.append(f"## {title}\n")
        files = [other for other in others if other.kind == kind]
        if not files:
            text.append(f"Not measured: `{command}` measures it.\n")
        for other in files:
            text.append(f"{machine_line(other.machine)}\n")
            for table in other.tables:
                text += [f"### {table['title']}\n", markdown(table["header"], table["rows"])]
                text += [f"{note}\n" for note in table.get("notes", [])]
    text += ["## Machine\n", machines(tables)]
    return "\n".join(text)


def memory_sentences(tables: Sequence[Table]) -> list[str]:
    """The largest and the smallest of ours, in parts of eager's."""
    text = []
    for table in tables:
        if table.topic != "memory" or len(table.lines) < 2 or table.lines[0].limit is not None:
            continue
        eager = table.lines[0].value
        ours = [line for line in table.lines[1:] if line.limit is not None and line.value]
        if eager and ours:
            low, high = (f(line.value / eager for line in ours) for f in (min, max))
            share = f"{low:.1%}" if len(ours) == 1 else f"{low:.1%} to {high:.1%}"
            text.append(f"- Memory: ours takes {share} of eager's {eager:.0f} MiB ({table.title}).")
    return text


def growth_sentences(tables: Sequence[Table]) -> list[str]:
    """How far the cost along each axis is from a straight line."""
    text = []
    for table in tables:
        fits = table.data.get("fits") if table.topic == "growth" else None
        if fits:
            letter = table.data["axis"]
            each = ", ".join(
                f"{name} {fit['residual']:.0%} ({letter}^{fit['exponent']:.2f})"
                for name, fit in fits.items()
            )
            text.append(
                f"- Growth with {letter}, {table.data['level']}: largest distance from a straight "
                f"line, and the exponent of the best power: {each}."
            )
    return text


def machines(tables: Sequence[Table]) -> str:
    names = list(dict.fromkeys(name for table in tables for name in table.machine))
    different = list({json.dumps(t.machine, sort_keys=True): t.machine for t in tables}.values())
    rows = [
        [name, *dict.fromkeys(str(machine.get(name, "-")) for machine in different)]
        for name in names
        if name not in ("date", "load at start")
    ]
    for name in ("date", "load at start"):
        rows.append([name, "; ".join(dict.fromkeys(str(m.get(name, "-")) for m in different))])
    width = max(map(len, rows), default=2)
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    return markdown(["", *["value"] * (width - 1)], rows)


# ------------------------------------------------------------------------------------------ plots


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files of measurements")
    parser.add_argument("--output", default="bench/RESULTS.md", help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    tables, others = read(chosen.files)
    output = Path(chosen.output)
    plots = draw(tables, output.parent / "plots")
    output.write_text(results(tables, others, plots))
    print(f"{output}, and {len(plots)} plots in {output.parent / 'plots'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
