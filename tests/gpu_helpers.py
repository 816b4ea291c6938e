"""What the tests of a GPU share, a real one and the simulated one: cases, options, comparison."""

from __future__ import annotations

import torch
from helpers import (
    LOSSES,
    SET_LOSSES,
    TOLERANCE,
    random_weights,
    relative_error,
    upstream_like,
)
from linear_helpers import CASES, EVERYTHING, source, stored

from bench.simulated import SimulatedGpu, gradients

HALF = torch.bfloat16
# V: blocks of a vocabulary that does not divide evenly; tokens in samples, some of them ignored
V, TOKENS = 37, (3, 8)
CHUNK = V * 7 * 2  # of bfloat16 logits: seven rows, which does not divide evenly either

# what is trainable, the source's options and the reduction: each way of computing, and each option
MODES = {
    "fused": (EVERYTHING, {}, {}),
    "fused, compact": (EVERYTHING, {"compact": True}, {}),
    "fused, one chunk": (("hidden", "weight"), {"chunk_bytes": None}, {}),
    "fused, frozen head": (("hidden",), {}, {}),
    "fused, head only": (("weight",), {}, {}),
    "fused, adapter": (("hidden", "a", "b"), {}, {}),
    "frozen": (("hidden",), {}, {"reduction": "none"}),
    "recompute": (EVERYTHING, {}, {"reduction": "none"}),
    "recompute, compact": (("hidden", "weight"), {"compact": True}, {"reduction": "none"}),
    "recompute, some kept": (EVERYTHING, {"memory_budget": 2 * CHUNK}, {"reduction": "none"}),
    "recompute, adapter": (("hidden", "a", "b"), {}, {"reduction": "none"}),
    "no grad": ((), {}, {}),
}
CASE_MODES = [
    (name, mode)
    for name in CASES
    for mode in MODES
    if name != "0.6 ce + 0.4 lovasz" or "reduction" not in MODES[mode][2]
]
TRANSFORM = {"softcap": 20.0, "scale": 0.75}


def run(loss, logits_of, tensors, target, trainable, on=None, **options):
    """[value, a gradient per trainable tensor]: plainly, or on a device, real or simulated."""
    names = [name for name in trainable if name in tensors]
    real = isinstance(on, torch.device)

    def there(x):
        return x.to(on) if real and isinstance(x, torch.Tensor) else x

    leaves = {n: there(t.detach().clone()).requires_grad_(n in names) for n, t in tensors.items()}
    wanted = [leaves[n] for n in names]
    target, options = there(target), {name: there(value) for name, value in options.items()}
    if on is None or real:
        value = loss(logits_of(leaves), target, **options)
        if not wanted:
            return [value.detach()]
        up = there(upstream_like(value.detach().cpu()))
        return [value.detach(), *torch.autograd.grad(value, wanted, up)]
    with on:
        value = loss(logits_of(leaves), target, **options)
    up = upstream_like(value.detach())  # outside, where its dice fall as ever
    with on:
        return [value.detach(), *(gradients(value, wanted, up) if wanted else [])]


def as_good_as_plain(mine, plain, true, dtype, what: str = "") -> None:
    """Results as close to float64 as plain PyTorch's in the same dtype, or as its rounding is."""
    for place, (a, b, c) in enumerate(zip(mine, plain, true, strict=True)):
        allowed = 2 * relative_error(b, c) + max(2 * TOLERANCE[dtype], torch.finfo(dtype).eps)
        error = relative_error(a.cpu(), c)
        assert error <= allowed, f"{what}, result {place}: {error:.2g} > {allowed:.2g}"


def compare(name, ours, truth, tensors, target, trainable=("hidden", "weight"), dtype=HALF, **how):
    """Ours on a GPU as close to float64 as plain PyTorch; the GPU, a simulated one by default.

    `how`: the options of each call, `source_options` of ours and `transform` of both.
    """
    source_options, transform = how.pop("source_options", {}), how.pop("transform", {})
    gpu = how.pop("gpu", None) or SimulatedGpu()
    more = {"compact": False, "chunk_bytes": CHUNK} | source_options | transform
    small = {key: x.to(dtype) for key, x in tensors.items()}
    exact = {key: x.double() for key, x in small.items()}
    true = run(truth, lambda t: stored(t, **transform), exact, target, trainable, **how)
    plain = run(truth, lambda t: stored(t, **transform), small, target, trainable, **how)
    mine = run(ours, lambda t: source(t, **more), small, target, trainable, gpu, **how)
    as_good_as_plain(mine, plain, true, dtype, name)
    assert getattr(gpu, "faults", []) == []
    return gpu


def compare_on_logits(name, ours, truth, logits, target, gpu=None, **options):
    """The same on stored logits (..., V), a strided view of wider ones."""
    gpu = gpu or SimulatedGpu()
    pair = {"logits": torch.cat([logits, logits[:, :1]], 1)}

    def rows(leaves):
        return leaves["logits"][:, :-1]

    exact = {"logits": pair["logits"].double()}
    true = run(truth, rows, exact, target, pair, **options)
    plain = run(truth, rows, pair, target, pair, **options)
    mine = run(ours, rows, pair, target, pair, gpu, **options)
    as_good_as_plain(mine, plain, true, logits.dtype, name)
    assert getattr(gpu, "faults", []) == []
    return gpu


def call_options() -> dict[str, dict]:
    some = random_weights(*TOKENS, seed=2)
    some.view(-1)[::3] = 0
    return {
        "sum": {"reduction": "sum"},
        "token weight": {"token_weight": some},
        "class weight": {"weight": random_weights(V)},
        "normalizer": {"normalizer": 40.0},
    }


SET_OPTIONS = {
    "all": {"classes": "all"},
    "per sample": {"per_sample": True},
    "per sample, all": {"per_sample": True, "classes": "all", "reduction": "none"},
    "sample ids": {"per_sample": True, "sample_ids": torch.arange(24).view(TOKENS) % 5 - 2},
}
OPTIONS = [(name, option) for name in LOSSES for option in call_options()]
OPTIONS += [(name, option) for name in SET_LOSSES for option in SET_OPTIONS]
