"""Ours against the fastest other implementation that is right, table by table and in sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.reading import TOPICS, Table

# ratios of medians closer to 1 than this are called even
EVEN = 0.05


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
