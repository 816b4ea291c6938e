"""How things are measured here: interleaved, checked against float64 first, judged by a limit."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from segloss.doctor import cpu_flags, environment

# on top of twice the error that plain PyTorch has in the same dtype
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def machine() -> dict:
    """What the figures depend on."""
    flags = sorted(f for f in cpu_flags() if f.startswith(("amx", "avx512")))
    model = [
        line.partition(":")[2].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return {
        **environment(),
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "AMX": " ".join(f for f in flags if f.startswith("amx")) or "no",
        "AVX-512": " ".join(f for f in flags if f.startswith("avx512")) or "no",
        "load at start": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# -------------------------------------------------------------------------------------- timing


def interleaved(runs: dict[str, Callable], rounds: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each run, `rounds[name]` of them: every round runs all that still have some left.

    What else the machine does then hits all of them alike; every other round goes backwards, since
    a run is slower after one that has just given its memory back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(max(rounds.values())):
            for name in list(runs) if turn % 2 == 0 else reversed(runs):
                if turn < rounds[name]:
                    start = time.perf_counter()
                    runs[name]()
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


@dataclass
class Line:
    """A figure against its limit; both in the same unit, `unit` "" for a ratio."""

    what: str
    value: float
    limit: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""
    verdict: str = field(init=False)

    def __post_init__(self):
        if self.limit is None:
            self.verdict = "-"
        else:
            self.verdict = "pass" if self.value <= self.limit else "MISS"

    def cells(self) -> list[str]:
        spread = "" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        limit = "-" if self.limit is None else f"{self.limit:.3g}{self.unit}"
        return [self.what, f"{self.value:.3g}{self.unit}", spread, limit, self.verdict, self.note]


LINE_HEADER = ["line", "value", "quartiles", "limit", "", "note"]


def ratio_line(
    what: str, seconds: dict, name: str, over: str, limit: float | None, note: str = ""
) -> Line:
    """Ratio of medians; its quartiles are those of the ratios within each round."""
    pairs = list(zip(seconds[name], seconds[over], strict=False))
    low, _, high = quartiles([a / b for a, b in pairs])
    value = statistics.median(seconds[name]) / statistics.median(seconds[over])
    return Line(what, value, limit, "", low, high, note)


def time_rows(seconds: dict[str, list[float]], notes: dict[str, str]) -> list[list[str]]:
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1e3 * q for q in quartiles(values))
        spread = f"{low:.4g} to {high:.4g}"
        rows.append([name, f"{middle:.4g}", spread, str(len(values)), notes.get(name, "")])
    return rows


TIME_HEADER = ["implementation", "median ms", "quartiles", "rounds", "error against float64"]


# ---------------------------------------------------------------------------------- correctness


class Wrong(Exception):
    """An implementation whose result is not the truth: its time means nothing."""


def relative_error(actual: Tensor, truth: Tensor) -> float:
    difference = (actual.double() - truth).norm()
    return 0.0 if difference == 0 else (difference / truth.norm()).item()


def check(
    actual: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor], tolerance: float
) -> str:
    """How far value and gradients are from float64, for the table; raises `Wrong` if too far.

    Allowed is twice the error that plain PyTorch makes on the same inputs, plus a tolerance.
    """
    errors = []
    for ours, exact, theirs in zip(actual, truth, plain, strict=True):
        error = relative_error(ours, exact)
        allowed = 2 * relative_error(theirs, exact) + tolerance
        if not error <= allowed:
            raise Wrong(f"relative error {error:.2e}, allowed {allowed:.2e}")
        errors.append(f"{error:.1e}")
    return " ".join(errors)


def value_and_grads(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """`[loss(*leaves), its gradients]`, detached; the leaves' own gradients are not touched."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# -------------------------------------------------------------------------------------- results


def show(header: list[str], rows: list[list[str]]) -> None:
    """A markdown table with its columns aligned."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for number, row in enumerate(table):
        cells = " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {cells} |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


class Report:
    """Prints sections as they are measured, and keeps them for the JSON file."""

    def __init__(self, title: str, options: argparse.Namespace):
        self.options = options
        self.sections: list[dict] = []
        self.wrong: list[str] = []
        self.machine = machine()
        print(f"# {title}\n")
        for name, value in self.machine.items():
            print(f"    {name:<14} {value}")
        if options.quick:
            print(
                "\n--quick: small sizes, to see that everything runs; the limits mean nothing here"
            )
        print(flush=True)

    def section(
        self, title: str, seconds: dict, errors: dict, lines: Sequence[Line], **facts
    ) -> None:
        print(f"## {title}\n")
        for name, value in facts.items():
            print(f"    {name:<14} {value}")
        if facts:
            print()
        if seconds:
            show(TIME_HEADER, time_rows(seconds, errors))
        if lines:
            show(LINE_HEADER, [line.cells() for line in lines])
        self.sections.append(
            {"title": title, **facts, "seconds": seconds, "errors": errors,
             "lines": [asdict(line) for line in lines]}
        )  # fmt: skip
        self.write()

    def found_wrong(self, name: str, error: Wrong) -> None:
        self.wrong.append(f"{name}: {error}")
        print(f"WRONG, not timed: {name}: {error}", flush=True)

    def write(self) -> None:
        """After every section: an interrupted run keeps what it has measured."""
        path = Path(self.options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": self.machine,
            "options": vars(self.options),
            "sections": self.sections,
            "wrong": self.wrong,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")

    def finish(self) -> int:
        lines = [line for section in self.sections for line in section["lines"]]
        count = {v: sum(line["verdict"] == v for line in lines) for v in ("pass", "MISS")}
        print(f"{count['pass']} lines passed, {count['MISS']} missed; {self.options.output}")
        for line in self.wrong:
            print(f"WRONG: {line}")
        return 1 if self.wrong else 0


def options(name: str, description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=description, allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and two rounds: does everything run"
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help="default: %(default)s"
    )
    when = time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--output", default=f"runs/bench-{name}-{when}.json", metavar="FILE", help="JSON results"
    )
    return parser
