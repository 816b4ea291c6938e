"""`python -m bench.kernels`: what the kernels cost on GPUs that are not there. Needs no GPU.

Compiles every kernel of ours, of Liger's cross-entropy and of CCE for four targets, reads the
machine code, counts the bytes moved in Triton's interpreter, and holds ours to `bench/limits.py`:
exit status 1 if one is missed. Times in the output are ESTIMATES from these counts and data sheets.
Nothing here was measured on a GPU.

Writes FILE.json and beside it FILE.md. The JSON: `machine` (versions, date), `lines` (the gate:
what, value, limit, verdict), `tables` (what FILE.md shows), `notes`, `kernels` (one entry per
launch, target and compiled version: see `describe`) and `traffic` (see `bench/traffic.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from bench import limits
from bench.common import LINE_HEADER, Line, machine
from bench.compiled import (
    TARGETS,
    CompiledKernel,
    Resources,
    compiling_for,
    loops,
    main_loop,
    options,
    threads,
)
from bench.hardware import GPUS
from bench.launches import ALIGNED, INPUTS, LAUNCHES, PEERS, PLAIN, launch

NOTE = (
    "Estimates, not measurements: no GPU was used. A time is the largest of bytes / bandwidth, "
    "instructions / issue rate and special functions / their rate at data-sheet peaks, with "
    "everything overlapped: a bound from below."
)
SHOWN = (torch.bfloat16, ALIGNED, PLAIN)
# what a time is estimated for: rows x columns
SHAPE = (8192, 128256)


# ------------------------------------------------------------------------------------ counting


def tile_elements(kernel: CompiledKernel) -> float:
    """Logits (or what else a kernel goes over) of one thread in one pass of its loop."""
    sizes = [n for name, n in options(kernel).items() if name in TILE_SIZES]
    elements = 1
    for size in sizes:
        elements *= size
    return elements / threads(kernel)


TILE_SIZES = ("BLOCK", "BLOCK_SIZE", "BLOCK_V", "BLOCK_K", "BLOCK_R", "BLOCK_B")


def describe(kernel: CompiledKernel, with_loops: bool = True) -> dict:
    """One compiled kernel: its resources, its loops, and the counts per element of the main one.

    An element of CCE's kernels is a logit in one step of its inner dimension (`BLOCK_D`).
    """
    constants = {k: v for k, v in options(kernel).items() if isinstance(v, int | str)}
    result = {"constants": constants, "warps": kernel.metadata.num_warps}
    result |= asdict(Resources.of(kernel))
    if with_loops:
        elements = tile_elements(kernel)
        result["loops"] = [
            asdict(loop) | {"instructions_per_element": loop.instructions / elements}
            for loop in loops(kernel)
            if loop.bytes_read
        ]
        if (main := main_loop(kernel)) is not None:
            result["instructions"] = main.instructions / elements
            result["special"] = main.special / elements
    return result


def over_logits(kernel: CompiledKernel) -> bool:
    """Whether a kernel of ours goes over the matrix; others go over small vectors."""
    return options(kernel)["logits"] != ""


def compile_ours(target: str, name: str, inputs: list = INPUTS) -> list[dict]:
    """What the launches of one name compile to, for one input after the other."""
    found = []
    for dtype, num_classes, transform in inputs:
        with compiling_for(target) as compiled:
            launch(name, dtype, num_classes, transform)
        found += [
            {
                "whose": "segloss",
                "launch": name,
                "kernel": kernel.__name__,
                "target": target,
                "dtype": str(dtype).removeprefix("torch."),
                "columns": num_classes,
                "transform": transform,
                **describe(version, dtype == torch.bfloat16 and over_logits(version)),
            }
            for kernel, versions in compiled.items()
            for version in versions
        ]
    return found


def compile_peer(target: str, name: str) -> list[dict]:
    head = {"whose": name.split()[0], "launch": name, "target": target, "dtype": "bfloat16"}
    try:
        with compiling_for(target) as compiled:
            PEERS[name](target)
        return [
            head | {"kernel": kernel.__name__, **describe(version)}
            for kernel, versions in compiled.items()
            for version in versions
        ]
    except Exception as error:  # a peer that is missing or does not compile is a finding
        return [head | {"error": f"{type(error).__name__}: {error}"[:500]}]


def count_traffic() -> dict:
    """Under the interpreter nothing compiles, hence a process of its own."""
    command = [sys.executable, "-m", "bench.traffic"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def collect(workers: int) -> tuple[list[dict], dict]:
    """Everything, in that many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        traffic = pool.submit(count_traffic)
        jobs = [pool.submit(compile_ours, t, name) for name in LAUNCHES for t in TARGETS]
        jobs += [pool.submit(compile_peer, t, name) for name in PEERS for t in TARGETS]
        return [row for job in jobs for row in job.result()], traffic.result()


# ------------------------------------------------------------------------------------ judging


def shown(row: dict) -> bool:
    """Whether the tables have it: bf16, aligned, untransformed."""
    dtype, columns, transform = SHOWN
    ours = row["whose"] != "segloss" or (row["columns"], row["transform"]) == (columns, transform)
    return ours and row["dtype"] == str(dtype).removeprefix("torch.")


def derive(rows: Iterable[dict], traffic: dict) -> None:
    """Adds occupancy, bytes per logit and the estimated time to every row."""
    for row in rows:
        if "error" in row:
            continue
        gpu, backend = GPUS[row["target"]], TARGETS[row["target"]]
        row["occupancy"] = gpu.occupancy(
            row["registers"], row["shared_memory"], row["warps"], backend.warp_size
        )
        moved = traffic.get(row["launch"], {}).get(row["kernel"])
        if moved is None or "loops" not in row or not shown(row):
            continue
        row["bytes"] = moved["read"] + moved["written"]
        if row["whose"] == "CCE" or "instructions" not in row:
            continue  # matrix products: not a question of bytes and instructions per logit
        passes = row["loops"] if row["whose"] == "Liger" else None
        special = row["special"]
        instructions = row["instructions"]
        if passes:  # one kernel reads a row twice
            instructions = sum(loop["instructions_per_element"] for loop in passes)
            special *= len(passes)
        seconds, bound = gpu.estimate(row["bytes"], instructions, special)
        row["estimated_ms"] = 1e3 * seconds * SHAPE[0] * SHAPE[1]
        row["estimated_bound"] = bound


def spill_line(rows: list[dict]) -> Line:
    """The worst of our kernels against the limit on spills."""
    ours = [row for row in rows if row["whose"] == "segloss"]
    worst = max(ours, key=lambda row: row["spills"])
    note = f"{len(ours)} compiled kernels"
    if worst["spills"]:
        note = f"{worst['launch']}, {worst['dtype']}, {worst['target']}, {worst['constants']}"
    return Line("spills, every kernel and target", worst["spills"], limits.SPILLS, note=note)


def cost_lines(rows: list[dict]) -> list[Line]:
    """Bytes and instructions per logit against their limits, where `rows` have them."""
    return [
        Line(f"{row['launch']}, sm_90, bf16: {what} per logit", row[what], most)
        for row in rows
        if row["target"] == "sm_90" and shown(row)
        for what, most in limits.SM_90_BF16.get(row["launch"], {}).items()
        if what in row
    ]


def gate(rows: list[dict]) -> list[Line]:
    """Our kernels against `bench/limits.py`."""
    lines = [spill_line(rows), *cost_lines(rows)]
    expected = 1 + sum(len(limit) for limit in limits.SM_90_BF16.values())
    if len(lines) != expected:
        raise RuntimeError(f"{len(lines)} of {expected} limits could be judged: {lines}")
    return lines


# ------------------------------------------------------------------------------------ reporting


HEADER = [
    "launch", "kernel", "registers", "shared memory", "spills", "occupancy",
    "instructions per element", "bytes per logit", "estimated ms", "bound by",
]  # fmt: skip


def number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def cells(row: dict) -> list[str]:
    if "error" in row:
        return [row["launch"], row["error"].splitlines()[0][:80], *["-"] * (len(HEADER) - 2)]
    each = sorted({round(loop["instructions_per_element"], 2) for loop in row.get("loops", [])})
    return [
        row["launch"],
        row["kernel"],
        str(row["registers"]),
        str(row["shared_memory"]),
        str(row["spills"]),
        f"{row['occupancy']:.0%}",
        " / ".join(f"{x:.2f}" for x in each) or "-",
        number(row.get("bytes")),
        number(row.get("estimated_ms")),
        row.get("estimated_bound", "-"),
    ]


def tables(rows: list[dict], lines: list[Line]) -> list[dict]:
    """What a reader sees, as `bench/report/` takes it: titles, headers and rows of strings."""
    found = [{"title": "Limits", "header": LINE_HEADER, "rows": [line.cells() for line in lines]}]
    for target, gpu in GPUS.items():
        shown_rows = [cells(r) for r in rows if r["target"] == target and shown(r)]
        title = f"{target} (times are estimates for {gpu.name})"
        found.append({"title": title, "header": HEADER, "rows": shown_rows})
    return found


def markdown(result: dict) -> str:
    parts = ["# Kernels without a GPU", "", *(f"- {note}" for note in result["notes"]), ""]
    parts += [f"    {name:<14} {value}" for name, value in result["machine"].items()]
    for table in result["tables"]:
        lines = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
        parts += ["", f"## {table['title']}", ""]
        parts += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(parts) + "\n"


NOTES = [
    f"bf16, {ALIGNED} columns, no softcap or scale; the JSON has every dtype, width and transform.",
    f"Estimated times are for {SHAPE[0]} x {SHAPE[1]} logits.",
    "Several numbers of instructions: the loop over whole tiles and the one over the rest of a row "
    "(ours), or the forward and the gradient loop of one kernel (Liger, whose bytes are of both).",
    "CCE multiplies matrices in the kernel: its elements are a logit and a step of 32 of the "
    "hidden size, its bytes are for a hidden size of 256, and no time is estimated.",
    "Bytes per logit are what the program asks for, through whatever cache.",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    when = time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--output", default=f"runs/bench-kernels-{when}.json", metavar="FILE")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    rows, traffic = collect(options.workers)
    derive(rows, traffic)
    lines = gate(rows)
    result = {
        "kind": "kernels",
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "notes": [NOTE, *NOTES],
        "lines": [asdict(line) for line in lines],
        "tables": tables(rows, lines),
        "kernels": rows,
        "traffic": traffic,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    path.with_suffix(".md").write_text(text)
    print(text)
    missed = [line for line in lines if line.verdict == "MISS"]
    print(f"{len(lines) - len(missed)} limits kept, {len(missed)} missed; {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
