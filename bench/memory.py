"""What one forward and backward allocates, each in a process of its own.

    python -m bench.memory NAME N D V [--whole]     prints {"bytes": ...}

NAME is one of ours ("ce", "dice" ..., "ce:frozen") or a peer of `bench/peers.py`. Counted is the
peak of resident memory above the inputs, less the gradients; with --whole the peak of the process.

N tokens, D hidden size, V classes, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import segloss
from bench import inputs, peers
from segloss.head.explain import plan_of
from segloss.losses import parse_loss

# bfloat16 logits, their float32 copy, log-probabilities, two gradients
EAGER_BYTES_PER_LOGIT = 2 + 4 + 4 + 4 + 2
# of one child
SECONDS = 300


class NotMeasured(Exception):
    """Memory that could not be had, and why."""


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def loss_of(name: str):
    """(hidden, weight, target) -> loss."""
    if name in peers.HEAD:
        return peers.HEAD[name]()
    loss = parse_loss(name)
    return lambda hidden, weight, target: loss(segloss.LinearLogits(hidden, weight), target)


def child(name: str, size: Sequence[int], whole: bool) -> None:
    warnings.simplefilter("ignore")
    name, _, frozen = name.partition(":")
    loss = loss_of(name)
    gradients: list[int] = []

    def step(tensors: tuple) -> None:
        hidden, weight, target = tensors
        hidden = hidden.detach().requires_grad_()
        weight = weight.detach().requires_grad_(not frozen)
        loss(hidden, weight, target).backward()
        gradients.append(sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None))

    # libraries, thread pools and their buffers come first, at a size that does not count; what is
    # compiled is compiled for a size of its own afterwards, and the compiler does not count either
    step(inputs.head_of("zipf", 8, 16, 64))
    tensors = inputs.head_of("zipf", *size)
    if "compile" in name:
        step(tensors)
    if whole:
        step(tensors)
        print(json.dumps({"bytes": resident("VmHWM")}))
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present
    before = resident("VmRSS")
    step(tensors)
    print(json.dumps({"bytes": resident("VmHWM") - before - gradients[-1]}))


def accumulator_bytes(name: str, size: Sequence[int]) -> int:
    """The float32 sum of dweight: only where gradients of several chunks are added up."""
    num_tokens, width, num_classes = size
    if not parse_loss(name).is_token_loss:
        return 0
    hidden, weight = (
        torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        for rows in (num_tokens, num_classes)
    )
    inputs = segloss.LinearLogits(hidden, weight).inputs()
    return plan_of(inputs, True, num_tokens).held["sum"]


def measured(name: str, size: Sequence[int], whole: bool = False) -> int:
    """Bytes of `name` in a fresh process; raises `NotMeasured`."""
    if sys.platform != "linux":
        raise NotMeasured("memory is read from /proc")
    command = [sys.executable, "-m", "bench.memory", name, *map(str, size)]
    try:
        done = subprocess.run(
            command + ["--whole"] * whole, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"more than {SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotMeasured(f"exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("size", type=int, nargs=3, metavar=("N", "D", "V"))
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    child(arguments.name, arguments.size, arguments.whole)
