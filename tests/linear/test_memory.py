"""`explain()` against the resident memory of a fresh process, for every mode."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from linear_memory import N, V

SCRIPT = Path(__file__).resolve().parents[1] / "linear_memory.py"
MIB = 2**20
LOGITS = N * V * 2
BOTH, HIDDEN = ["hidden", "weight"], ["hidden"]
CHUNKS = {"chunk_bytes": 8 * MIB}

CASES = {
    "eager": {"loss": "CrossEntropyLoss", "trainable": BOTH, "eager": True},
    **{f"{name}, trainable": {"loss": name, "trainable": BOTH, "source": CHUNKS}
       for name in ("CrossEntropyLoss", "FocalLoss", "DiceLoss", "LovaszSoftmaxLoss")},
    **{f"{name}, frozen": {"loss": name, "trainable": HIDDEN, "source": CHUNKS}
       for name in ("CrossEntropyLoss", "DiceLoss", "LovaszSoftmaxLoss")},
    "none, trainable": {"loss": "FocalLoss", "options": {"reduction": "none"}, "trainable": BOTH,
                        "source": CHUNKS},
    "none, frozen": {"loss": "FocalLoss", "options": {"reduction": "none"}, "trainable": HIDDEN,
                     "source": CHUNKS},
    "all classes": {"loss": "DiceLoss", "options": {"classes": "all"}, "trainable": BOTH,
                    "source": CHUNKS},
    "no grad": {"loss": "LovaszSoftmaxLoss", "trainable": [], "source": CHUNKS},
    "some kept": {"loss": "DiceLoss", "trainable": BOTH,
                  "source": CHUNKS | {"memory_budget": 16 * MIB}},
    "all kept": {"loss": "DiceLoss", "trainable": BOTH,
                 "source": CHUNKS | {"memory_budget": LOGITS}},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(CASES.values()))],
        # every tensor of its own pages, so that a freed one is no longer resident
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def explained(plan: str) -> float:
    return float(re.search(r"^peak\s+([\d.]+) MiB", plan, re.MULTILINE)[1]) * MIB


@pytest.mark.parametrize("case", [name for name in CASES if name != "eager"])
def test_explain_says_the_peak_within_a_quarter(measured, case):
    rise, peak = measured[case]["rise"], explained(measured[case]["plan"])
    # and 4 MiB: vectors of N and V numbers, and what the products of the CPU library set aside
    assert 0.9 * peak <= rise <= 1.25 * peak + 4 * MIB, f"{rise / MIB:.1f} MiB"


@pytest.mark.parametrize("case", [name for name in CASES if "kept" not in name and name != "eager"])
def test_a_tenth_of_what_eager_takes(measured, case):
    eager = measured["eager"]["rise"]
    assert eager > 4.5 * LOGITS  # a copy in bfloat16, the others in float32
    assert measured[case]["rise"] <= 0.1 * eager, f"{measured[case]['rise'] / MIB:.1f} MiB"


def test_the_budget_is_what_is_kept(measured):
    none, some, all_of_it = (
        measured[case]["rise"] for case in ("DiceLoss, trainable", "some kept", "all kept")
    )
    assert some - none == pytest.approx(16 * MIB, abs=4 * MIB)
    assert all_of_it - none == pytest.approx(LOGITS, abs=4 * MIB)
