"""The text of `bench/RESULTS.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.common import LINE_HEADER, TIME_HEADER, Line, quartiles, round_ratios, time_rows
from bench.report.comparing import SUMMARY_HEADER, bound_ratio, extremes, summary
from bench.report.reading import COMMANDS, ELSEWHERE, TOPICS, Other, Table


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
