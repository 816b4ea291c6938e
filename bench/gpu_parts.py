"""What `bench/gpu.py` measures, a part at a time, each in a process of its own.

A part takes a `Bench` and records measurements, one after the other; what cannot run is a finding
and does not keep the others from running. N tokens, V classes, D hidden size.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import limits
from bench.common import check, quartiles, value_and_grads
from bench.inputs import zipf_prior
from segloss import reference

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3  # of bf16, on top of twice the error of plain PyTorch
# rows of the comparison with float64: all would take as long as everything else
CHECKED = 256


# ------------------------------------------------------------------------------------ the sizes


@dataclass(frozen=True)
class Sizes:
    heads: dict[str, tuple[int, int, int]]  # name -> (N, V, D), the most telling first
    small: dict[str, tuple[int, int, int]]  # where launches may decide
    widths: tuple[int, ...]  # V of the kernels alone
    logit_bytes: int  # there
    gemm: int  # m = n = k
    copied: int  # bytes
    big: tuple[int, int, int]  # more than 2^31 logits
    modes: tuple[int, int, int]
    chunks: tuple[int, ...]  # bytes


FULL = Sizes(
    heads={
        "Llama-3 8B": (4096, 128256, 4096),
        "Llama-3 8B, N = 8192": (8192, 128256, 4096),
        "Gemma-3 1B": (8192, 262144, 1152),
        "Qwen-3 8B": (8192, 151936, 4096),
        "SmolLM2 135M": (8192, 49152, 576),
    },
    small={
        "Llama-3 8B": (512, 128256, 4096),
        "Gemma-3 1B": (512, 262144, 1152),
        "SmolLM2 135M": (512, 49152, 576),
    },
    widths=(32768, 128256, 262144),
    logit_bytes=2 << 30,
    gemm=8192,
    copied=2 << 30,
    big=(2**14 + 64, 131072, 64),
    modes=(2048, 32000, 512),
    chunks=tuple(1 << k for k in range(27, 33)),
)
# does everything run: the figures mean nothing
TINY = Sizes(
    heads={"tiny": (32, 256, 32)},
    small={"tiny": (16, 256, 32)},
    widths=(256,),
    logit_bytes=1 << 12,
    gemm=64,
    copied=1 << 12,
    big=(70, 300, 8),
    modes=(32, 200, 16),
    chunks=(1 << 13, 1 << 15),
)


# ------------------------------------------------------------------------------------ measuring


class Bench:
    """A part's device, sizes and records; `deadline` on `time.monotonic`."""

    def __init__(self, part: str, output: Path, tiny: bool, deadline: float):
        self.part, self.output, self.deadline = part, output, deadline
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.tiny, self.sizes = tiny, TINY if tiny else FULL

    def record(self, name: str, **values) -> None:
        """One line of the file of results, complete before the next measurement begins."""
        line = json.dumps({"part": self.part, "name": name, **values}, default=str)
        with open(self.output / "results.jsonl", "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def late(self, needed: float) -> bool:
        """Whether so many seconds are no longer left."""
        return time.monotonic() + needed > self.deadline

    @contextmanager
    def attempt(self, name: str):
        """What fails inside is recorded; what takes the device with it ends the part."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.record(name, failed=text[:500])
            if "CUDA error" in text or "illegal memory" in text or "device-side" in text:
                raise
        finally:
            self.clear()

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, run: Callable, reps: int = 10, warm: int = 2) -> dict:
        """Milliseconds on the device, those of the host until it has asked for all, peak MB."""
        for _ in range(warm):
            run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        once = time.perf_counter() - start
        reps = max(3, min(reps, int(4 / max(once, 1e-6)))) if not self.tiny else 3
        marks, host = [], []
        for _ in range(reps):
            first, begin = mark(self.device), time.perf_counter()
            run()
            host.append(1e3 * (time.perf_counter() - begin))
            marks.append((first, mark(self.device)))
        self.synchronize()
        low, middle, high = quartiles([between(*pair) for pair in marks])
        found = {"ms": middle, "low": low, "high": high, "host_ms": statistics.median(host)}
        return found | {"peak_MB": self.peak(run)}

    def peak(self, run: Callable) -> float | None:
        """Device memory of one run above what was there before."""
        if not self.cuda:
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def measure(
        self, name: str, run: Callable, flop: float = 0, moved: float = 0, over=None, **facts
    ) -> dict | None:
        """Time a run and record it; `over`: the time of what it is held against."""
        with self.attempt(name):
            found = self.time(run)
            if flop:
                found["TFLOPs"] = flop / found["ms"] / 1e9
            if moved:
                found["GBps"] = moved / found["ms"] / 1e6
            if over:
                found["ratio"] = found["ms"] / over["ms"]
            self.record(name, **found, **facts)
            return found
        return None

    def problem(self, size: tuple[int, int, int], dtype=torch.bfloat16) -> tuple:
        """(hidden, weight, target) made on the device: Zipf targets, states that lean to them."""
        n, v, d = size
        generator = torch.Generator().manual_seed(0)
        target = torch.multinomial(zipf_prior(v, generator), n, True, generator=generator)
        target = target.to(self.device)
        random = torch.Generator(device=self.device).manual_seed(0)
        weight = torch.randn(v, d, generator=random, device=self.device).mul_(d**-0.5).to(dtype)
        hidden = torch.randn(n, d, generator=random, device=self.device)
        lift = 24 * torch.rand(n, 1, generator=random, device=self.device)
        return (hidden + lift * weight[target].float()).to(dtype), weight, target


def mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Milliseconds."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def true_dlogits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """softmax - onehot: what the products of a step really meet, whose power they draw."""
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    for i in range(0, hidden.shape[0], 1024):
        p = torch.softmax((hidden[i : i + 1024] @ weight.T).float(), -1)
        p[torch.arange(p.shape[0], device=p.device), target[i : i + 1024]] -= 1
        out[i : i + 1024] = p
    return out


def products(hidden: Tensor, weight: Tensor, target: Tensor, frozen: bool = False) -> Callable:
    """The three (two) bare products of a head, on true dlogits, into memory that is there."""
    dlogits = true_dlogits(hidden, weight, target)
    z, dh, dw = torch.empty_like(dlogits), torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=z)
        torch.mm(dlogits, weight, out=dh)
        if not frozen:
            torch.mm(dlogits.T, hidden, out=dw)

    return run


def step(loss: Callable, leaves: list[Tensor], target: Tensor) -> Callable[[], None]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def run() -> None:
        torch.autograd.grad(loss(*leaves, target), wanted)

    return run


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target)


def ours(name: str, **options) -> Callable[..., Tensor]:
    # every target is valid: compacting would only wait for their count
    options = {"compact": False} | options
    return lambda h, w, t: getattr(segloss, f"linear_{name}")(h, w, t, **options)


def verify(loss: Callable, hidden: Tensor, weight: Tensor, target: Tensor, truth=None) -> str:
    """Value and gradients on the first rows against float64; raises `bench.common.Wrong`."""
    few, y = (hidden[:CHECKED], weight), target[:CHECKED]
    naive = truth or F.cross_entropy
    exact = value_and_grads(lambda h, w: naive(h @ w.T, y), *(x.double() for x in few))
    same = value_and_grads(lambda h, w: naive((h @ w.T).float(), y), *few)
    return check(value_and_grads(lambda h, w: loss(h, w, y), *few), exact, same, TOLERANCE)


def leaves_of(hidden: Tensor, weight: Tensor, frozen: bool = False) -> list[Tensor]:
    return [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]


# ---------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    run: Callable[[Bench], None]
    seconds: float  # it may take at most
    answers: str


PARTS: dict[str, Part] = {}


def part(seconds: float, answers: str) -> Callable:
    def register(run: Callable) -> Callable:
        PARTS[run.__name__] = Part(run, seconds, answers)
        return run

    return register


@part(60, "versions, and the two ceilings: rate of a product, bandwidth of a copy")
def ceilings(b: Bench) -> None:
    import triton

    name = torch.cuda.get_device_name() if b.cuda else None
    facts = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "segloss": segloss.__version__}
    b.record("versions", **facts)
    size = b.sizes.copied
    x = torch.empty(size // 2, dtype=torch.bfloat16, device=b.device).normal_()
    y = torch.empty_like(x)
    b.measure("copy", lambda: y.copy_(x), moved=2 * size)
    b.measure("read", lambda: x.sum(), moved=size)
    n = b.sizes.gemm
    a, c = (torch.randn(n, n, device=b.device).to(torch.bfloat16) for _ in range(2))
    b.measure("product", lambda: a @ c, flop=2 * n**3)


@part(130, "pytest -m gpu")
def tests(b: Bench) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-ra"]
    command += ["-p", "no:cacheprovider", "tests/gpu"] + ["--collect-only"] * b.tiny
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    log = b.output / "pytest.log"
    left = max(5.0, b.deadline - time.monotonic() - 5)
    with b.attempt("pytest -m gpu"), open(log, "w") as file:
        run = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=left
        )
        lines = log.read_text().strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        b.record("pytest -m gpu", ok=run.returncode == 0, last=lines[-1:], failed_tests=failed[:40])


LOSSES = ("cross_entropy", "focal_loss", "self_adjusting_dice_loss", "dice_loss", "lovasz_softmax")


@part(60, "every loss on the device against float64, forward and backward")
def parity(b: Bench) -> None:
    hidden, weight, target = b.problem((64, 1031, 32), torch.float32)
    few = (hidden[:, :32], weight[:, :32])
    for name in LOSSES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [x.to(dtype) for x in few]
            size = 16 * 1031 * dtype.itemsize
            for way, options in {"": {}, ", chunks": {"chunk_bytes": size}}.items():
                title = f"{name} {dtype}{way}"
                with b.attempt(title):
                    loss = ours(name, **options)
                    error = verify(loss, *tensors, target, getattr(reference, name))
                    b.record(title, ok=True, error=error)


@part(45, "each product and pass of the fused head by itself")
def pieces(b: Bench) -> None:
    n, v, d = next(iter(b.sizes.heads.values()))
    hidden, weight, target = b.problem((n, v, d))
    dlogits, flop, e = true_dlogits(hidden, weight, target), 2 * n * v * d, v * d
    z, dw = torch.empty_like(dlogits), torch.empty_like(weight)
    b.measure("logits", lambda: torch.mm(hidden, weight.T, out=z), flop)
    b.measure("dhidden", lambda: dlogits @ weight, flop)
    b.measure("dhidden of logits for dlogits", lambda: z @ weight, flop)
    b.measure("dweight", lambda: torch.mm(dlogits.T, hidden, out=dw), flop)
    one = torch.ones((), device=b.device)
    b.measure("dweight times a number", lambda: dw.mul_(one), moved=4 * e)
    if not b.cuda:
        return
    total, half = torch.zeros(v, d, device=b.device), n // 2
    wide = {"out_dtype": torch.float32}
    b.measure("dweight in float32", lambda: torch.mm(dlogits.T, hidden, **wide), flop)
    few = dlogits[:half].T, hidden[:half]
    b.measure("dweight of half the rows in float32", lambda: torch.mm(*few, **wide), flop / 2)
    b.measure(
        "dweight of half the rows, added up by addmm",
        lambda: torch.addmm(total, *few, **wide, out=total),
        flop / 2,
    )
    b.measure("float32 to bfloat16", lambda: total.to(torch.bfloat16), moved=6 * e)


@part(120, "fused losses forward + backward over bare products, with peak memory")
def heads(b: Bench) -> None:
    for title, size in b.sizes.heads.items():
        if b.late(25):
            b.record(f"{title}: no time left")
            continue
        n, v, d = size
        hidden, weight, target = b.problem(size)
        shape = {"N": n, "V": v, "D": d}
        three = b.measure(
            f"{title}: three products", products(hidden, weight, target), 6 * n * v * d, **shape
        )
        two = b.measure(f"{title}: two products", products(hidden, weight, target, True))
        for name in LOSSES:
            leaves = leaves_of(hidden, weight)
            b.measure(f"{title}: {name}", step(ours(name), leaves, target), over=three, **shape)
        for name in ("cross_entropy", "dice_loss", "lovasz_softmax"):
            run = step(ours(name), leaves_of(hidden, weight, True), target)
            b.measure(f"{title}: {name}, frozen head", run, over=two)
        run = step(ours("dice_loss", memory_budget=0), leaves_of(hidden, weight), target)
        b.measure(f"{title}: dice_loss, nothing kept", run, over=three)
        run = step(segloss.linear_cross_entropy, leaves_of(hidden, weight), target)
        b.measure(f"{title}: cross_entropy, compact", run, over=three)
        with b.attempt(f"{title}: cross_entropy is right"):
            error = verify(ours("cross_entropy"), hidden, weight, target)
            b.record(f"{title}: cross_entropy is right", ok=True, error=error)


@part(30, "which kernels take the time of a step, and how often the host waits")
def profile(b: Bench) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    hidden, weight, target = b.problem(next(iter(b.sizes.heads.values())))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * b.cuda
    key = "self_device_time_total" if b.cuda else "self_cpu_time_total"
    for name in ("cross_entropy", "dice_loss", "lovasz_softmax"):
        with b.attempt(name):
            run = step(ours(name), leaves_of(hidden, weight), target)
            run()
            b.synchronize()
            with profiler(activities=activities) as trace:
                run()
                b.synchronize()
            events = sorted(trace.key_averages(), key=lambda e: -getattr(e, key))
            with open(b.output / "profile.txt", "a") as file:
                file.write(f"\n{name}\n{trace.key_averages().table(sort_by=key, row_limit=30)}\n")
            waits = sum(e.count for e in events if "Synchronize" in e.key)
            top = {e.key[:60]: round(getattr(e, key) / 1e3, 3) for e in events[:8]}
            b.record(name, waits=waits, top=top)


@part(50, "bytes of a chunk")
def chunks(b: Bench) -> None:
    for title, size in list(b.sizes.heads.items())[1:3] or b.sizes.heads.items():
        hidden, weight, target = b.problem(size)
        for name in ("cross_entropy", "dice_loss"):
            for chunk in b.sizes.chunks:
                if b.late(8):
                    return b.record("no time left")
                run = step(ours(name, chunk_bytes=chunk), leaves_of(hidden, weight), target)
                b.measure(f"{title}: {name}, {chunk / 2**20:.3g} MiB", run)


TILES = ((2048, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 32))


@part(60, "row_stats and logit_grad over the copy, by width and by tile")
def kernels(b: Bench) -> None:
    from segloss.kernels import logit_grad, row_stats
    from segloss.kernels.common import Rows

    for v in b.sizes.widths:
        n = max(8, b.sizes.logit_bytes // (2 * v))
        z = torch.empty(n, v, dtype=torch.bfloat16, device=b.device).normal_(std=2)
        out, target = torch.empty_like(z), torch.randint(v, (n,), device=b.device)
        rows = Rows.of(z)
        stats = row_stats.row_stats(rows, target, -100)
        one = torch.full((n,), 1.0 / n, device=b.device)
        rest = -one * (1 - stats.log_prob.exp())
        terms = logit_grad.GradTerms(
            target != -100, target, stats.row_max, stats.log_sum, one, -one, rest
        )
        runs = {
            "row_stats": (lambda r=rows, y=target: row_stats.row_stats(r, y, -100), 2),
            "logit_grad": (lambda r=rows, t=terms, o=out: logit_grad.logit_grad(r, t, o), 4),
        }
        copy = b.measure(f"V = {v}: copy", lambda o=out, x=z: o.copy_(x), moved=4 * n * v)
        for name, (run, per_logit) in runs.items():
            moved = per_logit * n * v
            found = b.measure(f"V = {v}: {name}", run, moved=moved)
            if found and copy:
                b.record(f"V = {v}: {name}, of the copy", of_copy=found["GBps"] / copy["GBps"])
        for block, warps in TILES if v == b.sizes.widths[-2:][0] else ():
            if b.late(6) or (b.tiny and block > 2048):
                break
            tile = {"BLOCK_V": block, "num_warps": warps}
            with (
                patch.object(row_stats, "row_tile", lambda rows, tile=tile: tile),
                patch.object(logit_grad, "row_tile", lambda rows, tile=tile: tile),
            ):
                for name, (run, per_logit) in runs.items():
                    title = f"V = {v}: {name}, tiles of {block}, {warps} warps"
                    b.measure(title, run, moved=per_logit * n * v)


@part(50, "few tokens: host time, device time, the step as a graph")
def small(b: Bench) -> None:
    for title, size in b.sizes.small.items():
        hidden, weight, target = b.problem(size)
        three = b.measure(f"{title}: three products", products(hidden, weight, target))
        for name in ("cross_entropy", "focal_loss", "dice_loss", "lovasz_softmax"):
            run = step(ours(name), leaves_of(hidden, weight), target)
            b.measure(f"{title}: {name}", run, over=three)
            if b.cuda and name in ("cross_entropy", "focal_loss"):
                with b.attempt(f"{title}: {name} as a graph"):
                    b.measure(f"{title}: {name} as a graph", graphed(run), over=three)


def graphed(run: Callable) -> Callable:
    """The replay of a captured run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@part(40, "one chunk of more than 2^31 logits against many")
def big(b: Bench) -> None:
    n, v, d = b.sizes.big
    hidden, weight, target = b.problem((n, v, d))
    for name in ("focal_loss", "dice_loss", "lovasz_softmax"):
        with b.attempt(name):
            few, one = (
                value_and_grads(
                    lambda h, w, s=size, name=name: ours(name, chunk_bytes=s)(h, w, target),
                    hidden,
                    weight,
                )
                for size in (n * v // 4, 4 * n * v)
            )
            errors = [float((a - c).norm() / c.norm()) for a, c in zip(one, few, strict=True)]
            b.record(name, logits=n * v, errors=errors, ok=max(errors) < 2e-2)


@part(60, "the same bits again, on a side stream, with deterministic algorithms, compiled")
def modes(b: Bench) -> None:
    hidden, weight, target = b.problem(b.sizes.modes)
    target[::5] = -100

    def grads(name: str, **options) -> list[Tensor]:
        loss = ours(name, **options)
        return value_and_grads(lambda h, w: loss(h, w, target), hidden, weight)

    def deterministically(name: str) -> list[Tensor]:
        torch.use_deterministic_algorithms(True)
        try:
            return grads(name)
        finally:
            torch.use_deterministic_algorithms(False)

    def beside(name: str) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            found = grads(name)
        torch.cuda.current_stream().wait_stream(stream)
        return found

    def compiled(mode: str, compact: bool) -> list[Tensor]:
        torch._dynamo.reset()
        loss = segloss.CrossEntropyLoss()

        def eager(h: Tensor, w: Tensor) -> Tensor:
            return loss(segloss.LinearLogits(h, w, compact=compact), target)

        run = torch.compile(eager, mode=mode, fullgraph=True)
        for _ in range(3):
            found = value_and_grads(run, hidden, weight)
        return found

    ways: dict[str, Callable[[str], list[Tensor]]] = {
        "again": grads,
        "deterministic algorithms": deterministically,
    }
    if b.cuda:
        ways["on a side stream"] = beside
    for name in LOSSES:
        truth = grads(name)
        for way, run in ways.items():
            with b.attempt(f"{name}: {way}"):
                same = all(torch.equal(x, y) for x, y in zip(run(name), truth, strict=True))
                b.record(f"{name}: {way}", ok=same)
    truth = grads("cross_entropy")
    for mode in () if b.tiny else ("default", "reduce-overhead"):
        for compact in (False, True):
            title = f"cross_entropy, torch.compile, {mode}, compact={compact}"
            with b.attempt(title):
                found = compiled(mode, compact)
                errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, truth)]  # noqa: B905
                b.record(title, errors=errors, ok=max(errors) < 1e-2)


@part(40, "a step on every GPU of the machine but the current one")
def devices(b: Bench) -> None:
    count = torch.cuda.device_count() if b.cuda else 0
    if count < 2:
        return b.record(f"{count} GPUs: nothing to see")
    hidden, weight, target = b.problem(b.sizes.modes)
    for name in LOSSES:
        loss = ours(name)
        truth = value_and_grads(lambda h, w, f=loss: f(h, w, target), hidden, weight)
        for index in range(1, count):
            with b.attempt(f"{name} on GPU {index}"):
                h, w, y = (x.to(f"cuda:{index}") for x in (hidden, weight, target))
                there = value_and_grads(lambda h, w, f=loss, y=y: f(h, w, y), h, w)
                pairs = zip(there, truth, strict=True)
                errors = [float((x.cpu() - y.cpu()).norm() / y.cpu().norm()) for x, y in pairs]
                b.record(f"{name} on GPU {index}", errors=errors, ok=max(errors) < 1e-2)


def others() -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Cross-entropy of others: what makes each, where it is installed."""

    def cce() -> Callable:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy

    return {
        "eager": lambda: plain,
        "F.linear_cross_entropy": lambda: F.linear_cross_entropy,
        "Liger": liger,
        "CCE": cce,
        "torch.compile(eager)": lambda: torch.compile(plain, dynamic=False),
    }


@part(110, "eager, torch.compile, Liger, CCE, F.linear_cross_entropy")
def peers(b: Bench) -> None:
    makers = {"segloss": lambda: ours("cross_entropy")} | others()
    made: dict[str, Callable] = {}
    for title, size in b.sizes.heads.items():
        hidden, weight, target = b.problem(size)
        three = b.measure(f"{title}: three products", products(hidden, weight, target))
        for name, make in makers.items():
            if b.late(30 if "compile" in name else 8):
                b.record(f"{title}: {name}: no time left")
                continue
            if b.tiny and name not in ("segloss", "eager"):
                continue
            with b.attempt(f"{title}: {name}"):
                loss = made.setdefault(name, make())
                error = verify(loss, hidden, weight, target)
                run = step(loss, leaves_of(hidden, weight), target)
                b.measure(f"{title}: {name}", run, over=three, error=error)


def main(name: str, output: str, tiny: bool, seconds: float) -> None:
    """Run one part here; its last record says how it ended."""
    start = time.monotonic()
    bench = Bench(name, Path(output), tiny, start + seconds)
    bench.record("begin", limit_s=seconds)
    PARTS[name].run(bench)
    bench.record("end", seconds=round(time.monotonic() - start, 1))


def limit_of(d: int, flops: float, bandwidth: float) -> float:
    """What cross-entropy may take, over three products, at hidden size D on this card."""
    floor = 1 + flops / bandwidth / d
    return max(limits.GPU_OVER_PRODUCTS, limits.GPU_OVER_FLOOR * floor)
