"""How things are measured here: interleaved, checked against float64 first, judged by a limit.

Timing is done here and not by pytest-benchmark's own runner, which finishes all rounds of one
function before it begins the next: a ratio of two such medians compares two different moments of
the machine. Its statistics and its storage format are used: `pytest-benchmark compare FILE` reads
the files written here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from segloss.doctor import cpu_flags, environment

# packages whose versions stand beside the figures, those of segloss.doctor aside
PEERS = (
    "cut-cross-entropy", "trl", "monai", "segmentation-models-pytorch", "kornia", "liger-kernel",
    "quack-kernels", "pytest-benchmark",
)  # fmt: skip

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
        "memory": f"{total_memory() / 2**30:.0f} GiB",
        **{name: version for name in PEERS if (version := version_of(name))},
        "load at start": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# -------------------------------------------------------------------------------------- timing


@dataclass
class Prepared:
    """What is timed, `run(prepare())`, without the time that `prepare` takes."""

    prepare: Callable
    run: Callable


def elapsed(run: Callable | Prepared) -> float:
    """Seconds of one run."""
    arguments = ()
    if isinstance(run, Prepared):
        arguments, run = (run.prepare(),), run.run
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable | Prepared], rounds: dict[str, int], twice: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run, `rounds[name]` of them: every round runs all that still have some left.

    What else the machine does then hits all of them alike. The order is drawn anew in every round,
    the same in every process: a run is slower after one that has just given its memory back.
    `twice`: each follows itself, as a loss in training does, and only the second run counts; for
    what takes so little that the memory left by others would decide.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(max(rounds.values(), default=0)):
            for name in random.Random(turn).sample(list(runs), len(runs)):
                if turn < rounds[name]:
                    if twice:
                        elapsed(runs[name])
                    seconds[name].append(elapsed(runs[name]))
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
    """A figure against its limit; both in the same unit, `unit` "" for a ratio.

    `value` None: it was not measured, and `note` says why.
    """

    what: str
    value: float | None
    limit: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""
    verdict: str = field(init=False)

    def __post_init__(self):
        if self.value is None:
            self.verdict = "not measured"
        elif self.limit is None:
            self.verdict = "-"
        else:
            self.verdict = "pass" if self.value <= self.limit else "MISS"

    def cells(self) -> list[str]:
        value = "-" if self.value is None else f"{self.value:.3g}{self.unit}"
        spread = "" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        limit = "-" if self.limit is None else f"{self.limit:.3g}{self.unit}"
        return [self.what, value, spread, limit, self.verdict, self.note]


LINE_HEADER = ["line", "value", "quartiles", "limit", "", "note"]


def ratio_line(
    what: str, seconds: dict, name: str, over: str, limit: float | None, note: str = ""
) -> Line:
    """Ratio of medians; its quartiles are those of the ratios within each round."""
    for missing in (name, over):
        if missing not in seconds:
            return Line(what, None, limit, note=f"{missing} was not timed")
    low, _, high = quartiles(round_ratios(seconds[name], seconds[over]))
    value = statistics.median(seconds[name]) / statistics.median(seconds[over])
    return Line(what, value, limit, "", low, high, note)


def round_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Within each round that both ran; what ran once stands against every round of the other."""
    if len(theirs) == 1 or len(ours) == 1:
        return [a / b for a in ours for b in theirs]
    return [a / b for a, b in zip(ours, theirs, strict=False)]


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
    if actual.shape != truth.shape:
        raise Wrong(f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
    difference = size = 0.0
    # in pieces that stay in the cache: a dweight in doubles is gigabytes
    pieces = zip(actual.flatten().split(2**18), truth.flatten().split(2**18), strict=True)
    for part, exact in pieces:
        apart = exact - part
        difference += torch.dot(apart, apart).item()
        size += torch.dot(exact, exact).item()
    return 0.0 if difference == 0 else (difference / size) ** 0.5 if size else torch.inf


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


# a cell predicted to take more than one of these is printed with the prediction and not run
MOST_SECONDS, MOST_BYTES = 60.0, 16 * 10**9


def too_large(seconds: float, size: float) -> str:
    """Why a cell is not run, or ""; both predicted, `size` in bytes."""
    prediction = f"predicted {seconds:.3g} s and {size / 1e9:.3g} GB"
    if seconds > MOST_SECONDS:
        return f"{prediction}: above {MOST_SECONDS:.0f} s"
    if size > MOST_BYTES:
        return f"{prediction}: above {MOST_BYTES / 1e9:.0f} GB"
    return ""


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


@dataclass
class Section:
    """One table: what was timed or measured together."""

    title: str
    topic: str
    seconds: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    # name -> why there is no figure
    wrong: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    # of ours -> what computes the same value elsewhere
    rivals: dict[str, list[str]] = field(default_factory=dict)
    # of ours -> the runs whose times add up to the least that any implementation needs
    bounds: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    # figures that are not times, for plots
    data: dict = field(default_factory=dict)


class Report:
    """Prints sections as they are measured, and keeps them for the JSON file."""

    def __init__(self, title: str, options: argparse.Namespace):
        self.title = title
        self.options = options
        self.sections: list[Section] = []
        self.wrong: list[str] = []
        self.machine = machine()
        self.start = time.monotonic()
        print(f"# {title}\n")
        for name, value in self.machine.items():
            print(f"    {name:<14} {value}")
        if options.quick:
            print(
                "\n--quick: small sizes, to see that everything runs; the limits mean nothing here"
            )
        print(flush=True)

    def add(self, section: Section) -> None:
        print(f"## {section.title}\n")
        for name, value in section.facts.items():
            print(f"    {name:<14} {value}")
        if section.facts:
            print()
        if section.seconds:
            show(TIME_HEADER, time_rows(section.seconds, section.errors))
        if section.lines:
            show(LINE_HEADER, [line.cells() for line in section.lines])
        for name, reason in section.missing.items():
            print(f"not measured: {name}: {reason}")
        for name, reason in section.wrong.items():
            print(f"WRONG, not timed: {name}: {reason}")
            if not any(name in rivals for rivals in section.rivals.values()):
                self.wrong.append(f"{name}, {section.title}: {reason}")
        print(f"({time.monotonic() - self.start:.0f} s so far)\n", flush=True)
        self.sections.append(section)
        self.write()

    def write(self) -> None:
        """After every section: an interrupted run keeps what it has measured."""
        path = Path(self.options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "title": self.title,
            "machine": self.machine,
            # where it was written says nothing about the figures
            "options": {k: v for k, v in vars(self.options).items() if k != "output"},
            "minutes": (time.monotonic() - self.start) / 60,
            "sections": [asdict(section) for section in self.sections],
            "wrong": self.wrong,
            **stored(self.sections, self.machine),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")

    def finish(self) -> int:
        """1 if a result of ours was wrong; a peer's is a finding, not a failure."""
        lines = [line for section in self.sections for line in section.lines]
        count = {v: sum(line.verdict == v for line in lines) for v in ("pass", "MISS")}
        print(f"{count['pass']} lines passed, {count['MISS']} missed; {self.options.output}")
        for line in self.wrong:
            print(f"WRONG: {line}")
        return 1 if self.wrong else 0


def stored(sections: Sequence[Section], machine: dict) -> dict:
    """The times once more, as pytest-benchmark stores them."""
    from pytest_benchmark import __version__
    from pytest_benchmark.stats import Stats
    from pytest_benchmark.utils import get_commit_info

    benchmarks = []
    for section in sections:
        for name, seconds in section.seconds.items():
            stats = Stats()
            for duration in seconds:
                stats.update(duration)
            benchmarks.append(
                {
                    "group": section.title,
                    "name": name,
                    "fullname": f"{section.title}: {name}",
                    "params": None,
                    "param": None,
                    "extra_info": {"error": section.errors.get(name, "")},
                    "options": {},
                    "stats": {**stats.as_dict(), "iterations": 1},
                }
            )
    return {
        "machine_info": machine,
        "commit_info": get_commit_info(),
        "benchmarks": benchmarks,
        "datetime": machine["date"],
        "version": __version__,
    }


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
