"""`python -m bench.gpu`: the first minutes on a GPU, or all of them: is it right, and how fast.

    python3 -m bench.gpu --output DIR --seconds 470     # any Python with torch and triton, no .venv
    python3 -m bench.gpu --output DIR --tiny            # anywhere: does everything run

Parts of `bench/gpu_parts.py`, each in a process of its own: one that crashes or hangs loses what it
had not measured yet, and no other part. DIR/results.jsonl is complete after every measurement;
DIR/gpu.json and DIR/gpu.md (and what is printed last) are its tables, made after every part.

The gate: forward + backward of fused cross-entropy over three bare matrix products against
`bench/limits.py`, by the card's own rates of the same run. Exit status 0 if it is kept and nothing
is wrong, 1 if not, 2 if nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.common import LINE_HEADER, Line, machine

LEAST_SECONDS = 5.0  # a part is not begun with less
LONGEST = 11_000  # characters that are printed, the last of all
# of a record: what stands in a table, in this order
SHOWN = ("ms", "ratio", "host_ms", "peak_MB", "GBps", "TFLOPs", "of_copy", "error", "errors", "ok",
         "waits", "last", "failed_tests", "failed", "seconds")  # fmt: skip


# --------------------------------------------------------------------------------- the processes


def run_part(name: str, output: str, tiny: bool, seconds: float) -> None:
    from bench import gpu_parts

    gpu_parts.main(name, output, tiny, seconds)


def run_parts(
    limit_of: dict[str, float], output: Path, tiny: bool, seconds: float, run: Callable = run_part
) -> None:
    """One part after the other, each under a limit of its own (seconds, by name) and all under
    one."""
    start = time.monotonic()
    # a server that has torch imported and has never touched a GPU: a part starts at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.gpu_parts"])
    for name in limit_of:
        left = seconds - (time.monotonic() - start)
        if left < LEAST_SECONDS:
            note(output, name, "not run: no time left")
            continue
        limit = min(limit_of[name], left)
        process = context.Process(target=run, args=(name, str(output), tiny, limit))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            note(output, name, f"ended after {limit:.0f} s, its limit")
        elif process.exitcode:
            note(output, name, f"its process ended with {process.exitcode}")
        write(output)


def note(output: Path, part: str, failed: str) -> None:
    with open(output / "results.jsonl", "a") as file:
        file.write(json.dumps({"part": part, "name": "end", "failed": failed}) + "\n")


# ----------------------------------------------------------------------------------- the report


def read(output: Path) -> list[dict]:
    """Every whole record; a line that a crash cut off is none."""
    records = []
    path = output / "results.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def number(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(number, value))
    return str(value)


def lines_of(records: list[dict]) -> list[Line]:
    """Cross-entropy over three products, each head against the limit of its hidden size."""
    from bench.gpu_parts import limit_of

    rate = {r["name"]: r for r in records if r["part"] == "ceilings"}
    found = []
    for r in records:
        if r["part"] == "heads" and r["name"].endswith(": cross_entropy") and "ratio" in r:
            known = "TFLOPs" in rate.get("product", {}) and "GBps" in rate.get("copy", {})
            limit = None
            if known:
                limit = limit_of(
                    r["D"], 1e12 * rate["product"]["TFLOPs"], 1e9 * rate["copy"]["GBps"]
                )
            found.append(Line(f"{r['name']} over three products", r["ratio"], limit))
    return found


def table(part: str, records: list[dict]) -> dict:
    """What a part has recorded; columns that it has nothing for are left out."""
    rows = [r for r in records if r["part"] == part and r["name"] != "begin"]
    columns = [c for c in SHOWN if any(r.get(c) is not None for r in rows)]
    cells = [
        [r["name"], *(number(r[c])[:120] if r.get(c) is not None else "" for c in columns)]
        for r in rows
    ]
    return {"title": part, "header": ["measurement", *columns], "rows": cells}


def result(records: list[dict]) -> dict:
    """Everything, and ready tables for `bench/report.py`."""
    here = machine()
    versions = next((r for r in records if r["name"] == "versions"), {})
    here |= {k: v for k, v in versions.items() if k in ("gpu", "torch", "triton", "cuda", "hip")}
    lines = lines_of(records)
    parts = list(dict.fromkeys(r["part"] for r in records))
    limits = {"title": "Limits", "header": LINE_HEADER, "rows": [line.cells() for line in lines]}
    return {
        "kind": "gpu",
        "machine": here,
        "lines": [asdict(line) for line in lines],
        "tables": [limits, *(table(part, records) for part in parts)],
        "records": records,
    }


def wrong(records: list[dict]) -> list[str]:
    """What failed or is not what it should be; a peer's failure is a finding."""
    return [
        f"{r['part']}: {r['name']}: {r.get('failed', 'wrong')}"
        for r in records
        if r.get("ok") is False or ("failed" in r and (r["part"] != "peers" or r["name"] == "end"))
    ]


def status(content: dict) -> int:
    """0 if every limit was judged and kept and nothing is wrong, 1 if not, 2 without a GPU."""
    if not content["machine"].get("gpu"):
        return 2
    judged = [line["verdict"] for line in content["lines"] if line["limit"] is not None]
    kept = bool(judged) and all(verdict == "pass" for verdict in judged)
    return 0 if kept and not wrong(content["records"]) else 1


def write(output: Path) -> dict:
    content = result(read(output))
    (output / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (output / "gpu.md").write_text(text(content))
    return content


def text(content: dict) -> str:
    """The tables, those of what was found last first: what matters most is printed last."""
    parts = []
    for found in reversed(content["tables"]):
        if not found["rows"]:
            continue
        parts.append(f"\n## {found['title']}\n")
        for row in (found["header"], ["---"] * len(found["header"]), *found["rows"]):
            parts.append("| " + " | ".join(row) + " |")
    parts += [f"WRONG: {line}" for line in wrong(content["records"])]
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    from bench.gpu_parts import PARTS

    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--output", default=time.strftime("runs/gpu-%Y%m%d-%H%M%S"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU if need be")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.jsonl").unlink(missing_ok=True)
    import torch

    if torch.cuda.device_count() or options.tiny:  # the count leaves a GPU untouched
        limits = {name: PARTS[name].seconds for name in options.parts}
        run_parts(limits, output, options.tiny, options.seconds)
    else:
        for name in options.parts:
            note(output, name, "not run: no GPU on this machine")
    content = write(output)
    print(text(content)[-LONGEST:])
    print(output)
    return status(content)


if __name__ == "__main__":
    sys.exit(main())
