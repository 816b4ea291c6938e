"""Losses from hidden states and a head, on a CPU in bfloat16: `python -m bench.head [--quick]`.

    time        forward + backward against bare matrix products and against what else computes a
                cross-entropy from hidden states
    shapes      the heads of real models by name
    directions  forward and backward apart
    ignored     0, 50 and 90 % of the tokens ignored
    memory      of each loss and of each peer, in a process of its own
    filter      error and time of `grad_filter`

N tokens, D hidden size, V classes. t3 and t2 are the times of three and two bare products. The
bound is t3 (t2 with a frozen weight) and one pass over the logits' bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import inputs, memory, peers
from bench.common import (
    MOST_SECONDS,
    TOLERANCE,
    Line,
    Prepared,
    Report,
    Section,
    Wrong,
    check,
    elapsed,
    interleaved,
    options,
    ratio_line,
    relative_error,
    too_large,
    value_and_grads,
)
from bench.peers import EAGER
from segloss import reference
from segloss.losses import LOSSES, parse_loss
from segloss.train.errors import UserError

# (N, D, V): the heads of Llama 3 (narrowed), Gemma 3 270M, and SmolLM2 1.7B
SHAPES = [(1024, 1024, 128256), (1024, 640, 262144), (2048, 2048, 49152)]
QUICK_SHAPES = [(128, 128, 16032)]
# as many tokens as a minute allows
MODELS = {"Qwen-3-0.6B": (512, 1024, 151936), "Llama-3-8B": (256, 4096, 128256)}
QUICK_MODELS = {"Qwen-3-0.6B, an eighth": (64, 128, 18992)}
# tokens that their training would have: predicted from the above, and measured if that is small
MODEL_TOKENS = 4096
MODEL_PEERS = (EAGER, "torch.compile(eager)", "F.linear_cross_entropy")
SMOLLM2 = (1024, 576, 49152)
TRAINING_ROWS = 2
# rows at which results are compared with float64, fewer above D 2048; times are taken with all
CHECKED_ROWS, CHECKED_NUMBERS = 128, 2**18
# a peer that is this many times slower than our cross-entropy runs once
SLOW = 2.5
# peers return the loss in bfloat16 or add dweight up in it; grad_filter is an approximation
PEER_TOLERANCE, FILTER_TOLERANCE = 3e-2, 3e-2
# one pass over the logits may cost this per element on top of the products
SECONDS_PER_ELEMENT = 1e-9
GRAD_FILTER = 2.0**-12
# V from which grad_filter has to pay
LARGE = 200_000
FILTER_ROWS = 256
# a head without what makes the filter good on real ones, at the size of Gemma-3's
RANDOM = "zipf"

Tensors = tuple[Tensor, Tensor, Tensor]  # hidden, weight, target


# ------------------------------------------------------------------------------ implementations


@dataclass
class Todo:
    """Something to be checked and timed."""

    implementation: Callable[..., Tensor]  # (hidden, weight, target) -> loss
    truth: Callable[..., Tensor]
    tensors: Tensors
    frozen: bool = False
    tolerance: float = TOLERANCE[torch.bfloat16]
    # ours scales its chunks in the check, so that the few rows make as many chunks as all of them
    scalable: bool = False


def ours(name: str, grad_filter: float = 0.0) -> Callable[..., Tensor]:
    loss = parse_loss(name)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, share: float = 1.0) -> Tensor:
        chunk = None
        if share < 1:
            whole = (
                segloss.LinearLogits(hidden, weight)
                .inputs()
                .chunk_rows(int(len(target) / share), trained=True)
            )
            chunk = max(1, int(share * whole)) * weight.shape[0] * weight.element_size()
        source = segloss.LinearLogits(hidden, weight, chunk_bytes=chunk, grad_filter=grad_filter)
        return loss(source, target)

    return run


CE, FOCAL, DICE, LOVASZ = "CE", "focal", "Dice", "Lovász"
SHORT = {CE: "ce", FOCAL: "focal", DICE: "dice", LOVASZ: "lovasz"}
TRUTH = {
    CE: reference.cross_entropy,
    FOCAL: reference.focal_loss,
    DICE: reference.dice_loss,
    LOVASZ: reference.lovasz_softmax,
}
FROZEN, MASKED, FILTERED = "{}, frozen head", "CE, 90 % ignored", "CE, grad_filter 2^-12"
T3, T2, PASS = "t3: three bare products", "t2: two bare products", "one pass: the logits copied"


def our_todo(losses: Sequence[str], tensors: Tensors, frozen: bool = False) -> dict[str, Todo]:
    return {
        FROZEN.format(loss) if frozen else loss: Todo(
            ours(SHORT[loss]), TRUTH[loss], tensors, frozen, scalable=True
        )
        for loss in losses
    }


def peer_todo(found: dict[str, Callable], tensors: Tensors) -> dict[str, Todo]:
    return {
        name: Todo(peer, TRUTH[CE], tensors, tolerance=PEER_TOLERANCE)
        for name, peer in found.items()
    }


# -------------------------------------------------------------------------------- correctness


class Check:
    """Value, dhidden and dweight against float64 on the first rows, D and V whole."""

    def __init__(self, tensors: Tensors):
        hidden, self.weight, target = tensors
        rows = min(CHECKED_ROWS, CHECKED_NUMBERS // hidden.shape[1], hidden.shape[0])
        self.hidden, self.target = hidden[:rows], target[:rows]
        self.share = rows / hidden.shape[0]
        self.truth = None
        self.known: tuple[list[Tensor], list[Tensor]] = [], []

    def naive(self, truth) -> tuple[list[Tensor], list[Tensor]]:
        """(float64, plain PyTorch in the inputs' dtype); only the last one asked for is kept."""

        def loss(h: Tensor, w: Tensor) -> Tensor:
            logits = reference.linear_logits(h, w)
            return truth(logits if h.dtype == torch.float64 else logits.float(), self.target)

        if truth is not self.truth:
            self.known = [], []
            exact = value_and_grads(loss, self.hidden.double(), self.weight.double())
            self.known = exact, value_and_grads(loss, self.hidden, self.weight)
            self.truth = truth
        return self.known

    def __call__(self, todo: Todo) -> tuple[str, float]:
        """(errors, seconds that all rows are predicted to take)."""
        exact, plain = self.naive(todo.truth)
        arguments = (self.target, self.share) if todo.scalable else (self.target,)

        def run(h: Tensor, w: Tensor) -> Tensor:
            return todo.implementation(h, w, *arguments)

        start = time.perf_counter()
        if todo.frozen:
            actual = value_and_grads(lambda h: run(h, self.weight), self.hidden)
        else:
            actual = value_and_grads(run, self.hidden, self.weight)
        seconds = (time.perf_counter() - start) / self.share
        errors = check(actual, exact[: len(actual)], plain[: len(actual)], todo.tolerance)
        return errors, seconds


def checked(todo: dict[str, Todo], section: Section) -> dict[str, float]:
    """Fill in the errors of what agrees with float64, and why the others cannot be timed.

    Returns the predicted seconds of a run. What is compiled and seems slow is run again: it may
    have been the compiler.
    """
    # a size compiled before would make this one compile for any size, or not at all
    if any("compile" in what for what in todo):
        torch.compiler.reset()
    checks: dict[int, Check] = {}
    errors: dict[str, str] = {}
    predicted: dict[str, float] = {}
    # one float64 truth at a time: each is as large as the weight, in doubles
    order = list(TRUTH.values())
    for what, item in sorted(todo.items(), key=lambda pair: order.index(pair[1].truth)):
        compare = checks.setdefault(id(item.tensors), Check(item.tensors))
        pace = min(predicted.values(), default=math.inf)
        try:
            error, seconds = compare(item)
            if "compile" in what and seconds > min(MOST_SECONDS, SLOW * pace):
                error, seconds = compare(item)
        except Wrong as wrong:
            section.wrong[what] = str(wrong)
            continue
        if reason := too_large(seconds, 0):
            section.missing[what] = f"not run, {reason}"
            continue
        errors[what], predicted[what] = error, seconds
    section.errors = {what: errors[what] for what in todo if what in errors}
    return predicted


# --------------------------------------------------------------------------------------- time


def leaves_of(todo: Todo) -> Tensors:
    hidden, weight, target = todo.tensors
    return hidden.detach().requires_grad_(), weight.detach().requires_grad_(not todo.frozen), target


def step(todo: Todo) -> Callable[[], None]:
    """One forward and backward on leaves of its own."""
    hidden, weight, target = leaves_of(todo)

    def run() -> None:
        todo.implementation(hidden, weight, target).backward()
        hidden.grad = weight.grad = None

    return run


def bare(products: int, tensors: Tensors) -> Callable[[], None]:
    hidden, weight, _ = tensors

    def run() -> None:
        dlogits = hidden @ weight.T
        dlogits @ weight
        if products == 3:
            dlogits.T @ hidden

    return run


def one_pass(tensors: Tensors) -> Callable[[], None]:
    """Each logit read and written once, in the part of them that a chunk holds."""
    hidden, weight, _ = tensors
    rows = segloss.LinearLogits(hidden, weight).inputs().chunk_rows(hidden.shape[0], trained=True)
    chunk = torch.zeros(rows, weight.shape[0], dtype=hidden.dtype)
    written = torch.empty_like(chunk)

    def run() -> None:
        for start in range(0, hidden.shape[0], rows):
            part = slice(0, min(rows, hidden.shape[0] - start))
            written[part].copy_(chunk[part])

    return run


def limits(tensors: Tensors) -> dict[str, Callable[[], None]]:
    return {T3: bare(3, tensors), T2: bare(2, tensors), PASS: one_pass(tensors)}


def bounds_of(names) -> dict[str, list[str]]:
    return {name: [T2 if "frozen" in name else T3, PASS] for name in names}


def ignoring(tensors: Tensors, percent: int) -> Tensors:
    hidden, weight, target = tensors
    ignored = torch.arange(target.numel()) % 10 < percent // 10
    return hidden, weight, target.masked_fill(ignored, -100)


def timed(
    todo: dict[str, Todo], predicted: dict[str, float], runs: dict, section: Section, rounds: int
) -> None:
    """Interleaved seconds of `runs` and of what was found right; the slow run once."""
    pace = predicted.get(CE, min(predicted.values(), default=0.0))
    once = {}
    for what in section.errors:
        run = step(todo[what])
        if "compile" in what:
            run()  # for this size
        if predicted[what] > SLOW * pace:
            once[what] = [elapsed(run)]
        else:
            runs[what] = run
    section.seconds = {**interleaved(runs, dict.fromkeys(runs, rounds)), **once}


def where_of(name: str, tensors: Tensors) -> str:
    hidden, weight, _ = tensors
    return "{}, bfloat16, N {}, D {}, V {}".format(name, *hidden.shape, weight.shape[0])


def time_shape(
    name: str,
    tensors: Tensors,
    report: Report,
    others: dict[str, Callable],
    missing: dict[str, str] | None = None,
    frozen: Collection[str] = (),
) -> dict[str, str]:
    """All that is timed at one shape, interleaved; `others` are the peers, those named in
    `frozen` also with a frozen head. Returns the peers that would take too long, and how long.

    Without peers only what can depend on the input: which columns are candidates.
    """
    hidden, weight, target = tensors
    size = (*hidden.shape, weight.shape[0])
    section = Section(
        where_of(name, tensors),
        "head",
        {},
        missing=dict(missing or {}),
        rivals={CE: [*others, *(missing or {})]} if others else {},
        facts=inputs.facts(segloss.LinearLogits(hidden, weight), target),
    )
    todo = our_todo((CE, DICE, LOVASZ), tensors)
    if others:
        todo |= our_todo((FOCAL,), tensors) | our_todo((CE, DICE, LOVASZ), tensors, frozen=True)
        todo[MASKED] = Todo(ours("ce"), TRUTH[CE], ignoring(tensors, 90), scalable=True)
    todo |= peer_todo(others, tensors)
    for name in frozen:
        if name in others:
            todo[FROZEN.format(name)] = replace(todo[name], frozen=True)
            section.rivals.setdefault(FROZEN.format(CE), []).append(FROZEN.format(name))
    predicted = checked(todo, section)
    timed(todo, predicted, limits(tensors), section, report.options.rounds)
    foreign = {name for names in section.rivals.values() for name in names}
    section.bounds = bounds_of(n for n in todo if n not in {*foreign, MASKED})
    section.lines = lines(section.seconds, size, list(todo), list(others))
    report.add(section)
    return {peer: section.missing[peer] for peer in others if peer in section.missing}


def lines(
    seconds: dict[str, list[float]], size: tuple[int, int, int], todo: list, others: list
) -> list[Line]:
    """The lines to be met of what was to be done; one that was not timed says so."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    extra = SECONDS_PER_ELEMENT * size[0] * size[2]
    budgets = [(CE, 1.15, T3)]
    budgets += [(FROZEN.format(loss), 1.2, T2) for loss in (CE, DICE, LOVASZ)]
    found = []
    for name, factor, products in budgets:
        budget = factor * median[products] + extra
        if name in todo and name not in median:
            found.append(Line(name, None, budget, " s", note="was not timed"))
        elif name in todo:
            note = (
                f"{factor} {products[:2]} + 1 ns x N V; "
                f"{median[name] / median[products]:.3g} {products[:2]}"
            )
            found.append(Line(name, median[name], budget, " s", note=note))
    ratios = [(FOCAL, 1.05), (DICE, 1.7), (LOVASZ, 1.7), (MASKED, 0.2)]
    found += [
        ratio_line(f"{name} / CE", seconds, name, CE, limit)
        for name, limit in ratios
        if name in todo
    ]
    right = [name for name in others if name in median]
    if right:
        best = min(right, key=median.__getitem__)
        found.append(ratio_line("CE / fastest peer", seconds, CE, best, 1.1, best))
    return found


# -------------------------------------------------------------------- models, directions, ignored


def time_model(name: str, tensors: Tensors, report: Report, others: dict[str, Callable]) -> None:
    """A head by name, with fewer tokens than its training would have."""
    hidden, weight, target = tensors
    others = {peer: others[peer] for peer in MODEL_PEERS if peer in others}
    section = Section(
        where_of(name, tensors),
        "models",
        {},
        rivals={CE: list(others)},
        facts=inputs.facts(segloss.LinearLogits(hidden, weight), target),
    )
    todo = our_todo((CE, DICE, LOVASZ), tensors) | our_todo((CE,), tensors, frozen=True)
    section.bounds = bounds_of(todo)
    todo |= peer_todo(others, tensors)
    predicted = checked(todo, section)
    rounds = max(2, report.options.rounds // 2)
    timed(todo, predicted, limits(tensors), section, rounds)
    growth = MODEL_TOKENS / hidden.shape[0]
    for what in (CE, EAGER):
        if what in section.seconds:
            seconds = (1 + rounds) * growth * statistics.median(section.seconds[what])
            per_logit = memory.EAGER_BYTES_PER_LOGIT if what == EAGER else 0
            size = MODEL_TOKENS * weight.shape[0] * per_logit + 8 * weight.numel()
            reason = too_large(seconds, size)
            section.missing[f"{what}, N {MODEL_TOKENS}"] = reason or "see the growth with N"
    report.add(section)


DIRECTIONS = ("forward, no gradient", "forward", "backward")


def directions(name: str, tensors: Tensors, report: Report) -> None:
    """Forward without and with a graph, and backward. Token losses make their gradients in forward,
    while the logits are there."""
    todo = our_todo(tuple(SHORT), tensors) | our_todo((CE,), tensors, frozen=True)
    todo |= peer_todo({EAGER: peers.eager}, tensors)
    whole = Section("", "", {})
    checked(todo, whole)
    section = Section(f"apart, {where_of(name, tensors)}", "directions", {}, wrong=whole.wrong)
    runs: dict = {}
    for what, error in whole.errors.items():
        hidden, weight, target = leaves_of(todo[what])

        def forward(loss=todo[what].implementation, leaves=(hidden, weight, target)):
            return loss(*leaves)

        def backward(value: Tensor, leaves=(hidden, weight)) -> None:
            value.backward()
            for leaf in leaves:
                leaf.grad = None

        def bare_forward(run=forward):
            with torch.no_grad():
                return run()

        steps = bare_forward, forward, Prepared(forward, backward)
        for part, run in zip(DIRECTIONS, steps, strict=True):
            runs[f"{what}: {part}"] = run
            section.errors[f"{what}: {part}"] = error
    section.seconds = interleaved(runs, dict.fromkeys(runs, report.options.rounds))
    section.rivals = {f"{CE}: {part}": [f"{EAGER}: {part}"] for part in DIRECTIONS}
    report.add(section)


IGNORED = (0, 50, 90)


def ignored(name: str, tensors: Tensors, report: Report) -> None:
    section = Section(f"ignored tokens, {where_of(name, tensors)}", "ignored", {})
    todo: dict[str, Todo] = {}
    for percent in IGNORED:
        some = ignoring(tensors, percent)
        mine = our_todo((CE, LOVASZ), some) | our_todo((CE,), some, frozen=True)
        both = mine | peer_todo({EAGER: peers.eager}, some)
        todo |= {f"{what}, {percent} %": item for what, item in both.items()}
    checked(todo, section)
    runs = {what: step(todo[what]) for what in section.errors}
    section.seconds = interleaved(runs, dict.fromkeys(runs, report.options.rounds))
    section.rivals = {f"{CE}, {p} %": [f"{EAGER}, {p} %"] for p in IGNORED}
    section.lines = [
        ratio_line(f"{what}, {p} % / 0 %", section.seconds, f"{what}, {p} %", f"{what}, 0 %", limit)
        for what in (CE, FROZEN.format(CE), LOVASZ, EAGER)
        for p, limit in ((50, None), (90, 0.2 if what != EAGER else None))
    ]
    report.add(section)


# ------------------------------------------------------------------------------------- memory


def all_memory(report: Report, size: tuple[int, int, int], names: Sequence[str]) -> None:
    """Each loss against a tenth of eager cross-entropy, the float32 sum of dweight aside."""
    where = "memory above inputs and gradients, bfloat16, N {}, D {}, V {}".format(*size)
    section = Section(where, "memory", {})
    mib = 2**20
    try:
        baseline = memory.measured(EAGER, size)
    except memory.NotMeasured as reason:
        section.missing = dict.fromkeys(
            [EAGER, *(LOSSES[name].__name__ for name in names)], str(reason)
        )
        report.add(section)
        return
    section.lines.append(Line(EAGER, baseline / mib, None, " MiB"))
    for name in names:
        whole, accumulator = memory.measured(name, size), memory.accumulator_bytes(name, size)
        note = (
            f"{whole / baseline:.1%} of eager in all; float32 dweight {accumulator / mib:.0f} MiB"
        )
        section.lines.append(
            Line(
                LOSSES[name].__name__,
                (whole - accumulator) / mib,
                baseline / mib / 10,
                " MiB",
                note=note,
            )
        )
    report.add(section)


def peer_memory(report: Report, size: tuple[int, int, int], names: Sequence[str], missing) -> None:
    """Cross-entropy of each peer, and ours in a tenth of eager's."""
    where = "memory of peers above inputs and gradients, bfloat16, N {}, D {}, V {}".format(*size)
    section = Section(where, "memory", {}, missing=dict(missing))
    bytes_of = {}
    for name in (*names, "ce", "ce:frozen"):
        try:
            bytes_of[name] = memory.measured(name, size)
        except memory.NotMeasured as reason:
            section.missing[name] = str(reason)
    for name, value in bytes_of.items():
        limit = bytes_of[EAGER] / 2**20 / 10 if name == "ce" and EAGER in bytes_of else None
        note = f"{value / bytes_of[EAGER]:.1%} of eager" if EAGER in bytes_of else ""
        if name == "ce":
            accumulator = memory.accumulator_bytes(name, size)
            value -= accumulator
            note += f" in all; float32 dweight {accumulator / 2**20:.0f} MiB"
        label = {"ce": "CrossEntropyLoss", "ce:frozen": "CrossEntropyLoss, frozen head"}
        section.lines.append(Line(label.get(name, name), value / 2**20, limit, " MiB", note=note))
    report.add(section)


def gemma_memory(report: Report, num_tokens: int, num_classes: int) -> None:
    """The whole process, interpreter and libraries included, at Gemma-3-270M's head."""
    size = (num_tokens, 640, num_classes)
    section = Section(
        "peak of a whole training process, bfloat16, N {}, D {}, V {}".format(*size), "memory", {}
    )
    what = "CrossEntropyLoss, whole process"
    try:
        peak = memory.measured("ce", size, whole=True) / 2**30
        section.lines = [Line(what, peak, 3.0, " GiB")]
    except memory.NotMeasured as reason:
        section.lines = [Line(what, None, 3.0, " GiB", note=str(reason))]
    report.add(section)


# -------------------------------------------------------------------------------- grad_filter


def plain_dropping(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """dhidden, dweight of the mean cross-entropy, the same columns of a block left out entirely."""
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for rows in torch.arange(hidden.shape[0]).split(FILTER_ROWS):
        dlogits = torch.softmax(hidden[rows] @ weight.T, -1)
        dlogits[torch.arange(len(rows)), target[rows]] -= 1
        kept = (dlogits.abs().amax(0) >= GRAD_FILTER).nonzero()[:, 0]
        dlogits = dlogits[:, kept] / hidden.shape[0]
        dhidden[rows] = dlogits @ weight[kept]
        dweight[kept] += dlogits.T @ hidden[rows]
    return [dhidden, dweight]


def filter_errors(report: Report, model: str, num_tokens: int) -> None:
    """On hidden states of a real model, in float32, so that only the filter's error shows.

    On random ones, which no limit is set on, small columns share no direction that could be merged.
    """
    real = model != RANDOM
    if real:
        hidden, weight, target = inputs.real_head(model, num_tokens)
    else:
        hidden, weight, target = inputs.zipf_head(RANDOM, num_tokens, *SHAPES[1][1:])
    title = "grad_filter 2^-12, {}, float32, N {}, D {}, V {}".format(
        model, *hidden.shape, weight.shape[0]
    )
    _, *exact = value_and_grads(
        lambda h, w: F.cross_entropy(F.linear(h, w), target), hidden.double(), weight.double()
    )
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    source = segloss.LinearLogits(*leaves, grad_filter=GRAD_FILTER)
    segloss.cross_entropy(source, target).backward()
    filtered = [relative_error(leaf.grad, truth) for leaf, truth in zip(leaves, exact, strict=True)]
    dropped = [
        relative_error(grad, truth)
        for grad, truth in zip(plain_dropping(hidden, weight, target), exact, strict=True)
    ]
    found = [
        Line("relative error of dhidden", 100 * filtered[0], 0.6 if real else None, " %"),
        Line("relative error of dweight", 100 * filtered[1], 0.2 if real else None, " %"),
        Line("dhidden / plain dropping's", filtered[0] / dropped[0], 1 / 5 if real else None),
        Line("dweight / plain dropping's", filtered[1] / dropped[1], None),
    ]
    facts = {
        "plain dropping": f"{dropped[0]:.2%} in dhidden, {dropped[1]:.2%} in dweight",
        "merged": f"{float(source.report['dropped_mass']):.2%} of |dlogits|",
    }
    facts |= inputs.facts(source, target)
    report.add(Section(title, "filter", {}, lines=found, facts=facts))


def filter_time(report: Report, model: str, num_tokens: int) -> None:
    """On the same states in bfloat16: which columns are small is a matter of the model."""
    hidden, weight, target = inputs.real_head(model, num_tokens)
    tensors = hidden.to(torch.bfloat16), weight.to(torch.bfloat16), target
    section = Section(where_of(f"grad_filter 2^-12, {model}", tensors), "filter", {})
    todo = our_todo((CE,), tensors)
    todo[FILTERED] = Todo(
        ours("ce", GRAD_FILTER), TRUTH[CE], tensors, tolerance=FILTER_TOLERANCE, scalable=True
    )
    predicted = checked(todo, section)
    timed(todo, predicted, {T3: bare(3, tensors)}, section, report.options.rounds)
    limit = 1.0 if weight.shape[0] >= LARGE else None
    section.lines = [
        ratio_line(f"{FILTERED} / CE", section.seconds, FILTERED, CE, limit),
        ratio_line(f"{FILTERED} / t3 (goal)", section.seconds, FILTERED, T3, limit and 0.75),
    ]
    report.add(section)


def filter_training(report: Report, steps: int) -> None:
    """SmolLM2 fine-tuned from the same start on the same batches, with the filter and without."""
    losses = {limit: trained(limit, steps) for limit in (0.0, GRAD_FILTER)}
    exact, filtered = (statistics.mean(values[-10:]) for values in losses.values())
    title = f"grad_filter 2^-12, {steps} training steps of SmolLM2-135M"
    found = [
        Line("loss of the last 10 steps, difference", 100 * abs(filtered / exact - 1), 1.0, " %")
    ]
    facts = {
        "without": f"{losses[0.0][0]:.4f} at first, {exact:.4f} at the end",
        "with": f"{losses[GRAD_FILTER][0]:.4f} at first, {filtered:.4f} at the end",
    }
    report.add(Section(title, "filter", {}, lines=found, facts=facts))


def trained(grad_filter: float, steps: int) -> list[float]:
    """The loss of every step."""
    from bench.candidates import batches
    from segloss.integrations.transformers import head_logits
    from segloss.train import model as models

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        network, tokenizer = models.load("smollm2")
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-5, weight_decay=0.0)
    data = batches(tokenizer, 200, random.Random(0))
    losses = []
    for _ in range(steps):
        ids, mask, target = (part[:TRAINING_ROWS] for part in next(data))
        with torch.autocast("cpu", torch.bfloat16):
            source = head_logits(network, input_ids=ids, attention_mask=mask, use_cache=False)
            loss = segloss.cross_entropy(replace(source, grad_filter=grad_filter), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(
        "head", "Time and memory of the losses on hidden states, interleaved.", rounds=3
    )
    parts = ("filter", "memory", "directions", "ignored", "shapes", "time")
    # "training" takes some minutes: for those who change the filter
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=(*parts, "training"))
    parser.add_argument(
        "--filter-models", nargs="+", default=["smollm2", "gemma3", RANDOM],
        metavar="MODEL", help="for grad_filter: of segloss train, gemma3, or zipf: random weights",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    shapes, models, num_tokens = SHAPES, MODELS, SMOLLM2[0]
    memory_size, names = (4096, 1024, 128256), list(LOSSES)
    gemma = (8192, 262144)
    if chosen.quick:
        chosen.rounds, shapes, models, num_tokens = 2, QUICK_SHAPES, QUICK_MODELS, 128
        chosen.filter_models = chosen.filter_models[:1]
        memory_size, names, gemma = (512, 128, 16032), ["ce", "dice", "lovasz"], (512, 32768)
    warnings.filterwarnings("ignore", module="torch")  # of compilers, about this machine
    report = Report("Losses on hidden states, forward + backward", chosen)
    others, missing = peers.head()
    hidden, weight, target = inputs.real_head("smollm2", num_tokens)
    real = hidden.to(torch.bfloat16), weight.to(torch.bfloat16), target
    if "filter" in chosen.parts:
        for model in chosen.filter_models:
            try:
                filter_errors(report, model, num_tokens)
            except (UserError, ImportError) as reason:  # the model is not installed
                title = f"grad_filter 2^-12, {model}"
                report.add(Section(title, "filter", {}, missing={title: str(reason)}))
            else:
                if model != RANDOM:
                    filter_time(report, model, num_tokens)
    if "training" in chosen.parts:
        filter_training(report, 4 if chosen.quick else 100)
    if "memory" in chosen.parts:
        all_memory(report, memory_size, names)
        few = [EAGER] if chosen.quick else [name for name in others if "cross_entropy(" not in name]
        peer_memory(report, (num_tokens, *shapes[0][1:]), few, missing)
        gemma_memory(report, *gemma)
    if "directions" in chosen.parts:
        directions("SmolLM2-135M, real states", real, report)
    if "ignored" in chosen.parts:
        ignored("SmolLM2-135M, real states", real, report)
    if "shapes" in chosen.parts:
        time_shape("SmolLM2-135M, real states", real, report, others, missing, MODEL_PEERS)
        for name, size in models.items():
            time_model(f"{name}, zipf", inputs.head_of("zipf", *size), report, others)
    if "time" in chosen.parts:
        for size in shapes:
            slow = time_shape("zipf", inputs.head_of("zipf", *size), report, others, missing)
            # what a check would take there alone is a minute at each of the other shapes
            others = {name: peer for name, peer in others.items() if name not in slow}
            missing = missing | {name: f"{why} at V {size[2]}" for name, why in slow.items()}
            time_shape("saturated", inputs.head_of("saturated", *size), report, {})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
