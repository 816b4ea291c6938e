"""What is launched: every kernel of ours with the options that change its code, and the peers'.

N rows, V columns, K listed classes. A launch works on CPU tensors: compiled for a GPU that is not
there (`compiled.compiling_for`) or interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
import triton.language as tl

from segloss.kernels import (
    candidates,
    class_stats,
    common,
    divergence,
    logit_grad,
    projection,
    row_stats,
    sample_weights,
    scale,
    task_weights,
)

N, K = 20, 500  # no multiples of 16, which Triton compiles differently
RAGGED = 50257  # GPT-2's vocabulary: rows start at odd addresses, so loads are narrow
ALIGNED = 32768  # rows start at multiples of 16 bytes: loads are wide, and more is in flight

PLAIN = {}
CAPPED = {"softcap": 30.0, "scale": 0.5}
# every dtype, and for the usual ones each kind of load with and without the transform
INPUTS = [
    (torch.bfloat16, ALIGNED, PLAIN),
    (torch.bfloat16, RAGGED, PLAIN),
    (torch.float16, ALIGNED, CAPPED),
    (torch.float32, RAGGED, PLAIN),
    (torch.float32, ALIGNED, CAPPED),
    (torch.float64, RAGGED, CAPPED),
]


def index(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def stats(rows, **options):
    row_stats.row_stats(rows, index(N), -100, **options)


def stats_with_everything(rows):
    weight = torch.ones(rows.num_classes)
    stats(rows, entropy=True, argmax=True, column_sums=True, column_weight=weight)


def sums(rows, columns=None, row_weight=None):
    class_stats.class_sums(rows, rows.new(N), rows.new(N), columns, index(N), 1, row_weight)


def dots(rows, columns=None):
    num_columns = rows.num_classes if columns is None else columns.numel()
    grad = rows.new(1, num_columns)
    class_stats.row_dots(rows, rows.new(N), rows.new(N), columns, index(N), grad)


def peaks(rows):
    class_stats.class_peaks(rows, rows.new(N), rows.new(N), index(N), 1)


def lovasz_candidates(rows):
    own, threshold = index(N), rows.new(1, K)
    candidates.candidates(rows, rows.new(N), rows.new(N), torch.arange(K), index(N), own, threshold)


def grad(rows, **terms):
    per_row = ("row_max", "log_sum", "prob_coef", "target_coef", "target_rest")
    terms |= {name: rows.new(N) for name in per_row}
    terms = logit_grad.GradTerms(valid=index(N) == 0, target=index(N), **terms)
    logit_grad.logit_grad(rows, terms, torch.empty(N, rows.num_classes, dtype=rows.data.dtype))


def grad_with_everything(rows, columns=None):
    n = rows.new(N)
    grad(
        rows,
        entropy=n,
        entropy_grad=n,
        sum_grad=n,
        column_weight=torch.ones(rows.num_classes),
        sample=index(N),
        class_grad=rows.new(1, rows.num_classes if columns is None else columns.numel()),
        row_weight=n,
        columns=columns,
        entry_row=index(K),
        entry_class=torch.arange(K),
        entry_grad=rows.new(K),
        entry_rest=rows.new(K),
    )


def pair_of(rows, kind, weighted=False):
    teacher = None if kind == "lse" else common.Rows(torch.zeros_like(rows.data))
    if kind in ("forward", "reverse", "jsd"):
        teacher = common.Rows(teacher.data, rows.softcap, rows.scale)
    weight = torch.ones(rows.num_classes) if weighted else None
    return divergence.Pair(rows, teacher, index(N) == 0, kind, 0.5, weight)


def diverge(rows, kind, weighted=False):
    divergence.divergence(pair_of(rows, kind, weighted))


def diverge_grad(rows, kind, weighted=False, pairs=1):
    pair = pair_of(rows, kind, weighted)
    pair.numbers = divergence.PairNumbers(*[rows.new(N)] * len(divergence.PairNumbers._fields))
    pair.grad = rows.new(N)
    out = torch.empty(N, rows.num_classes, dtype=rows.data.dtype)
    divergence.divergence_grad(rows, [pair] * pairs, out)


SAMPLES = 1000  # held by one program at once
TASKS = 100
FEW = 3


def weigh_tasks(rows, num_tasks, published):
    history = task_weights.TaskHistory.empty(num_tasks, 200, 101, 65536, "cpu")
    task_weights.task_weights(
        history,
        torch.ones(num_tasks, dtype=rows.dtype),
        task_weights.Moment(200, 200, True),
        tau=5.0,
        published=published,
    )


def tokens(rows, num_samples):
    return sample_weights.Tokens.of(rows.new(N), index(N), num_samples)


def weigh_samples(rows, scheme, num_samples=SAMPLES):
    losses = torch.ones(num_samples, dtype=rows.dtype)
    sample_weights.sample_weights(losses, sample_weights.Scheme(scheme))


def weigh_tokens(rows, scheme, num_samples=SAMPLES):
    given = tokens(rows, num_samples)
    sample_weights.sample_means_and_weights(given, sample_weights.Scheme(scheme))


# What is launched, by name: the options that change a kernel's code, none of them and all of them.
LAUNCHES = {
    "row_stats": stats,
    "row_stats-entropy": lambda rows: stats(rows, entropy=True),
    "row_stats-argmax": lambda rows: stats(rows, argmax=True),
    "row_stats-smoothing": lambda rows: stats(rows, column_sums=True),
    "row_stats-everything": stats_with_everything,
    "class_sums-all": sums,
    "class_sums-listed": lambda rows: sums(rows, torch.arange(K), rows.new(N)),
    "row_dots-all": dots,
    "row_dots-listed": lambda rows: dots(rows, torch.arange(K)),
    "class_peaks": peaks,
    "candidates": lovasz_candidates,
    "logit_grad": grad,
    "logit_grad-entropy": lambda rows: grad(rows, entropy=rows.new(N), entropy_grad=rows.new(N)),
    "logit_grad-smoothing": lambda rows: grad(rows, sum_grad=rows.new(N)),
    "logit_grad-everything": grad_with_everything,
    "logit_grad-everything-listed": lambda rows: grad_with_everything(rows, torch.arange(K)),
    **{f"divergence-{kind}": functools.partial(diverge, kind=kind) for kind in divergence.KINDS},
    "divergence-targets-weighted": lambda rows: diverge(rows, "targets", weighted=True),
    **{
        f"divergence_grad-{kind}": functools.partial(diverge_grad, kind=kind)
        for kind in divergence.KINDS
    },
    "divergence_grad-several": lambda rows: diverge_grad(rows, "targets", weighted=True, pairs=2),
    "task_weights-paper": lambda rows: weigh_tasks(rows, FEW, published=False),
    "task_weights-published-many": lambda rows: weigh_tasks(rows, TASKS, published=True),
    "sample_means": lambda rows: sample_weights.sample_means(tokens(rows, SAMPLES)),
    "sample_weights-irdro": lambda rows: weigh_samples(rows, "irdro"),
    "sample_weights-linupper": lambda rows: weigh_samples(rows, "linupper"),
    "sample_means-extremes": lambda rows: weigh_tokens(rows, "extremes", FEW),
    "sample_means-rank": lambda rows: weigh_tokens(rows, "rank"),
    "scale": lambda rows: scale.scaled(rows.data, torch.ones(()), rows.data),
    "scale-cast": lambda rows: scale.scaled(
        rows.data,
        torch.ones(()),
        torch.empty_like(
            rows.data, dtype=torch.float64 if rows.dtype == torch.float64 else torch.bfloat16
        ),
    ),
    "projection": lambda rows: projection.project(rows.data[0], 300),
    "back_projection": lambda rows: projection.back_project(
        torch.ones(300, dtype=torch.float64), rows.num_classes
    ),
}


@contextmanager
def launching() -> Iterator[None]:
    """Launchers pick Triton for CPU tensors, and find ones in what a kernel would have written."""

    def ones(rows, *shape, dtype=None):
        return torch.ones(shape, dtype=dtype or rows.dtype)

    with (
        patch.object(common, "backend", lambda device: ("triton", "on CPU tensors")),
        patch.object(common.Rows, "new", ones),
    ):
        yield


def launch(name: str, dtype: torch.dtype, num_classes: int, transform: dict) -> None:
    with launching():
        LAUNCHES[name](common.Rows(torch.zeros(1, N, num_classes, dtype=dtype), **transform))


# ---------------------------------------------------------------------------------------- peers


def liger_cross_entropy(target: str) -> None:
    """Forward and backward in one kernel: its first loop reads, its second reads and writes."""
    from liger_kernel.ops import cross_entropy as liger

    logits = torch.zeros(N, ALIGNED, dtype=torch.bfloat16, requires_grad=True)
    architecture = {"sm_100": "blackwell"}.get(target, "older")
    with (
        patch.object(liger, "is_hip", lambda: target == "gfx942"),
        patch.object(liger, "infer_device_arch", lambda: architecture),
    ):
        liger.cross_entropy_forward(
            logits.detach().requires_grad_(), index(N), None, -100, 0.0, 0.0, "mean", None, False
        )


# rows, classes and hidden size of a launch of a kernel that multiplies matrices
HEAD = (256, 1024, 256)


def _head():
    n, v, d = HEAD
    return torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(v, d, dtype=torch.bfloat16)


def cce_forward(target: str) -> None:
    from cut_cross_entropy import tl_utils
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    # the interpreter has no log1p; it moves no bytes
    known = {"tl_log1p": lambda x: tl.log(1 + x)} if common.interpreting() else {}
    with patch.multiple(tl_utils, **known) if known else nullcontext():
        cce_lse_forward_kernel(*_head(), return_logit_avg=True)


def cce_target_logit(target: str) -> None:
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel

    indexed_neg_dot_forward_kernel(*_head(), index(HEAD[0]))


def cce_backward(target: str) -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel

    hidden, weight = _head()
    n, v, _ = HEAD
    cce_backward_kernel(
        torch.ones(()), hidden, weight.requires_grad_(), torch.zeros(n), None, None,
        2.0**-12, targets=index(n), vocab_ordering=torch.arange(v),
    )  # fmt: skip


PEERS: dict[str, Callable[[str], None]] = {
    "Liger cross_entropy": liger_cross_entropy,
    "CCE forward": cce_forward,
    "CCE target logit": cce_target_logit,
    "CCE backward": cce_backward,
}
