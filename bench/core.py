"""Losses on logits that exist, on a CPU: `python -m bench.core [--quick]`.

    limits      forward + backward, N = 1024 tokens, V = 32768 classes, float32 and bfloat16, on the
                named inputs of `bench/inputs.py`, against PyTorch's cross-entropy on float32 logits
                and two loops for Lovász-Softmax
    directions  forward and backward apart, bfloat16
    ignored     0, 50 and 90 % of the tokens ignored, bfloat16

The bound is one pass over the bytes: the logits read once and their gradient written once.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import inputs
from bench.common import (
    TOLERANCE,
    Prepared,
    Report,
    Section,
    Wrong,
    check,
    interleaved,
    options,
    ratio_line,
    value_and_grads,
)
from bench.peers import berman_loop, gathered_loop
from segloss import reference

TORCH, COMPILED = "F.cross_entropy(logits.float())", "torch.compile of it"
CE, FOCAL, DICE, LOVASZ = "CE", "focal", "Dice", "Lovász"
LOOP, GATHERED = "Lovász: loop over present classes", "Lovász: loop, columns gathered first"
PASS = "one pass: the logits copied"

# name -> (implementation, naive truth)
Implementation = Callable[[Tensor, Tensor], Tensor]
Todo = tuple[Implementation, Implementation, Tensor]  # ..., target


def torch_ce(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


@functools.cache
def compiled_ce() -> Implementation:
    """Made at its first call: the compiler's import takes seconds."""
    return torch.compile(torch_ce, dynamic=False)


IMPLEMENTATIONS: dict[str, tuple[Implementation, Implementation]] = {
    TORCH: (torch_ce, reference.cross_entropy),
    COMPILED: (lambda z, y: compiled_ce()(z, y), reference.cross_entropy),
    CE: (segloss.CrossEntropyLoss(), reference.cross_entropy),
    FOCAL: (segloss.FocalLoss(), reference.focal_loss),
    DICE: (segloss.DiceLoss(), reference.dice_loss),
    LOVASZ: (segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax),
    GATHERED: (gathered_loop, reference.lovasz_softmax),
    LOOP: (berman_loop, reference.lovasz_softmax),
}
RIVALS = {CE: [TORCH, COMPILED], LOVASZ: [LOOP, GATHERED]}
FOREIGN = {name for names in RIVALS.values() for name in names}
BOUNDS = {name: [PASS] for name in (CE, FOCAL, DICE, LOVASZ)}
# half a minute a run and hundreds of times slower than ours: one run decides
ONCE = (LOOP,)
# fewer rounds, an eighth of --rounds
SLOWER = (TORCH, GATHERED)

# (name, over, limit of the ratio of times)
LIMITS = [
    (CE, TORCH, 0.8),
    (CE, COMPILED, 0.95),
    (FOCAL, CE, 1.05),
    (DICE, CE, 2.0),
    (LOVASZ, CE, 2.0),
    (LOVASZ, LOOP, 1 / 50),
    (LOVASZ, GATHERED, None),
]


def checked(todo: dict[str, Todo], logits: Tensor, section: Section) -> None:
    """Fill in the errors of what agrees with float64, and why the others cannot be timed.

    What is to run only once has its time from here.
    """
    known: dict[tuple, list] = {}
    for name, (implementation, truth, target) in todo.items():
        if (truth, id(target)) not in known:
            known.clear()  # one float64 gradient at a time
            known[truth, id(target)] = [
                value_and_grads(lambda z, f=truth, y=target: f(z, y), logits.double()),
                value_and_grads(lambda z, f=truth, y=target: f(z.float(), y), logits),
            ]
        start = time.perf_counter()
        try:
            actual = value_and_grads(lambda z, f=implementation, y=target: f(z, y), logits)
        except Exception as error:
            if name not in FOREIGN:
                raise
            section.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        took = time.perf_counter() - start
        try:
            section.errors[name] = check(actual, *known[truth, id(target)], TOLERANCE[logits.dtype])
        except Wrong as problem:
            section.wrong[name] = str(problem)
        if name in ONCE and name in section.errors:
            section.seconds[name] = [took]


def forward_backward(implementation: Implementation, logits: Tensor, target: Tensor) -> Callable:
    leaf = logits.detach().requires_grad_()

    def run() -> None:
        implementation(leaf, target).backward()
        leaf.grad = None

    return run


def one_pass(logits: Tensor) -> Callable:
    written = torch.empty_like(logits)
    return lambda: written.copy_(logits)


def named(name: str, dtype: torch.dtype, size: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """(logits, target, what they are)."""
    logits, target = inputs.dense(name, *size)
    where = "{}, {}, N {}, V {}".format(name, str(dtype).removeprefix("torch."), *size)
    return logits.to(dtype), target, where


def measure(name: str, dtype: torch.dtype, size: tuple[int, int], report: Report) -> None:
    logits, target, where = named(name, dtype, size)
    section = Section(
        where, "logits", {}, rivals=RIVALS, bounds=BOUNDS, facts=inputs.facts(logits, target)
    )
    todo = {name: (*pair, target) for name, pair in IMPLEMENTATIONS.items()}
    if name == "flat" or (dtype == torch.bfloat16 and name != "zipf"):
        for slow in ONCE:  # as many seconds whatever the input
            del todo[slow]
            section.missing[slow] = "not run: half a minute, as on zipf"
    checked(todo, logits, section)
    runs = {
        name: forward_backward(IMPLEMENTATIONS[name][0], logits, target)
        for name in IMPLEMENTATIONS
        if name in section.errors and name not in ONCE
    }
    runs[PASS] = one_pass(logits)
    most = report.options.rounds
    rounds = {name: max(2, most // 8) if name in SLOWER else most for name in runs}
    section.seconds = {**interleaved(runs, rounds, twice=True), **section.seconds}
    section.lines = [
        ratio_line(f"{a} / {b}", section.seconds, a, b, limit)
        for a, b, limit in LIMITS
        if b in todo
    ]
    report.add(section)


# ---------------------------------------------------------------------- directions, ignored tokens

APART = (TORCH, CE, FOCAL, DICE, LOVASZ)
DIRECTIONS = ("forward, no gradient", "forward", "backward")


def directions(size: tuple[int, int], report: Report) -> None:
    """Forward without and with a graph, and backward."""
    logits, target, where = named("zipf", torch.bfloat16, size)
    section = Section(f"apart, {where}", "directions", {})
    whole = Section("", "", {})
    checked({name: (*IMPLEMENTATIONS[name], target) for name in APART}, logits, whole)
    leaf = logits.detach().requires_grad_()

    def backward(value: Tensor) -> None:
        value.backward()
        leaf.grad = None

    runs: dict = {}
    for name, error in whole.errors.items():
        loss = IMPLEMENTATIONS[name][0]
        steps = (
            lambda f=loss: f(logits, target),
            lambda f=loss: f(leaf, target),
            Prepared(lambda f=loss: f(leaf, target), backward),
        )
        for part, step in zip(DIRECTIONS, steps, strict=True):
            runs[f"{name}: {part}"] = step
            section.errors[f"{name}: {part}"] = error
    section.wrong = whole.wrong
    section.seconds = interleaved(
        runs, dict.fromkeys(runs, max(2, report.options.rounds // 8)), twice=True
    )
    section.rivals = {f"{CE}: {part}": [f"{TORCH}: {part}"] for part in DIRECTIONS}
    report.add(section)


IGNORED = (0, 50, 90)


def ignored(size: tuple[int, int], report: Report) -> None:
    logits, target, where = named("zipf", torch.bfloat16, size)
    section = Section(f"ignored tokens, {where}", "ignored", {})
    names, todo = (TORCH, CE, LOVASZ), {}
    some = {
        percent: target.where(torch.arange(target.numel()) % 10 >= percent // 10, -100)
        for percent in IGNORED
    }
    for name in names:
        for percent in IGNORED:
            todo[f"{name}, {percent} %"] = (*IMPLEMENTATIONS[name], some[percent])
    checked(todo, logits, section)
    runs = {name: forward_backward(todo[name][0], logits, todo[name][2]) for name in section.errors}
    section.seconds = interleaved(
        runs, dict.fromkeys(runs, max(2, report.options.rounds // 8)), twice=True
    )
    section.rivals = {f"{CE}, {p} %": [f"{TORCH}, {p} %"] for p in IGNORED}
    section.lines = [
        ratio_line(f"{n}, {p} % / 0 %", section.seconds, f"{n}, {p} %", f"{n}, 0 %", None)
        for n in names
        for p in IGNORED[1:]
    ]
    report.add(section)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("core", "Time the losses on logits against PyTorch's, interleaved.", rounds=24)
    parts = ("limits", "directions", "ignored")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument(
        "--inputs", nargs="+", default=list(inputs.ALL_NAMES), choices=inputs.ALL_NAMES
    )
    chosen = parser.parse_args(arguments)
    size = (1024, 32768)
    if chosen.quick:
        chosen.rounds, size = 2, (128, 8192)
    report = Report("Losses on logits, forward + backward", chosen)
    if "limits" in chosen.parts:
        for name in chosen.inputs:
            for dtype in (torch.float32, torch.bfloat16):
                if name in inputs.NAMES or dtype == torch.bfloat16:
                    measure(name, dtype, size, report)
    if "directions" in chosen.parts:
        directions(size, report)
    if "ignored" in chosen.parts:
        ignored(size, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
