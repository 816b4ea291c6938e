"""Distillation from heads: memory and speed beside eager PyTorch and bare matrix products.

    python -m bench.distill [speed | memory] [--quick]

Speed is one interleaved run: ours, eager and compiled PyTorch on the logits of both heads, the four
bare products (student and teacher forward, two backward), cross-entropy, and stored top-k. Memory
is the peak of resident memory of one forward and backward above the inputs, less the gradients,
each in a process of its own; eager's, which grows as N, is taken at a quarter of the tokens.

N tokens, D hidden size, V classes, bfloat16; the teacher is as wide as the student.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import inputs
from bench.common import interleaved, machine, quartiles
from bench.memory import resident

SPEED, QUICK_SPEED = (1024, 1024, 32768), (128, 256, 8192)
MEMORY, QUICK_MEMORY = (4096, 1024, 128256), (512, 256, 16032)
TOP = 64
# limits: of the memory of eager PyTorch; of four products and so many seconds per logit; of
# cross-entropy
MEMORY_SHARE, OVER_PRODUCTS, PER_LOGIT, TOP_OVER_CE = 0.10, 1.15, 2e-9, 1.1
KINDS = ("forward", "reverse", "jsd")


def divergence(logits: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Mean over tokens, in float32, as one writes it."""
    log_p, log_q = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if kind == "forward":
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if kind == "reverse":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = [F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q)]
    return 0.5 * both[0] + 0.5 * both[1]


class Problem:
    """A student's and a teacher's head over the same tokens."""

    def __init__(self, num_tokens: int, width: int, num_classes: int):
        self.hidden, self.weight, self.target = inputs.head_of(
            "zipf", num_tokens, width, num_classes
        )
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.weight.shape, generator=generator).to(self.weight.dtype)
        self.teacher_weight = self.weight + 0.3 * self.weight.float().std() * noise
        self.teacher_weight = self.teacher_weight.to(self.weight.dtype)

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.hidden, self.weight)]

    def ours(self, kind: str) -> Callable:
        loss = segloss.DistillationLoss(kind)

        def run() -> None:
            teacher = segloss.LinearLogits(self.hidden, self.teacher_weight)
            source = segloss.LinearLogits(*self.leaves())
            loss(source, self.target, teacher=teacher).backward()

        return run

    def plain(self, kind: str, compiled: bool = False) -> Callable:
        function = torch.compile(divergence, dynamic=False) if compiled else divergence

        def run() -> None:
            with torch.no_grad():
                teacher = self.hidden @ self.teacher_weight.T
            hidden, weight = self.leaves()
            function(hidden @ weight.T, teacher, kind).backward()

        return run

    def products(self) -> None:
        logits = self.hidden @ self.weight.T
        self.hidden @ self.teacher_weight.T
        logits @ self.weight
        logits.T @ self.hidden

    def cross_entropy(self) -> None:
        segloss.CrossEntropyLoss()(segloss.LinearLogits(*self.leaves()), self.target).backward()

    def stored(self) -> Callable:
        rows = torch.arange(self.target.numel())[:, None]
        ids = (rows * 7919 + torch.arange(TOP) * 104729) % self.weight.shape[0]
        log_prob = torch.full(ids.shape, -math.log(TOP))
        teacher = segloss.TopK(ids, log_prob)

        def run() -> None:
            source = segloss.LinearLogits(*self.leaves())
            segloss.DistillationLoss()(source, self.target, teacher=teacher).backward()

        return run


def speed(size: tuple, rounds: int) -> list[str]:
    problem = Problem(*size)
    runs: dict[str, Callable] = {f"ours {kind}": problem.ours(kind) for kind in KINDS}
    runs |= {"eager forward": problem.plain("forward"), "products": problem.products}
    runs["compiled forward"] = problem.plain("forward", compiled=True)
    runs |= {"cross-entropy": problem.cross_entropy, "top-k": problem.stored()}
    for run in runs.values():
        run()
    seconds = interleaved(runs, dict.fromkeys(runs, rounds))
    middle = {name: quartiles(values) for name, values in seconds.items()}
    num_tokens, _, num_classes = size
    lines = [f"N, D, V = {size}, bfloat16, {torch.get_num_threads()} threads, {rounds} rounds"]
    lines += [f"{name:<18} {m[1]:8.3f} s ({m[0]:.3f} to {m[2]:.3f})" for name, m in middle.items()]

    def ratio(what: str, other: str) -> float:
        pairs = zip(seconds[what], seconds[other], strict=True)
        return quartiles([a / b for a, b in pairs])[1]

    allowed = [
        OVER_PRODUCTS * s + PER_LOGIT * num_tokens * num_classes for s in seconds["products"]
    ]
    for kind in KINDS:
        share = quartiles([a / b for a, b in zip(seconds[f"ours {kind}"], allowed, strict=True)])[1]
        lines.append(f"{kind}: {share:.2f} of 1.15 x four products + 2 ns x N V (limit 1)")
    for other in ("eager forward", "compiled forward"):
        lines.append(f"forward over {other}: {ratio('ours forward', other):.2f}")
    top = ratio("top-k", "cross-entropy")
    lines.append(f"top-k (k = {TOP}) over cross-entropy: {top:.2f} (limit {TOP_OVER_CE})")
    return lines


def child(name: str, size: tuple) -> None:
    """Peak bytes of one forward and backward above the inputs, less the gradients."""
    warnings.simplefilter("ignore")
    who, kind = name.split()
    small = Problem(8, 16, 64)
    (small.ours(kind) if who == "ours" else small.plain(kind))()  # libraries and thread pools
    problem = Problem(*size)
    run = problem.ours(kind) if who == "ours" else problem.plain(kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present
    before = resident("VmRSS")
    run()
    gradients = problem.hidden.nbytes + problem.weight.nbytes
    print(json.dumps(resident("VmHWM") - before - gradients))


def in_a_process(name: str, size: tuple) -> int:
    command = [sys.executable, "-m", "bench.distill", "child", name, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(size: tuple) -> list[str]:
    fewer = 4
    small = (size[0] // fewer, *size[1:])
    eager = fewer * in_a_process("eager forward", small)
    lines = [f"N, D, V = {size}, bfloat16; eager at N = {small[0]}: {eager / 2**20:.0f} MiB at N"]
    for kind in KINDS:
        own = in_a_process(f"ours {kind}", size)
        lines.append(
            f"{kind}: {own / 2**20:.0f} MiB, {own / eager:.1%} of eager (limit {MEMORY_SHARE:.0%})"
        )
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], tuple(map(int, sys.argv[3:])))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["speed", "memory"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(json.dumps(machine(), indent=1))
    if arguments.what != "memory":
        given = QUICK_SPEED if arguments.quick else SPEED
        print(*speed(given, arguments.rounds), sep="\n", flush=True)
    if arguments.what != "speed":
        print(*memory(QUICK_MEMORY if arguments.quick else MEMORY), sep="\n")
