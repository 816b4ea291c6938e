"""The first minutes on a GPU, on a CPU: everything but CUDA's events, memory and graphs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import broken_gpu_parts
import pytest
import torch

from bench import gpu, gpu_parts, limits

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "bench.gpu", "--tiny", "--output"]


def bench(part: str, output: Path) -> gpu_parts.Bench:
    return gpu_parts.Bench(part, output, tiny=True, deadline=time.monotonic() + 100)


# what says so itself, whatever the machine; `tests` collects them, which takes long
QUICK = [name for name in gpu_parts.PARTS if name not in ("tests", "parity", "modes")]


def test_every_part_runs_on_a_cpu(tmp_path, capsys):
    """By the command, so that each is a process of its own."""
    run = subprocess.run(
        [*COMMAND, str(tmp_path), "--parts", *QUICK], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr  # no GPU: nothing was measured
    records = gpu.read(tmp_path)
    assert [r["part"] for r in records if r["name"] == "end"] == QUICK
    assert [r for r in records if "failed" in r] == []
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [t["title"] for t in content["tables"]] == ["Limits", *QUICK]
    assert all(len(r) == len(t["header"]) for t in content["tables"] for r in t["rows"])
    assert "## ceilings" in run.stdout and "tiny: cross_entropy over three products" in run.stdout
    found = {r["name"]: r for r in records if r["part"] == "small"}
    ours, bare = found["tiny: cross_entropy"], found["tiny: three products"]
    assert ours["ratio"] == pytest.approx(ours["ms"] / bare["ms"])


def test_a_crash_and_a_hang_lose_their_part_alone(tmp_path):
    limit_of = dict.fromkeys(("fine", "crash", "raise", "late"), 60.0) | {"hang": 6.0}
    order = {name: limit_of[name] for name in ("crash", "hang", "raise", "fine", "late")}
    gpu.run_parts(order, tmp_path, True, 60, broken_gpu_parts.run)
    records = gpu.read(tmp_path)
    before = [r["part"] for r in records if r["name"] == "before"]
    assert before == list(order)
    assert [r["part"] for r in records if r["name"] == "after"] == ["fine", "late"]
    failed = {r["part"]: r["failed"] for r in records if "failed" in r}
    assert failed == {
        "crash": f"its process ended with {-signal.SIGSEGV}",
        "hang": "ended after 6 s, its limit",
        "raise": "its process ended with 1",
    }
    assert len(gpu.wrong(records)) == 3


def test_no_part_begins_without_time(tmp_path):
    gpu.run_parts({"fine": 60.0}, tmp_path, True, 1.0, broken_gpu_parts.run)
    assert [r["failed"] for r in gpu.read(tmp_path)] == ["not run: no time left"]


def test_a_cut_off_run_keeps_what_it_had(tmp_path):
    """The driver is killed, and the last line of its file is half a line."""
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path), "--parts", "ceilings", "heads", "small"], cwd=ROOT,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    results = tmp_path / "results.jsonl"
    waited = time.monotonic() + 120
    while time.monotonic() < waited and len(gpu.read(tmp_path)) < 4:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with open(results, "a") as file:
        file.write('{"part": "heads", "na')
    records = gpu.read(tmp_path)
    assert len(records) >= 4 and records[1]["name"] == "versions"
    content = gpu.write(tmp_path)
    assert content["tables"][1]["title"] == "ceilings"


def test_a_measurement_that_fails_is_recorded(tmp_path):
    b = bench("kernels", tmp_path)

    def broken():
        raise RuntimeError("out of memory")

    assert b.measure("first", broken) is None
    assert b.measure("second", lambda: torch.ones(3).sum(), moved=12)["ms"] > 0
    first, second = gpu.read(tmp_path)
    assert first == {"part": "kernels", "name": "first", "failed": "RuntimeError: out of memory"}
    assert second["name"] == "second" and second["GBps"] > 0


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    """Of a peer a finding, of ours a failure."""
    monkeypatch.setattr(
        gpu_parts,
        "others",
        lambda: {"eager": lambda: lambda h, w, t: 1.01 * gpu_parts.plain(h, w, t)},
    )
    gpu_parts.PARTS["peers"].run(bench("peers", tmp_path))
    records = gpu.read(tmp_path)
    (failed,) = [r for r in records if "failed" in r]
    assert failed["name"] == "tiny: eager" and "relative error" in failed["failed"]
    assert gpu.wrong(records) == []
    assert gpu.wrong([failed | {"part": "heads"}])


RATES = [
    {"part": "ceilings", "name": "versions", "gpu": "a card"},
    {"part": "ceilings", "name": "copy", "GBps": 3000.0},
    {"part": "ceilings", "name": "product", "TFLOPs": 700.0},
]


@pytest.mark.parametrize(
    "d, ratio, more, expected",
    [
        (4096, 1.09, {}, 0),
        (4096, 1.11, {}, 1),
        (576, 1.45, {}, 0),  # the floor of 6 bytes a logit is 1.405 there
        (576, 1.47, {}, 1),
        (4096, 1.05, {"ok": False}, 1),
    ],
)
def test_the_gate(d, ratio, more, expected):
    record = {"part": "heads", "name": "x: cross_entropy", "ratio": ratio, "D": d, **more}
    content = gpu.result([*RATES, record])
    assert gpu.status(content) == expected
    assert gpu_parts.limit_of(10**9, 7e14, 3e12) == limits.GPU_OVER_PRODUCTS


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    records = gpu.read(tmp_path)
    assert {r["part"] for r in records} == set(gpu_parts.PARTS)
    assert "no GPU on this machine" in capsys.readouterr().out
