"""The bits of every public loss on fixed inputs: whether a change of structure changed a value.

    python -m bench.bits > before.json      # then, with the other code
    python -m bench.bits > after.json       # diff the two

Every loss and function, on logits and on hidden states with a head, in all cost modes and dtypes:
value, statistics and gradients, each as the digest of its bytes. Same machine, same threads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import segloss

N, V, D, RANK = 37, 1031, 24, 3  # ragged: no multiple of a block or a vector
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = (
    "cross_entropy", "focal_loss", "poly_loss", "generalized_cross_entropy", "dft_loss",
    "self_adjusting_dice_loss", "dice_loss", "generalized_dice_loss", "jaccard_loss",
    "tversky_loss", "focal_tversky_loss", "lovasz_softmax",
)  # fmt: skip
SET_LOSSES = FUNCTIONS[6:]


def digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(data.tolist())).hexdigest()[:16]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """hidden (N, D), weight (V, D), bias (V,), a (r, D), b (V, r), logits (N, V); target (N,)."""
    tensors = {
        "hidden": random(N, D, seed=1),
        "weight": 0.5 * random(V, D, seed=2),
        "bias": 0.3 * random(V, seed=3),
        "a": 0.2 * random(RANK, D, seed=4),
        "b": 0.2 * random(V, RANK, seed=5),
    }
    logits = torch.nn.functional.linear(*(tensors[n] for n in ("hidden", "weight", "bias")))
    target = torch.randint(9, (N,), generator=torch.Generator().manual_seed(6)) * 101
    target[::5] = -100
    return {n: t.to(dtype) for n, t in (tensors | {"logits": logits}).items()}, target


def options_of(name: str) -> Iterator[tuple[str, dict]]:
    """Keywords of the loss and its call, by a label."""
    weight = 0.5 + torch.arange(V).remainder(7) / 4
    token_weight = torch.arange(N).remainder(4) / 2
    samples = torch.arange(N) // 10
    yield "plain", {}
    yield "sum", {"reduction": "sum"}
    yield "weights", {"weight": weight, "token_weight": token_weight}
    yield "normalizer", {"normalizer": 50.0}
    if name in SET_LOSSES:
        yield "all", {"classes": "all"}
        yield "samples", {"per_sample": True, "sample_ids": samples}
        yield "samples none", {"per_sample": True, "sample_ids": samples, "reduction": "none"}
    else:
        yield "none", {"reduction": "none"}
    if name == "cross_entropy":
        yield "smoothing", {"label_smoothing": 0.1, "z_loss": 1e-3, "weight": weight}
    elif name == "lovasz_softmax":
        yield "tolerance", {"tolerance": 0.05}
    elif name in SET_LOSSES and name != "generalized_dice_loss":
        yield "micro", {"average": "micro"}


def modes() -> Iterator[tuple[str, tuple[str, ...], dict]]:
    """(label, which tensors are trained, options of LinearLogits)."""
    small, all_logits = 8 * V * 8, N * V * 8
    yield "all trained", ("hidden", "weight", "bias"), {"chunk_bytes": small}
    yield "one chunk", ("hidden", "weight"), {}
    yield "frozen", ("hidden",), {"chunk_bytes": small}
    yield (
        "some kept",
        ("hidden", "weight"),
        {"chunk_bytes": small, "memory_budget": all_logits // 2},
    )
    yield "adapter", ("hidden", "a", "b"), {"chunk_bytes": small}
    yield "filtered", ("hidden", "weight"), {"grad_filter": 2.0**-12}
    yield "not compact", ("hidden", "weight"), {"compact": False, "softcap": 5.0, "scale": 0.7}
    yield "no gradient", (), {"chunk_bytes": small}


def digests(value, leaves: dict[str, Tensor], trained: tuple[str, ...]) -> list[str]:
    """Of what a loss returned and of the gradients of the trained leaves."""
    values = [value] if isinstance(value, Tensor) else [value[0], *vars(value[1]).values()]
    found = [digest(v) for v in values if v is not None]
    if trained:
        upstream = torch.linspace(0.5, 1.5, values[0].numel()).view_as(values[0])
        grads = torch.autograd.grad(
            values[0], [leaves[n] for n in trained], upstream.to(values[0]), allow_unused=True
        )
        found += ["none" if g is None else digest(g) for g in grads]
    return found


def cells() -> Iterator[tuple[str, list[str]]]:
    for dtype, name in itertools.product(DTYPES, FUNCTIONS):
        tensors, target = problem(dtype)
        for label, options in options_of(name):
            key = f"{str(dtype)[6:]} {name} {label}"
            if isinstance(options.get("weight"), Tensor):
                options = options | {"weight": options["weight"].to(dtype)}
            leaf = tensors["logits"].clone().requires_grad_()
            value = getattr(segloss, name)(leaf, target, **options)
            yield f"{key} | logits", digests(value, {"logits": leaf}, ("logits",))
            for mode, trained, source in modes():
                leaves = {n: t.clone().requires_grad_(n in trained) for n, t in tensors.items()}
                value = getattr(segloss, f"linear_{name}")(
                    leaves["hidden"],
                    leaves["weight"],
                    target,
                    linear_bias=leaves["bias"] if mode == "all trained" else None,
                    lora=(leaves["a"], leaves["b"], 0.75) if mode == "adapter" else None,
                    return_statistics=True,
                    **source,
                    **options,
                )
                yield f"{key} | {mode}", digests(value, leaves, trained)
    yield from other_cells()


def other_cells() -> Iterator[tuple[str, list[str]]]:
    """Sums, statistics, and the classes of every function."""
    for dtype in DTYPES:
        tensors, target = problem(dtype)
        sums = {
            "ce + lovasz": 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss(),
            "ce + focal": segloss.CrossEntropyLoss(label_smoothing=0.1) + 0.5 * segloss.FocalLoss(),
            "dice + ft": 0.3 * segloss.DiceLoss(classes="all") + 0.7 * segloss.FocalTverskyLoss(),
        }
        for label, expression in sums.items():
            for head in (False, True):
                leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
                source = leaves["logits"]
                if head:
                    source = segloss.LinearLogits(leaves["hidden"], leaves["weight"])
                trained = ("hidden", "weight") if head else ("logits",)
                key = f"{str(dtype)[6:]} {label} | {trained}"
                yield key, digests(expression(source, target), leaves, trained)
        leaf = tensors["logits"].clone().requires_grad_()
        statistics = segloss.logit_statistics(
            leaf, target, entropy=True, argmax=True, classes="present"
        )
        found = [digest(v) for v in vars(statistics).values() if v is not None]
        total = statistics.entropy.sum() + statistics.log_prob.sum() + statistics.prob_sum.sum()
        yield f"{str(dtype)[6:]} statistics", [*found, digest(torch.autograd.grad(total, leaf)[0])]


if __name__ == "__main__":
    torch.set_num_threads(2)
    json.dump(dict(cells()), sys.stdout, indent=0)
