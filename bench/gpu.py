"""`python -m bench.gpu`: the fused head on a GPU against what bounds it, in CUDA events.

The gate: forward + backward of fused cross-entropy within `bench/limits.py` of three bare matrix
products (logits, dhidden, dweight); exit status 1 where it is missed, or where a result of ours is
wrong. On a machine without a GPU it says so, writes a file that says so, and ends with status 2.
Nothing in this file has run on a GPU yet; its logic is tested on a CPU.

N tokens, V classes, D hidden size.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench import limits
from bench.common import (
    LINE_HEADER,
    Line,
    check,
    machine,
    quartiles,
    ratio_line,
    value_and_grads,
)
from bench.inputs import zipf_head

# heads by model: V, D
SHAPES = {
    "SmolLM2 135M": (49152, 576),
    "Qwen-3 8B": (151936, 4096),
    "Llama-3 8B": (128256, 4096),
    "Gemma-3 1B": (262144, 1152),
}
TOKENS = 8192
# rows of the comparison with float64: all would take as long as everything else
CHECKED = 256
# what one shape may take, after which the remaining shapes are named as not run
SECONDS = 300
TOLERANCE = 1e-3  # of bf16, on top of twice the error of plain PyTorch


# -------------------------------------------------------------------------------------- timing


def event_times(runs: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list]:
    """Seconds of each run on the device; each round runs all, every other one backwards.

    CUDA events, read once at the end so that the queue never runs dry; a clock on a CPU.
    """
    for run in runs.values():  # compiles, and fills the allocator's cache
        run()
    marks: dict[str, list] = {name: [] for name in runs}
    gc.collect()
    for turn in range(rounds):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            start = mark(device)
            run()
            marks[name].append((start, mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: [between(*pair) for pair in pairs] for name, pairs in marks.items()}


def mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    return end - start if isinstance(start, float) else 1e-3 * start.elapsed_time(end)


def peak_bytes(run: Callable, device: torch.device) -> int | None:
    """Device memory of one run above what was there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ------------------------------------------------------------------------------ implementations


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target)


def ours(name: str) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # every target is valid: compacting would only wait for their count
        return getattr(segloss, f"linear_{name}")(hidden, weight, target, compact=False)

    return loss


def peers() -> dict[str, Callable[..., Tensor]]:
    """Cross-entropy of others, each where it is installed."""
    found: dict[str, Callable[..., Tensor]] = {
        "eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["CCE"] = linear_cross_entropy
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = liger_fused_linear_cross_entropy
    except ImportError:
        pass
    return found


def three_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """What the fused head cannot do without, each product in one call."""
    dlogits = hidden @ weight.T

    def run():
        torch.matmul(hidden, weight.T, out=dlogits)
        torch.matmul(dlogits, weight)
        torch.matmul(dlogits.T, hidden)

    return run


def verify(loss: Callable, hidden: Tensor, weight: Tensor, target: Tensor) -> str:
    """Value and gradients on the first rows against float64; raises `bench.common.Wrong`."""
    few = hidden[:CHECKED], weight
    y = target[:CHECKED]
    truth = value_and_grads(lambda h, w: F.cross_entropy(h @ w.T, y), *(x.double() for x in few))
    same = value_and_grads(lambda h, w: plain(h, w, y), *few)
    return check(value_and_grads(lambda h, w: loss(h, w, y), *few), truth, same, TOLERANCE)


# ------------------------------------------------------------------------------------- a shape


def measure(
    title: str, tokens: int, shape: tuple[int, int], rounds: int, device: torch.device
) -> dict:
    """One table: every implementation that is right, timed together."""
    v, d = shape
    hidden, weight, target = zipf_head("zipf", tokens, d, v)
    # bf16 keeps each as it would be in training
    leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    target = target.to(device)
    runs: dict[str, Callable] = {"three products": three_products(*(x.detach() for x in leaves))}
    errors, wrong = {}, {}
    losses = {f"segloss {name}": ours(name) for name in ("cross_entropy", "focal_loss")} | peers()
    for name, loss in losses.items():
        if name != "segloss focal_loss":  # whose truth is another
            try:
                errors[name] = verify(loss, *(x.detach() for x in leaves), target)
            except Exception as error:  # a peer that cannot run here is a finding
                wrong[name] = f"{type(error).__name__}: {error}"[:300]
                continue
        runs[name] = step(loss, leaves, target)
    seconds = event_times(runs, rounds, device)
    memory = {name: peak_bytes(run, device) for name, run in runs.items()}
    over = [
        ratio_line(f"{title}: {name} over three products", seconds, name, "three products", limit)
        for name, limit in (
            ("segloss cross_entropy", limits.GPU_OVER_PRODUCTS),
            ("segloss focal_loss", None),
        )
        if name in seconds
    ]
    return {
        "title": f"{title}: N = {tokens}, V = {v}, D = {d}, bf16, forward + backward",
        "seconds": seconds,
        "bytes": memory,
        "errors": errors,
        "wrong": wrong,
        "lines": [asdict(line) for line in over],
    }


def step(loss: Callable, leaves: list[Tensor], target: Tensor) -> Callable[[], None]:
    def run():
        torch.autograd.grad(loss(*leaves, target), leaves)

    return run


# ------------------------------------------------------------------------------------- report


HEADER = ["implementation", "median ms", "quartiles", "over three products", "peak MB", "error"]


def table(section: dict) -> dict:
    seconds = section["seconds"]
    products = statistics.median(seconds["three products"])
    rows = []
    for name, values in seconds.items():
        low, middle, high = quartiles(values)
        memory = section["bytes"].get(name)
        rows.append(
            [
                name,
                f"{1e3 * middle:.4g}",
                f"{1e3 * low:.4g} to {1e3 * high:.4g}",
                f"{middle / products:.3g}",
                "-" if memory is None else f"{memory / 1e6:.0f}",
                section["errors"].get(name, ""),
            ]
        )
    rows += [[name, "wrong or not run", "", "", "", why] for name, why in section["wrong"].items()]
    return {"title": section["title"], "header": HEADER, "rows": rows}


def result(sections: list[dict], missing: dict[str, str]) -> dict:
    """What is written: everything, and ready tables for `bench/report.py`."""
    lines = [line for section in sections for line in section["lines"]]
    shown = [Line(**{k: v for k, v in line.items() if k != "verdict"}) for line in lines]
    limits_table = {"title": "Limits", "header": LINE_HEADER, "rows": [x.cells() for x in shown]}
    found = [limits_table, *(table(section) for section in sections)]
    if missing:
        rows = [[name, why] for name, why in missing.items()]
        found.append({"title": "Not measured", "header": ["what", "why"], "rows": rows})
    here = machine()
    if torch.cuda.is_available():
        here["gpu"] = torch.cuda.get_device_name()
    return {
        "kind": "gpu",
        "machine": here,
        "lines": lines,
        "missing": missing,
        "tables": found,
        "measurements": sections,
    }


def status(content: dict) -> int:
    """0 if every limit was judged and kept and ours is right, 1 if not, 2 if nothing was run."""
    if not content["measurements"]:
        return 2
    ours_wrong = any(n.startswith("segloss") for s in content["measurements"] for n in s["wrong"])
    judged = [line["verdict"] for line in content["lines"] if line["limit"] is not None]
    kept = bool(judged) and all(verdict == "pass" for verdict in judged)
    return 0 if kept and not ours_wrong else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no shape after this")
    when = time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--output", default=f"runs/bench-gpu-{when}.json", metavar="FILE")
    options = parser.parse_args(arguments)
    sections: list[dict] = []
    missing: dict[str, str] = {}
    start = time.monotonic()
    for title, shape in SHAPES.items():
        if not torch.cuda.is_available():
            missing[title] = "no GPU on this machine"
        elif time.monotonic() - start > options.seconds:
            missing[title] = f"{options.seconds:.0f} s were over"
        else:
            device = torch.device("cuda")
            sections.append(measure(title, TOKENS, shape, options.rounds, device))
            torch.cuda.empty_cache()
    content = result(sections, missing)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    for part in content["tables"]:
        print(f"\n## {part['title']}\n")
        for row in (part["header"], ["---"] * len(part["header"]), *part["rows"]):
            print("| " + " | ".join(row) + " |")
    print(f"\n{path}")
    return status(content)


if __name__ == "__main__":
    sys.exit(main())
