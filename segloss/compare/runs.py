"""The runs of a comparison: each a process of `segloss train`, several at once, none twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segloss.train.data import say
from segloss.train.report import RESULTS, SETTINGS, write
from segloss.train.run import TRAINED
from segloss.train.trainer import PREFIX

POLL_SECONDS = 0.2
WEIGHTS = ("*.safetensors", "*.bin", "merged/*.safetensors", "merged/*.bin")


@dataclass(frozen=True, eq=False)
class Run:
    """A variant with a seed: `folder` is an ordinary run's, beside it its settings and its log."""

    variant: str
    seed: int
    folder: Path
    given: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS).exists()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, places: dict[str, str]) -> subprocess.Popen:
        """Begin it, or go on with what a killed one has left; `places` are for its environment."""
        words = ["train", "--resume", str(self.folder)]
        if not (self.folder / SETTINGS).exists():
            settings = self.folder.with_suffix(".json")
            settings.parent.mkdir(exist_ok=True)
            write(settings, {"given": self.given})
            words = ["train", "--config", str(settings), "--output_dir", str(self.folder)]
        # what this process imports, and nothing that lies in the working directory
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "segloss.command", *words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | places | path,
                start_new_session=True,  # Ctrl-C reaches it from here alone, once
            )  # fmt: skip

    def failure(self, code: int) -> str:
        """What the log says last."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("segloss: ").removeprefix("error: ") if lines else "nothing"
        return f"{last} (exit code {code}, {self.log})"

    def remove_weights(self) -> None:
        """And checkpoints, and the file that says that there is a model."""
        for pattern in (TRAINED, *WEIGHTS):
            for file in self.folder.glob(pattern):
                file.unlink()
        for checkpoint in self.folder.glob(f"{PREFIX}*"):
            shutil.rmtree(checkpoint)


def run_all(
    runs: Sequence[Run], jobs: int, keep_models: bool, done: Callable[[Run], None]
) -> dict[Run, str]:
    """Run what is not finished, `jobs` at once; {a run that failed: why}.

    `done` is called with every finished run, those of earlier included; what it raises stops all.
    After a failure none of its variant is begun, and after one of the first variant none at all. An
    interrupt is passed on to the runs, which save what they can.
    """
    failed: dict[Run, str] = {}
    waiting = [run for run in runs if not run.finished]

    def close(run: Run) -> None:
        if not keep_models:
            run.remove_weights()
        done(run)

    for run in runs:
        if run.finished:
            close(run)
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    places = [{**device, **threads(jobs)} for device in devices(jobs)]
    going: dict[subprocess.Popen, tuple[Run, dict[str, str]]] = {}
    start, count = time.monotonic(), 0
    with interruptible(going):
        while waiting or going:
            while waiting and places:
                run, place = waiting.pop(0), places.pop(0)
                say(f"{run} ...")
                going[run.start(place)] = run, place
            for process in [process for process in going if process.poll() is not None]:
                run, place = going.pop(process)
                places.append(place)
                if process.returncode != 0 or not run.finished:
                    failed[run] = run.failure(process.returncode)
                    say(f"{run} failed: {failed[run]}")
                    others = run.variant != runs[0].variant
                    waiting = [r for r in waiting if others and r.variant != run.variant]
                    continue
                close(run)
                count, left = count + 1, len(waiting) + len(going)
                minutes = (time.monotonic() - start) / 60 / count * left
                rest = f"; {left} left, about {minutes:.0f} minutes" if left else ""
                say(f"{run} is finished{rest}")
            time.sleep(POLL_SECONDS if going else 0)
    return failed


@contextmanager
def interruptible(going: dict[subprocess.Popen, Any]) -> Iterator[None]:
    """Whatever ends this early, ends the runs; a request to terminate is an interrupt.

    A shell has what it runs in the background ignore interrupts, and so would the runs.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for process in going:
            process.send_signal(signal.SIGINT)
        for process in going:
            process.wait()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def devices(jobs: int) -> list[dict[str, str]]:
    """The GPU that each of the runs at once has to itself, or shares where there are fewer."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if jobs == 1 or not known:
        return [{}] * jobs
    return [{"CUDA_VISIBLE_DEVICES": known[i % len(known)]} for i in range(jobs)]


def threads(jobs: int) -> dict[str, str]:
    """The share of the cores that one of several runs gets, unless the user says."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
