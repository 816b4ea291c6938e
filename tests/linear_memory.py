"""Peak memory of training steps on LinearLogits, measured in a process of its own.

python linear_memory.py '[{"loss": "DiceLoss", "trainable": ["hidden", "weight"]}, ...]'

prints a JSON list: per case the bytes by which resident memory rose above inputs and gradients,
and what `explain()` says beforehand.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import segloss

N, V, D = 1024, 16384, 32


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the most since it was reset)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def build(case: dict, n: int, v: int) -> tuple[segloss.LinearLogits, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(rows, D, generator=draw).bfloat16() for name, rows in
        (("hidden", n), ("weight", v))
    }  # fmt: skip
    for name in case["trainable"]:
        tensors[name].requires_grad_()
    target = torch.randint(64, (n,), generator=draw)
    return segloss.LinearLogits(**tensors, **case.get("source", {})), target


def step(loss, logits: segloss.LinearLogits, target: Tensor, eager: bool) -> None:
    given = logits
    if eager:  # the logits stored, the loss on their float32 copy
        given = torch.nn.functional.linear(logits.hidden, logits.weight).float()
    value = loss(given, target)
    if value.requires_grad:
        value.sum().backward()


def measure(case: dict) -> dict:
    loss = getattr(segloss, case["loss"])(**case.get("options", {}))
    eager = case.get("eager", False)
    step(loss, *build(case, 64, 256), eager)  # what a first call sets up
    logits, target = build(case, N, V)
    plan = logits.explain(loss, target)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    step(loss, logits, target, eager)
    rise = resident("VmHWM") - before
    grads = [t.grad for t in (logits.hidden, logits.weight) if t.grad is not None]
    return {"rise": rise - sum(grad.nbytes for grad in grads), "plan": plan}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([measure(case) for case in json.loads(sys.argv[1])]))
