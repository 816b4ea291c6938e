"""The GPU measurements' own logic, on a CPU: everything but CUDA's events and memory."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu, limits

CPU = torch.device("cpu")


@pytest.fixture
def few_peers(monkeypatch):
    """Eager alone, a peer that is wrong, and one that cannot run."""

    def wrong(hidden, weight, target):
        return 1.01 * gpu.plain(hidden, weight, target)

    def broken(hidden, weight, target):
        raise RuntimeError("no such device")

    peers = {"eager": gpu.plain, "wrong": wrong, "broken": broken}
    monkeypatch.setattr(gpu, "peers", lambda: peers)


def test_a_shape_is_checked_and_timed(few_peers, tmp_path):
    section = gpu.measure("tiny", 64, (300, 16), rounds=4, device=CPU)
    right = {"three products", "segloss cross_entropy", "segloss focal_loss", "eager"}
    assert set(section["seconds"]) == right
    assert all(len(times) == 4 and min(times) > 0 for times in section["seconds"].values())
    assert set(section["wrong"]) == {"wrong", "broken"}
    assert "relative error" in section["wrong"]["wrong"]
    content = gpu.result([section], {"large": "no time left"})
    assert json.loads(json.dumps(content)) == content
    assert [line["limit"] for line in content["lines"]] == [limits.GPU_OVER_PRODUCTS, None]
    titles = [table["title"] for table in content["tables"]]
    assert titles[0] == "Limits" and titles[-1] == "Not measured"
    assert all(len(r) == len(t["header"]) for t in content["tables"] for r in t["rows"])


def test_the_order_of_a_round_alternates():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    gpu.event_times(runs, 2, CPU)
    assert "".join(calls) == "ab" + "ab" + "ba"


@pytest.mark.parametrize(
    "ratio, wrong, expected",
    [(1.05, {}, 0), (1.2, {}, 1), (1.05, {"CCE": "off"}, 0), (1.05, {"segloss x": "off"}, 1)],
)
def test_the_gate(ratio, wrong, expected):
    seconds = {"three products": [1.0] * 3, "segloss cross_entropy": [ratio] * 3}
    line = gpu.ratio_line(
        "", seconds, "segloss cross_entropy", "three products", limits.GPU_OVER_PRODUCTS
    )
    section = {"title": "", "seconds": seconds, "bytes": {}, "errors": {}, "wrong": wrong}
    section["lines"] = [gpu.asdict(line)]
    assert gpu.status(gpu.result([section], {})) == expected


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--output", str(output)]) == 2
    content = json.loads(output.read_text())
    assert content["measurements"] == [] and set(content["missing"]) == set(gpu.SHAPES)
    assert "no GPU on this machine" in capsys.readouterr().out
