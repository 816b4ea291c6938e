"""Losses on logits that exist, forward and backward, on a CPU: `python -m bench.core [--quick]`.

N = 1024 tokens, V = 32768 classes, float32 and bfloat16, on the named inputs of `bench/inputs.py`.
Baselines are PyTorch's cross-entropy on float32 logits, and two loops for Lovász-Softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import inputs
from bench.common import (
    TOLERANCE,
    Report,
    Wrong,
    check,
    interleaved,
    options,
    ratio_line,
    value_and_grads,
)
from segloss import reference


def jaccard_steps(foreground: Tensor) -> Tensor:
    """Algorithm 1 of Berman et al.: the increase of the Jaccard loss at each sorted error."""
    total = foreground.sum()
    jaccard = 1 - (total - foreground.cumsum(0)) / (total + (1 - foreground).cumsum(0))
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_of_columns(columns, target: Tensor, classes: Tensor) -> Tensor:
    losses = []
    for column, c in zip(columns, classes, strict=True):
        foreground = (target == c).to(column.dtype)
        errors, order = (foreground - column).abs().sort(descending=True)
        losses.append(errors @ jaccard_steps(foreground[order]))
    return torch.stack(losses).mean()


def berman_loop(logits: Tensor, target: Tensor) -> Tensor:
    """As in the authors' code: class after class, each a column of the probabilities.

    In backward every column makes a gradient of N x V. Their code also visits absent classes, to
    pass over them; this one does not.
    """
    p = logits.float().softmax(-1)
    classes = target.unique()
    return lovasz_of_columns((p[:, c] for c in classes), target, classes)


def gathered_loop(logits: Tensor, target: Tensor) -> Tensor:
    """The same loop on columns taken out together: a better baseline than the published one."""
    p = logits.float().softmax(-1)
    classes = target.unique()
    return lovasz_of_columns(p[:, classes].unbind(1), target, classes)


TORCH, CE, FOCAL, DICE, LOVASZ = "F.cross_entropy(logits.float())", "CE", "focal", "Dice", "Lovász"
LOOP, GATHERED = "Lovász: loop over present classes", "Lovász: loop, columns gathered first"

# of the loop, which would otherwise take most of the time
LOOP_ROUNDS = 2

# name -> (implementation, naive truth)
Implementation = Callable[[Tensor, Tensor], Tensor]
IMPLEMENTATIONS: dict[str, tuple[Implementation, Implementation]] = {
    TORCH: (lambda z, y: F.cross_entropy(z.float(), y), reference.cross_entropy),
    CE: (segloss.CrossEntropyLoss(), reference.cross_entropy),
    FOCAL: (segloss.FocalLoss(), reference.focal_loss),
    DICE: (segloss.DiceLoss(), reference.dice_loss),
    LOVASZ: (segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax),
    GATHERED: (gathered_loop, reference.lovasz_softmax),
    LOOP: (berman_loop, reference.lovasz_softmax),
}

# (name, over, limit of the ratio of times)
LIMITS = [
    (CE, TORCH, 0.8),
    (FOCAL, CE, 1.05),
    (DICE, CE, 2.0),
    (LOVASZ, CE, 2.0),
    (LOVASZ, LOOP, 1 / 50),
    (LOVASZ, GATHERED, None),
]


def checked(logits: Tensor, target: Tensor, report: Report, where: str) -> dict[str, str]:
    """The implementations that agree with float64, with their errors."""
    errors: dict[str, str] = {}
    known: dict[Implementation, list] = {}
    for name, (implementation, truth) in IMPLEMENTATIONS.items():
        if truth not in known:
            known.clear()  # one float64 gradient at a time
            known[truth] = [
                value_and_grads(lambda z, f=truth: f(z, target), logits.double()),
                value_and_grads(lambda z, f=truth: f(z.float(), target), logits),
            ]
        actual = value_and_grads(lambda z, f=implementation: f(z, target), logits)
        try:
            errors[name] = check(actual, *known[truth], TOLERANCE[logits.dtype])
        except Wrong as wrong:
            report.found_wrong(f"{name}, {where}", wrong)
    return errors


def forward_backward(implementation: Implementation, logits: Tensor, target: Tensor) -> Callable:
    leaf = logits.detach().requires_grad_()

    def run() -> None:
        implementation(leaf, target).backward()
        leaf.grad = None

    return run


def measure(name: str, dtype: torch.dtype, size: tuple[int, int], report: Report) -> None:
    logits, target = inputs.dense(name, *size)
    logits = logits.to(dtype)
    where = f"{name}, {str(dtype).removeprefix('torch.')}, N {size[0]}, V {size[1]}"
    errors = checked(logits, target, report, where)
    runs = {
        name: forward_backward(IMPLEMENTATIONS[name][0], logits, target)
        for name in IMPLEMENTATIONS
        if name in errors
    }
    most = report.options.rounds
    rounds = {name: min(most, LOOP_ROUNDS) if name == LOOP else most for name in runs}
    seconds = interleaved(runs, rounds)
    lines = [
        ratio_line(f"{a} / {b}", seconds, a, b, limit)
        for a, b, limit in LIMITS
        if a in seconds and b in seconds
    ]
    report.section(where, seconds, errors, lines, **inputs.facts(logits, target))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("core", "Time the losses on logits against PyTorch's, interleaved.", rounds=31)
    parser.add_argument("--inputs", nargs="+", default=list(inputs.NAMES), choices=inputs.NAMES)
    chosen = parser.parse_args(arguments)
    size = (1024, 32768)
    if chosen.quick:
        chosen.rounds, size = 2, (128, 8192)
    report = Report("Losses on logits, forward + backward", chosen)
    for name in chosen.inputs:
        for dtype in (torch.float32, torch.bfloat16):
            measure(name, dtype, size, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
