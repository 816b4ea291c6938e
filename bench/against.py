"""Whether a change of the code changed its speed: two checkouts, one worker process each.

    git worktree add ../before COMMIT
    python -m bench.against ../before [--rounds 12] [--quick]

Every cell of `bench.core` (losses on logits) and of `bench.head` (on hidden states) that is ours is
run by both workers in turn, the order drawn anew in every round, so that what else the machine does
hits both alike. Printed: the median of after / before, round by round, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.common import elapsed, quartiles

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("CrossEntropyLoss", "FocalLoss", "DiceLoss", "LovaszSoftmaxLoss")
CORE_SIZE, HEAD_SIZES = (1024, 32768), [(1024, 1024, 128256), (1024, 640, 262144)]
QUICK_CORE, QUICK_HEAD = (128, 8192), [(128, 128, 16032)]


def cells(quick: bool) -> dict[str, tuple]:
    """{label: what a worker makes a run of}."""
    found: dict[str, tuple] = {}
    for dtype in ("float32", "bfloat16"):
        for loss in LOSSES:
            found[f"logits {dtype} {loss}"] = (
                "logits", loss, dtype, QUICK_CORE if quick else CORE_SIZE, False,
            )  # fmt: skip
    for size in QUICK_HEAD if quick else HEAD_SIZES:
        for loss in LOSSES:
            for frozen in (False, True):
                label = f"head {size} {loss}{', frozen' if frozen else ''}"
                found[label] = ("head", loss, "bfloat16", size, frozen)
    return found


def prepared(kind: str, loss: str, dtype: str, size: Sequence[int], frozen: bool) -> Callable:
    """One forward and backward of a cell."""
    import segloss
    from bench import inputs

    criterion = getattr(segloss, loss)()
    if kind == "logits":
        logits, target = inputs.dense("zipf", *size)
        leaf = logits.to(getattr(torch, dtype)).requires_grad_()

        def run() -> None:
            criterion(leaf, target).backward()
            leaf.grad = None

        return run
    hidden, weight, target = inputs.head_of("zipf", *size)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)

    def run_head() -> None:
        criterion(segloss.LinearLogits(hidden, weight), target).backward()
        hidden.grad = weight.grad = None

    return run_head


def work() -> None:
    """A worker: a line of a cell prepares it, an empty line runs it and answers its seconds."""
    run: Callable = print
    for line in sys.stdin:
        if line.strip():
            run = prepared(*json.loads(line))
            run()
            print("ready", flush=True)
        else:
            run()  # each run follows itself, as in training
            print(elapsed(run), flush=True)


class Worker:
    def __init__(self, checkout: Path):
        command = [sys.executable, str(Path(__file__).resolve()), "--work"]
        path = os.pathsep.join([str(checkout), str(ROOT)])  # its own segloss, this bench
        self.process = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"the worker of {self.process.args} ended")
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--output", type=Path, help="write the ratios there, as JSON")
    chosen = parser.parse_args(arguments)
    workers = [Worker(chosen.before.resolve()), Worker(ROOT)]
    found = {}
    for label, cell in cells(chosen.quick).items():
        if chosen.only not in label:
            continue
        for worker in workers:
            worker.ask(json.dumps(cell))
        ratios = []
        for turn in range(chosen.rounds):
            seconds: dict[int, float] = {}
            for which in random.Random(turn).sample([0, 1], 2):
                seconds[which] = float(workers[which].ask(""))
            ratios.append(seconds[1] / seconds[0])
        low, _, high = quartiles(ratios)
        found[label] = ratios
        print(f"{label:<55} {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})", flush=True)
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(main())
