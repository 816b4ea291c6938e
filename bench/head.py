"""Losses from hidden states and a head, on a CPU in bfloat16: `python -m bench.head [--quick]`.

Time against bare matrix products of the same shape and against what else computes a cross-entropy
from hidden states; memory of each loss in a process of its own; error of `grad_filter`.

N tokens, D hidden size, V classes. t3 and t2 are the times of three and two bare products.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import inputs
from bench.common import (
    TOLERANCE,
    Line,
    Report,
    Wrong,
    check,
    interleaved,
    options,
    ratio_line,
    relative_error,
    value_and_grads,
)
from segloss import reference
from segloss.logits import CPU_CHUNK_BYTES
from segloss.train.expression import LOSSES, parse_loss

# (N, D, V): the heads of Llama 3 (narrowed), Gemma 3 270M, and SmolLM2 1.7B
SHAPES = [(1024, 1024, 128256), (1024, 640, 262144), (2048, 2048, 49152)]
QUICK_SHAPES = [(128, 128, 16032)]
# rows at which results are compared with float64; times are taken with all of them
CHECKED_ROWS = 128
# a peer that takes longer for these rows is not timed with all of them
SLOW_SECONDS = 20.0
# peers return the loss in bfloat16 or add dweight up in it; grad_filter is an approximation
PEER_TOLERANCE, FILTER_TOLERANCE = 3e-2, 3e-2
# one pass over the logits may cost this per element on top of the products
SECONDS_PER_ELEMENT = 1e-9
GRAD_FILTER = 2.0**-12
FILTER_ROWS = 256

Tensors = tuple[Tensor, Tensor, Tensor]  # hidden, weight, target


# ------------------------------------------------------------------------------ implementations


@dataclass
class Todo:
    """Something to be checked and timed."""

    # (hidden, weight, target, share) -> loss; ours scales its chunks by `share`, so that the few
    # rows that are checked make as many chunks as all that are timed
    implementation: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    tensors: Tensors
    frozen: bool = False
    tolerance: float = TOLERANCE[torch.bfloat16]


def ours(name: str, grad_filter: float = 0.0) -> Callable[..., Tensor]:
    loss = parse_loss(name)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, share: float = 1.0) -> Tensor:
        chunk = max(1, int(share * CPU_CHUNK_BYTES))
        source = segloss.LinearLogits(hidden, weight, chunk_bytes=chunk, grad_filter=grad_filter)
        return loss(source, target)

    return run


def eager(hidden: Tensor, weight: Tensor, target: Tensor, share: float = 1.0) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_linear(chunks: str, hidden, weight, target, share: float = 1.0) -> Tensor:
    """PyTorch's own: without chunks, with those it chooses, or with as many rows as ours."""
    chosen = None
    if chunks == "own":
        chosen = torch.nn.LinearCrossEntropyOptions()
    elif chunks == "ours":
        rows = segloss.LinearLogits(hidden.detach(), weight.detach()).chunk_rows(len(target))
        chosen = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(hidden, weight, target, options=chosen)


def peers() -> dict[str, Callable[..., Tensor]]:
    """What else makes a cross-entropy of hidden states here; says what is left out, and why."""
    found: dict[str, Callable[..., Tensor]] = {EAGER: eager}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = functools.partial(torch_linear, "none")
        found["F.linear_cross_entropy(options)"] = functools.partial(torch_linear, "own")
        found["F.linear_cross_entropy(our chunks)"] = functools.partial(torch_linear, "ours")
    else:
        print(f"F.linear_cross_entropy left out: torch {torch.__version__} does not have it")
    compiled = torch.compile(eager)
    found["torch.compile(eager)"] = lambda h, w, y, share=1.0: compiled(h, w, y)
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["CCE, torch_compile"] = lambda h, w, y, share=1.0: linear_cross_entropy(
            h, w, y, impl="torch_compile"
        )
    except ImportError as error:
        print(f"CCE left out: {error} (pip install '.[bench]')")
    return {name: peer for name, peer in found.items() if works(name, peer)}


def works(name: str, peer: Callable[..., Tensor]) -> bool:
    """Whether a peer runs at all on this machine: compilers need a C++ compiler."""
    hidden, weight = torch.randn(2, 16, 8).to(torch.bfloat16)
    try:
        value_and_grads(lambda h, w: peer(h, w, torch.arange(16)), hidden, weight)
    except Exception as error:  # a foreign library fails in any way; the report says how
        print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


EAGER = "eager, float32 logits"
CE, FOCAL, DICE, LOVASZ = "CE", "focal", "Dice", "Lovász"
SHORT = {CE: "ce", FOCAL: "focal", DICE: "dice", LOVASZ: "lovasz"}
TRUTH = {
    CE: reference.cross_entropy,
    FOCAL: reference.focal_loss,
    DICE: reference.dice_loss,
    LOVASZ: reference.lovasz_softmax,
}
FROZEN, MASKED, FILTERED = "{}, frozen head", "CE, 90 % ignored", "CE, grad_filter 2^-12"
T3, T2 = "t3: three bare products", "t2: two bare products"


# -------------------------------------------------------------------------------- correctness


class TooSlow(Exception):
    """A peer that would take most of the hour."""


class Check:
    """Value, dhidden and dweight against float64 on the first rows, D and V whole."""

    def __init__(self, tensors: Tensors):
        hidden, self.weight, target = tensors
        rows = min(CHECKED_ROWS, hidden.shape[0])
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
            exact = value_and_grads(loss, self.hidden.double(), self.weight.double())
            self.known = exact, value_and_grads(loss, self.hidden, self.weight)
            self.truth = truth
        return self.known

    def __call__(self, todo: Todo) -> str:
        exact, plain = self.naive(todo.truth)

        def run(h: Tensor, w: Tensor) -> Tensor:
            return todo.implementation(h, w, self.target, self.share)

        def results() -> tuple[list[Tensor], float]:
            start = time.perf_counter()
            if todo.frozen:
                actual = value_and_grads(lambda h: run(h, self.weight), self.hidden)
            else:
                actual = value_and_grads(run, self.hidden, self.weight)
            return actual, time.perf_counter() - start

        actual, seconds = results()
        if seconds > SLOW_SECONDS:  # or was it the compiler?
            actual, seconds = results()
        if seconds > SLOW_SECONDS:
            raise TooSlow(f"{seconds:.0f} s for {len(self.target)} rows alone")
        return check(actual, exact[: len(actual)], plain[: len(actual)], todo.tolerance)


# --------------------------------------------------------------------------------------- time


def step(todo: Todo) -> Callable[[], None]:
    """One forward and backward on leaves of its own."""
    hidden, weight, target = todo.tensors
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(not todo.frozen)

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


def mostly_ignored(tensors: Tensors) -> Tensors:
    hidden, weight, target = tensors
    ignored = torch.arange(target.numel()) % 10 != 0
    return hidden, weight, target.masked_fill(ignored, -100)


def errors_of(todo: dict[str, Todo], report: Report, where: str) -> dict[str, str]:
    """Those that agree with float64, in the given order, with their errors."""
    checks: dict[int, Check] = {}
    errors: dict[str, str] = {}
    # one float64 truth at a time: each is as large as the weight, in doubles
    for what, item in sorted(
        todo.items(), key=lambda pair: list(TRUTH.values()).index(pair[1].truth)
    ):
        compare = checks.setdefault(id(item.tensors), Check(item.tensors))
        try:
            errors[what] = compare(item)
        except Wrong as wrong:
            report.found_wrong(f"{what}, {where}", wrong)
        except TooSlow as slow:
            print(f"{what} left out: {slow}", flush=True)
    return {what: errors[what] for what in todo if what in errors}


def time_shape(name: str, tensors: Tensors, report: Report, others: dict) -> None:
    """All that is timed at one shape, interleaved; `others` are the peers."""
    hidden, weight, _ = tensors
    size = (*hidden.shape, weight.shape[0])
    where = "{}, bfloat16, N {}, D {}, V {}".format(name, *size)
    todo = {
        **{loss: Todo(ours(SHORT[loss]), TRUTH[loss], tensors) for loss in SHORT},
        **{
            FROZEN.format(loss): Todo(ours(SHORT[loss]), TRUTH[loss], tensors, frozen=True)
            for loss in (CE, DICE, LOVASZ)
        },
        MASKED: Todo(ours("ce"), TRUTH[CE], mostly_ignored(tensors)),
        **{
            peer: Todo(implementation, TRUTH[CE], tensors, tolerance=PEER_TOLERANCE)
            for peer, implementation in others.items()
        },
    }
    if size[2] >= 200_000:
        todo[FILTERED] = Todo(
            ours("ce", GRAD_FILTER), TRUTH[CE], tensors, tolerance=FILTER_TOLERANCE
        )
    errors = errors_of(todo, report, where)
    runs = {T3: bare(3, tensors), T2: bare(2, tensors)}
    for what in errors:
        runs[what] = step(todo[what])
        runs[what]()  # compilers compile for this size now
    rounds = dict.fromkeys(runs, report.options.rounds)
    seconds = interleaved(runs, rounds)
    source = segloss.LinearLogits(hidden, weight)
    facts = inputs.facts(source, tensors[2])
    report.section(where, seconds, errors, lines(seconds, size, list(others)), **facts)


def lines(seconds: dict[str, list[float]], size: tuple[int, int, int], others: list) -> list[Line]:
    """The lines to be met, of what was timed."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    extra = SECONDS_PER_ELEMENT * size[0] * size[2]
    budgets = [(CE, 1.15, T3)]
    budgets += [(FROZEN.format(loss), 1.2, T2) for loss in (CE, DICE, LOVASZ)]
    found = [
        Line(
            name,
            median[name],
            factor * median[products] + extra,
            " s",
            note=f"{factor} {products[:2]} + 1 ns x N V; {median[name] / median[products]:.3g} "
            f"{products[:2]}",
        )
        for name, factor, products in budgets
        if name in median
    ]
    ratios = [(FOCAL, 1.05), (DICE, 1.7), (LOVASZ, 1.7), (MASKED, 0.2), (FILTERED, 1.0)]
    if CE in median:
        for name, limit in ratios:
            if name in median:
                found.append(ratio_line(f"{name} / CE", seconds, name, CE, limit))
        timed = [name for name in others if name in median]
        if timed:
            best = min(timed, key=median.__getitem__)
            found.append(ratio_line("CE / fastest peer", seconds, CE, best, 1.1, best))
    if FILTERED in median:
        found.append(ratio_line(f"{FILTERED} / t3 (goal)", seconds, FILTERED, T3, 0.75))
    return found


# ------------------------------------------------------------------------------------- memory


def memory_child(name: str, size: Sequence[int]) -> int:
    """Print as JSON what one forward and backward allocates, in bytes; run in a fresh process."""
    loss = eager if name == "eager" else ours(name)
    # libraries, thread pools and their buffers come first, at a size that does not count
    step(Todo(loss, TRUTH[CE], head_of("zipf", 8, 16, 64)))()
    hidden, weight, target = head_of("zipf", *size)
    hidden.requires_grad_()
    weight.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present
    before = resident("VmRSS")
    loss(hidden, weight, target).backward()
    peak = resident("VmHWM") - before
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    print(json.dumps({"bytes": peak - gradients}))
    return 0


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def accumulator_bytes(name: str, size: Sequence[int]) -> int:
    """The float32 sum of dweight: only where gradients of several chunks are added up."""
    num_tokens, width, num_classes = size
    hidden = torch.zeros(num_tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(num_classes, 1, dtype=torch.bfloat16)
    rows = segloss.LinearLogits(hidden, weight).chunk_rows(num_tokens)
    several = rows < num_tokens and parse_loss(name).is_token_loss
    return 4 * num_classes * width if several else 0


def memory_of(name: str, size: Sequence[int]) -> int:
    command = [sys.executable, "-m", "bench.head", "--memory-child", name, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def memory(report: Report, size: tuple[int, int, int], names: Sequence[str]) -> None:
    """Each loss against a tenth of eager cross-entropy, the float32 sum of dweight aside."""
    if sys.platform != "linux":
        print("memory left out: it is read from /proc")
        return
    mib = 2**20
    baseline = memory_of("eager", size)
    found = [Line("eager cross-entropy", baseline / mib, None, " MiB", note="float32 logits")]
    for name in names:
        whole, accumulator = memory_of(name, size), accumulator_bytes(name, size)
        note = (
            f"{whole / baseline:.1%} of eager in all; float32 dweight {accumulator / mib:.0f} MiB"
        )
        found.append(
            Line(LOSSES[name], (whole - accumulator) / mib, baseline / mib / 10, " MiB", note=note)
        )
    where = "memory above inputs and gradients, bfloat16, N {}, D {}, V {}".format(*size)
    report.section(where, {}, {}, found)


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
    """On hidden states of a real model, in float32, so that only the filter's error shows."""
    hidden, weight, target = inputs.real_head(model, num_tokens)
    where = "grad_filter 2^-12, {}, float32, N {}, D {}, V {}".format(
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
        Line("relative error of dhidden", 100 * filtered[0], 0.6, " %"),
        Line("relative error of dweight", 100 * filtered[1], 0.2, " %"),
        Line("dhidden / plain dropping's", filtered[0] / dropped[0], 1 / 5),
        Line("dweight / plain dropping's", filtered[1] / dropped[1], None),
    ]
    facts = {
        "plain dropping": f"{dropped[0]:.2%} in dhidden, {dropped[1]:.2%} in dweight",
        "merged": f"{float(source.report['dropped_mass']):.2%} of |dlogits|",
    }
    report.section(where, {}, {}, found, **facts, **inputs.facts(source, target))


# --------------------------------------------------------------------------------------- main


def head_of(name: str, num_tokens: int, width: int, num_classes: int) -> Tensors:
    hidden, weight, target = inputs.zipf_head(name, num_tokens, width, num_classes)
    return hidden.to(torch.bfloat16), weight.to(torch.bfloat16), target


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(
        "head", "Time and memory of the losses on hidden states, interleaved.", rounds=5
    )
    parts = ("time", "memory", "filter")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument(
        "--filter-models", nargs="+", default=["smollm2"], metavar="MODEL",
        help="models for grad_filter, as for segloss train --model",
    )  # fmt: skip
    parser.add_argument("--memory-child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.memory_child:
        name, *size = chosen.memory_child
        return memory_child(name, [int(n) for n in size])
    shapes, num_tokens = SHAPES, 1024
    memory_size, names = (4096, 1024, 128256), list(LOSSES)
    if chosen.quick:
        chosen.rounds, shapes, num_tokens = 2, QUICK_SHAPES, 256
        memory_size, names = (512, 128, 16032), ["ce", "dice", "lovasz"]
    warnings.filterwarnings("ignore", module="torch")  # of compilers, about this machine
    report = Report("Losses on hidden states, forward + backward", chosen)
    if "filter" in chosen.parts:
        for model in chosen.filter_models:
            filter_errors(report, model, num_tokens)
    if "memory" in chosen.parts:
        memory(report, memory_size, names)
    if "time" in chosen.parts:
        others = peers()
        for size in shapes:
            time_shape("zipf", head_of("zipf", *size), report, others)
            time_shape("saturated", head_of("saturated", *size), report, {})
        hidden, weight, target = inputs.real_head("smollm2", num_tokens)
        real = hidden.to(torch.bfloat16), weight.to(torch.bfloat16), target
        time_shape("smollm2", real, report, {})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
