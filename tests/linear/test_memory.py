"""`explain()` against the resident memory of a fresh process, and against the allocator's bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_memory import N, V

import segloss
from bench import limits
from bench.simulated import Operations

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
    return float(re.search(r"^peak\s+(?:at most )?([\d.]+) MiB", plan, re.MULTILINE)[1]) * MIB


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
    # one chunk's bytes are there in any case
    assert some - none == pytest.approx(8 * MIB, abs=4 * MIB)
    assert all_of_it - none == pytest.approx(LOGITS - 8 * MIB, abs=4 * MIB)


# ------------------------------------------------------------------------- the allocator's bytes

SMOOTHED = segloss.CrossEntropyLoss(label_smoothing=0.1)
CE, DICE, LOVASZ = segloss.CrossEntropyLoss(), segloss.DiceLoss(), segloss.LovaszSoftmaxLoss()
ALL, LOVASZ_ALL = segloss.DiceLoss(classes="all"), segloss.LovaszSoftmaxLoss(classes="all")
PER_TOKEN = segloss.FocalLoss(reduction="none")
WIDE = (1024, 49152, 64)  # two chunks by default
# loss, (N, V, D), what is trained, dtype, autocast, the source's options
EXPLAINED = {
    "two chunks": (CE, WIDE, BOTH, torch.bfloat16, False, {}),
    "four chunks": (CE, WIDE, BOTH, torch.bfloat16, False, {"chunk_bytes": 256 * 49152 * 2}),
    "a deep head": (CE, (6000, 8192, 1024), BOTH, torch.bfloat16, False, {}),
    "in place": (CE, (600, 60000, 600), BOTH, torch.bfloat16, False, {}),
    "in place, smoothed": (SMOOTHED, (600, 60000, 600), BOTH, torch.bfloat16, False, {}),
    "float32": (CE, WIDE, BOTH, torch.float32, False, {}),
    "float16": (CE, WIDE, BOTH, torch.float16, False, {}),
    "autocast": (CE, WIDE, BOTH, torch.float32, True, {}),
    "frozen": (CE, WIDE, HIDDEN, torch.bfloat16, False, {}),
    "Dice": (DICE, WIDE, BOTH, torch.bfloat16, False, {}),
    "Dice, nothing kept": (DICE, WIDE, BOTH, torch.bfloat16, False, {"memory_budget": 0}),
    "Dice, all kept": (DICE, WIDE, BOTH, torch.bfloat16, False, {"memory_budget": 1 << 40}),
    "Dice, autocast": (DICE, WIDE, BOTH, torch.float32, True, {}),
    "Dice, frozen": (DICE, (2048, 8192, 1024), HIDDEN, torch.bfloat16, False, {}),
    "Lovász": (LOVASZ, WIDE, BOTH, torch.bfloat16, False, {}),
    "per token": (PER_TOKEN, WIDE, BOTH, torch.bfloat16, False, {}),
    "per token, frozen": (PER_TOKEN, WIDE, HIDDEN, torch.bfloat16, False, {}),
    "all classes": (ALL, WIDE, BOTH, torch.bfloat16, False, {}),
    "all classes, float32": (ALL, WIDE, BOTH, torch.float32, False, {}),
    "all classes, frozen": (ALL, WIDE, HIDDEN, torch.bfloat16, False, {}),
    "all classes, one chunk": (ALL, (2048, 8192, 1024), BOTH, torch.bfloat16, False, {}),
    "all classes, frozen, deep": (ALL, (2048, 8192, 1024), HIDDEN, torch.bfloat16, False, {}),
    "all classes, no gradient": (ALL, WIDE, [], torch.bfloat16, False, {}),
    "no gradient": (DICE, WIDE, [], torch.bfloat16, False, {}),
    "Lovász, all classes": (LOVASZ_ALL, WIDE, BOTH, torch.bfloat16, False, {}),
    "Lovász, all classes, frozen": (LOVASZ_ALL, WIDE, HIDDEN, torch.bfloat16, False, {}),
    "Lovász, all classes, frozen, deep": (
        LOVASZ_ALL, (2048, 8192, 1024), HIDDEN, torch.bfloat16, False, {},
    ),
    "Lovász, all classes, no gradient": (LOVASZ_ALL, WIDE, [], torch.bfloat16, False, {}),
}  # fmt: skip


def planned_and_made(
    loss, size, trained, dtype, autocast, options, kind="", ignored=False, spread=1.0
):
    """(what `explain` says, the allocator's peak without gradients).

    `trained` is None for logits given, whose gradient is counted: it is all there is; `kind` is the
    teacher's, `ignored` whether every fourth token is.
    """
    n, v, d = size
    draw = torch.Generator().manual_seed(0)
    leaves = {
        name: (spread * torch.randn(rows, d, generator=draw))
        .to(dtype)
        .requires_grad_(name in (trained or ()))
        for name, rows in (("hidden", n), ("weight", v))
    }
    target = torch.randint(64, (n,), generator=draw)
    if ignored:
        target[::4] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if trained is None:
            logits = (leaves["hidden"] @ leaves["weight"].T).requires_grad_()
        else:
            logits = segloss.LinearLogits(**leaves, **options)
        beside = {"teacher": teacher_of(kind, n, v, d, dtype)} if kind else {}
        plan = loss.explain(logits, target, **beside)
        with Operations() as made:
            value = loss(logits, target, **beside).sum()
            if value.requires_grad:
                value.backward()
    grads = sum(x.grad.nbytes for x in leaves.values() if x.grad is not None)
    return plan, made.peak - grads


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_the_allocators_peak(case):
    plan, made = planned_and_made(*EXPLAINED[case])
    assert explained(plan) == pytest.approx(made, rel=limits.EXPLAINED)


# nothing merged, some, and all
@pytest.mark.parametrize("threshold", [1e-30, 2**-12, 0.9])
@pytest.mark.parametrize("size", [WIDE, (1500, 16384, 48), (2048, 8192, 1024)], ids=str)
@pytest.mark.parametrize("loss", [CE, DICE], ids=["CE", "Dice"])
def test_explain_bounds_what_a_filter_takes(loss, size, threshold):
    options = {"grad_filter": threshold}
    plan, made = planned_and_made(loss, size, BOTH, torch.bfloat16, False, options, spread=0.2)
    assert re.search(r"^peak\s+at most", plan, re.MULTILINE)
    assert made <= explained(plan)
    if threshold == 1e-30:
        assert explained(plan) <= 1.1 * made


DISTIL = segloss.DistillationLoss
LARGE = (1500, 16384, 64)  # two chunks by default
DEEP = (2048, 16384, 512)
KL, JSD = DISTIL(), DISTIL("jsd", temperature=2, reduction="none")
MIXED = 0.5 * DISTIL("reverse") + 0.5 * CE
# the same, and: the teacher, whether every fourth token is ignored
TAUGHT = {
    "a head": (KL, LARGE, BOTH, torch.bfloat16, False, {}, "linear", False),
    "a head, mixed": (MIXED, LARGE, BOTH, torch.bfloat16, False, {}, "linear", False),
    "a head, frozen": (MIXED, LARGE, HIDDEN, torch.bfloat16, False, {}, "linear", False),
    "a head, deep": (KL, DEEP, BOTH, torch.bfloat16, False, {}, "linear", True),
    "a head, autocast": (KL, LARGE, BOTH, torch.float32, True, {}, "linear", False),
    "a head, per token": (JSD, LARGE, BOTH, torch.bfloat16, False, {}, "linear", True),
    "a head, nothing kept": (JSD, LARGE, BOTH, torch.bfloat16, False, {"memory_budget": 0},
                             "linear", False),
    "a head, all kept": (JSD, LARGE, BOTH, torch.bfloat16, False, {"memory_budget": 1 << 40},
                         "linear", False),
    "a head, per token, frozen": (JSD, LARGE, HIDDEN, torch.bfloat16, False, {}, "linear", False),
    "a head, Dice": (KL + DICE, LARGE, BOTH, torch.bfloat16, False, {}, "linear", False),
    "a head, no gradient": (KL, LARGE, [], torch.bfloat16, False, {}, "linear", False),
    "logits": (KL, LARGE, BOTH, torch.bfloat16, False, {}, "dense", False),
    "logits, prompts": (MIXED, LARGE, BOTH, torch.bfloat16, False, {}, "dense", True),
    "logits, deep": (KL, DEEP, BOTH, torch.bfloat16, False, {}, "dense", False),
    "logits, per token": (JSD, LARGE, BOTH, torch.bfloat16, False, {}, "dense", True),
    "logits, frozen": (JSD, LARGE, HIDDEN, torch.bfloat16, False, {}, "dense", True),
    "stored": (KL, LARGE, BOTH, torch.bfloat16, False, {}, "renormalise", False),
    "stored, written out": (JSD, LARGE, BOTH, torch.bfloat16, False, {}, "uniform", False),
    "a head of logits": (MIXED, LARGE, None, torch.bfloat16, False, {}, "linear", False),
    "logits of logits": (KL, LARGE, None, torch.bfloat16, False, {}, "dense", False),
}  # fmt: skip


def teacher_of(kind: str, n: int, v: int, d: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, d, generator=draw).to(dtype) for rows in (n, v))
    if kind == "linear":
        return segloss.LinearLogits(hidden, weight)
    logits = hidden @ weight.T
    if kind == "dense":
        return logits
    log_prob, ids = logits.float().log_softmax(-1).topk(8)
    return segloss.TopK(ids, log_prob, kind)


@pytest.mark.parametrize("case", TAUGHT)
def test_explain_says_the_peak_with_a_teacher(case):
    *_, kind, ignored = TAUGHT[case]
    plan, made = planned_and_made(*TAUGHT[case])
    assert explained(plan) == pytest.approx(made, rel=limits.EXPLAINED)
    assert "teacher    " in plan or kind == "renormalise" or (kind == "dense" and not ignored)


def test_explain_counts_the_teachers_products():
    hidden, weight = torch.randn(40, 6), torch.randn(30, 6, requires_grad=True)
    target = torch.arange(40) % 30
    teacher = segloss.LinearLogits(torch.randn(40, 9), torch.randn(30, 9))
    for loss, times in ((KL, "1 product"), (DISTIL(reduction="none"), "2 products")):
        plan = segloss.LinearLogits(hidden, weight).explain(loss, target, teacher=teacher)
        flop = int(times[0]) * 2 * 40 * 30 * 9
        assert f"{times} of its head = {flop:.3g} FLOP" in plan
    assert "not counted: explain(..., teacher=teacher) does" in KL.explain(hidden, target % 6)
    with pytest.raises(TypeError, match="reads no teacher"):
        CE.explain(hidden, target % 6, teacher=teacher)


def every_loss():
    named = {name: kind for name, kind in vars(segloss).items() if name.endswith("Loss")}
    apart = ("TokenLoss", "RegionLoss", "CombinedLoss", "DistillationLoss")  # no losses of a target
    return [kind() for name, kind in sorted(named.items()) if name not in apart]


@pytest.mark.parametrize("loss", [*every_loss(), PER_TOKEN, DICE + CE], ids=repr)
@pytest.mark.parametrize("n", [256, 1500, 1501])  # one chunk, several, one more of a single row
def test_what_is_kept_does_not_raise_the_peak_of_a_step(loss, n):
    """Through a model of two layers: what forward keeps lies where its chunks lay."""
    v, d = 16384, 48
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    target = torch.randint(64, (n,), generator=draw)

    def peak(budget):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Linear(d, d), torch.nn.GELU(), torch.nn.Linear(d, d)
        ).bfloat16()
        weight = torch.randn(v, d, generator=draw).bfloat16().requires_grad_()
        options = {"memory_budget": budget, "chunk_bytes": 400 * v * 2}
        with Operations() as made:
            logits = segloss.LinearLogits(layers(x.bfloat16()), weight, **options)
            loss(logits, target).sum().backward()
        return made.peak

    peak(0)  # what a process makes once
    assert peak(None) <= peak(0)
