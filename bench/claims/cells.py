"""Cells of the study: what is run, in which order, and where its numbers lie.

A cell is one variant with its learning rates and all its seeds, or all that is trained from one
set of gradients; one JSON file, written when it is complete, so that a run that was killed goes on
with the next cell.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import machine

RESULTS = Path(__file__).parents[1] / "results" / "claims"

# what a rerun need not repeat
CLOCKS = ("cpu_seconds", "seconds", "machine")


@dataclass(frozen=True)
class Cell:
    name: str
    """`kind/.../variant`, and the file's name."""
    run: Callable[[], dict[str, Any]]
    wave: int
    """The place in the protocol's order: all cells of a wave, then the next."""
    seconds: float
    """Of one core, as the protocol expects it."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


def slug(expression: str) -> str:
    """`0.5*ce+0.5*focal` as part of a name: `ce+focal`."""
    return expression.replace("0.5*", "")


class Store:
    """The files of a folder."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def __getitem__(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name).read_text())["result"]

    def find(self, name: str) -> dict[str, Any] | None:
        """The result of a cell, None if it has not been run."""
        return self[name] if self.path(name).exists() else None

    def whole(self, name: str) -> dict[str, Any]:
        """With the machine and the time it took."""
        return json.loads(self.path(name).read_text())

    def names(self) -> list[str]:
        files = self.folder.rglob("*.json")
        return sorted(file.relative_to(self.folder).with_suffix("").as_posix() for file in files)

    def write(self, name: str, result: dict[str, Any], cpu_seconds: float) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "cell": name,
            "command": f"python -m bench.claims --rerun {name}",
            "cpu_seconds": round(cpu_seconds, 1),
            "machine": where(),
            "result": result,
        }
        # a file is there in full or not at all
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, path)


def where() -> dict[str, str]:
    every = machine() | {"commit": commit()}
    return {
        name: every[name] for name in ("commit", "processor", "AVX-512", "torch", "threads", "date")
    }


def commit() -> str:
    """Of the code that runs, with a `+` where files of it are not as committed."""
    words = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(words, cwd=RESULTS.parents[1], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: cell.wave)


def execute(
    cells: Sequence[Cell], store: Store, minutes: float, say: Callable[[str], Any] = print
) -> Iterator[Cell]:
    """Runs what is missing, in order, until the minutes are over; yields every cell it has run."""
    start = time.monotonic()
    missing = [cell for cell in cells if cell.name not in store]
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    for number, cell in enumerate(missing, 1):
        if time.monotonic() - start > 60 * minutes:
            say(f"{minutes:g} minutes are over; {len(missing) - number + 1} cells are missing")
            return
        if cell.name in store:  # of another process on other cells
            continue
        before = processor_time()
        result = cell.run()
        spent = processor_time() - before
        store.write(cell.name, result, spent)
        say(f"{number} of {len(missing)}: {cell.name}, {spent:.0f} s (expected {cell.seconds:.0f})")
        yield cell


def processor_time() -> float:
    """Seconds of this process and of those it has run to their end."""
    return sum(os.times()[:4])


# -------------------------------------------------------------------------------------- reruns


def apart(stored: Any, again: Any, place: str = "") -> list[str]:
    """Where two results differ: every number and text that is not the same, clocks aside."""
    if isinstance(stored, dict) and isinstance(again, dict):
        keys = [key for key in {**stored, **again} if key not in CLOCKS]
        return [
            line
            for key in keys
            for line in apart(stored.get(key), again.get(key), f"{place}/{key}")
        ]
    if isinstance(stored, list) and isinstance(again, list) and len(stored) == len(again):
        return [
            line
            for i, (a, b) in enumerate(zip(stored, again, strict=True))
            for line in apart(a, b, f"{place}/{i}")
        ]
    both_nan = all(isinstance(v, float) and math.isnan(v) for v in (stored, again))
    if both_nan or stored == again:
        return []
    shown = [str(value)[:40] for value in (stored, again)]
    return [f"{place}: stored {shown[0]}, again {shown[1]}"]


def rerun(cell: Cell, store: Store) -> list[str]:
    """The differences to the stored numbers, none where they are the same."""
    # as the file has it: tuples are lists, keys are texts
    return apart(store[cell.name], json.loads(json.dumps(cell.run())))
