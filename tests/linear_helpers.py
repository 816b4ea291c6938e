"""Hidden states and heads for the tests of `LinearLogits`, and what plain PyTorch makes of them.

B x T or N tokens, V classes, D hidden size, r rank of a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from helpers import (
    LOSSES,
    TOKEN_LOSSES,
    example,
    fused,
    module,
    naive,
    random_weights,
    upstream_like,
)
from own_losses import OWN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import segloss
from segloss import reference

V, D, RANK = 11, 4, 2
LORA_SCALE = 0.75
EVERYTHING = ("hidden", "weight", "bias", "a", "b")
CALL = ("token_weight", "sample_ids", "normalizer", "return_statistics")

Tensors = dict[str, Tensor]


def problem(
    *tokens: int,
    v: int = V,
    d: int = D,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    names: Iterable[str] = EVERYTHING,
    **options,
) -> tuple[Tensors, Tensor]:
    """(hidden (*tokens, D), weight (V, D), bias (V,), a (r, D), b (V, r); target (*tokens)).

    Logits have a standard deviation of about 2, and hidden states lean towards their target.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    _, target = example(*tokens, v, seed=seed, **options)
    weight = random(v, d)
    lean = torch.rand((*tokens, 1), generator=generator, dtype=torch.float64)
    tensors = {
        "hidden": (random(*tokens, d) + lean * weight[target.clamp(min=0)]) * 2 / d**0.5,
        "weight": weight,
        "bias": 0.5 * random(v),
        "a": random(RANK, d) / d**0.5,
        "b": random(v, RANK),
    }
    return {name: tensors[name].to(dtype) for name in names}, target


def source(tensors: Tensors, **options) -> segloss.LinearLogits:
    lora = (tensors["a"], tensors["b"], LORA_SCALE) if "a" in tensors else None
    head = tensors["hidden"], tensors["weight"], tensors.get("bias")
    return segloss.LinearLogits(*head, lora=lora, **options)


def stored(tensors: Tensors, **options) -> Tensor:
    """The logits that `source` stands for."""
    lora = (tensors["a"], tensors["b"], LORA_SCALE) if "a" in tensors else None
    head = tensors["hidden"], tensors["weight"], tensors.get("bias")
    return reference.linear_logits(*head, lora=lora, **options)


# -------------------------------------------------------------------------------------- losses


def weighted_sum(terms: list[tuple[float, str]]) -> tuple[Callable, Callable]:
    """(segloss.CombinedLoss of the terms, the same in plain PyTorch), as functions."""

    def ours(logits, target, **options):
        call = {name: options.pop(name) for name in CALL if name in options}
        return sum(c * module(name, **options) for c, name in terms)(logits, target, **call)

    def truth(logits, target, **options):
        return sum(c * naive(name)(logits, target, **options) for c, name in terms)

    return ours, truth


# name: (ours, in plain PyTorch)
CASES = {name: (fused(name), naive(name)) for name in LOSSES} | {
    **{name: (ours, truth) for name, (_, ours, truth) in OWN.items()},
    "token sum": weighted_sum([(0.5, "focal_loss"), (1.5, "cross_entropy"), (-0.25, "poly_loss")]),
    "0.6 ce + 0.4 lovasz": weighted_sum([(0.6, "cross_entropy"), (0.4, "lovasz_softmax")]),
}
TOKEN_CASES = [*TOKEN_LOSSES, "token sum", "robust_loss"]
SET_CASES = [name for name in CASES if name not in TOKEN_CASES]


# --------------------------------------------------------------------------------------- modes

TOKENS = (3, 5)
LOGIT_BYTES = 15 * V * 8  # of the float64 logits of TOKENS


# what is trainable, the source's options, and the reduction that lead to each way of computing
MODES: dict[str, tuple[tuple[str, ...], dict, dict]] = {
    "fused": (EVERYTHING, {"chunk_bytes": LOGIT_BYTES // 3}, {}),
    "fused, frozen head": (("hidden",), {"chunk_bytes": LOGIT_BYTES // 3}, {}),
    "frozen": (("hidden",), {"chunk_bytes": LOGIT_BYTES // 3}, {"reduction": "none"}),
    "recompute": (EVERYTHING, {"chunk_bytes": LOGIT_BYTES // 4}, {"reduction": "none"}),
    "recompute, some kept": (
        EVERYTHING,
        {"chunk_bytes": LOGIT_BYTES // 4, "memory_budget": LOGIT_BYTES // 2},
        {"reduction": "none"},
    ),
    "recompute, all kept": (
        EVERYTHING,
        {"chunk_bytes": LOGIT_BYTES // 4, "memory_budget": LOGIT_BYTES},
        {"reduction": "none"},
    ),
    "adapter": (("hidden", "a", "b"), {"chunk_bytes": LOGIT_BYTES // 4}, {"reduction": "none"}),
    "adapter, fused": (("hidden", "a", "b"), {}, {}),
    "bias only": (("bias",), {"chunk_bytes": 1}, {"reduction": "none"}),
    "head only": (("weight", "bias"), {"chunk_bytes": 1}, {}),
    "no grad": ((), {"chunk_bytes": LOGIT_BYTES // 4}, {}),
}
CASE_MODES = [
    (name, mode)
    for name in CASES
    for mode in MODES
    if name != "0.6 ce + 0.4 lovasz" or "reduction" not in MODES[mode][2]
]
# one of each kind, where many options meet the modes
SOME_MODES = ["fused", "frozen", "recompute, some kept", "adapter"]
SOME_CASE_MODES = [(name, mode) for name, mode in CASE_MODES if mode in SOME_MODES]


def value_and_grads(
    loss: Callable,
    logits_of: Callable,
    tensors: Tensors,
    target: Tensor,
    trainable: Iterable[str] = EVERYTHING,
    upstream: Callable[[Tensor], Tensor] = upstream_like,
    **options,
) -> tuple[Tensor, Tensors]:
    """`(loss(logits_of(tensors), target), {name: gradient})` under an upstream gradient."""
    names = [name for name in trainable if name in tensors]
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
    value = loss(logits_of(leaves), target, **options)
    if not names:
        return value.detach(), {}
    grads = torch.autograd.grad(value, [leaves[n] for n in names], upstream(value))
    return value.detach(), dict(zip(names, grads, strict=True))


def both(
    name: str,
    tensors: Tensors,
    target: Tensor,
    trainable: Iterable[str] = EVERYTHING,
    source_options: dict | None = None,
    transform: dict | None = None,
    upstream: Callable[[Tensor], Tensor] = upstream_like,
    **options,
) -> tuple[tuple[Tensor, Tensors], tuple[Tensor, Tensors]]:
    """Value and gradients of `CASES[name]`: ours, and plain PyTorch's.

    `transform`: softcap and scale, for both; `source_options`: for ours.
    """
    ours, truth = CASES[name]
    transform = transform or {}
    more = transform | (source_options or {})
    arguments = tensors, target, tuple(trainable), upstream
    return (
        value_and_grads(ours, lambda t: source(t, **more), *arguments, **options),
        value_and_grads(truth, lambda t: stored(t, **transform), *arguments, **options),
    )


def assert_equal_to_truth(ours, truth, tolerance: float = 1e-10, what: str = "") -> None:
    """Relative errors of value and every gradient within the tolerance.

    A gradient that is 0 but for rounding, as the bias's sum, is measured by the largest of them.
    """
    assert ours[0].shape == truth[0].shape
    floor = 1e-14 * max([1.0, *(g.norm().item() for g in truth[1].values())])
    for name, mine, exact in [
        ("value", ours[0], truth[0]),
        *((name, grad, truth[1][name]) for name, grad in ours[1].items()),
    ]:
        assert mine.shape == exact.shape, name
        difference = (mine.double() - exact.double()).norm()
        allowed = tolerance * exact.double().norm() + floor
        assert difference <= allowed, f"{what} {name}: off by {difference:.3g} > {allowed:.3g}"


def assert_same_bits(first: tuple[Tensor, Tensors], second: tuple[Tensor, Tensors]) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert torch.equal(grad, second[1][name]), name


def token_options(*tokens: int, v: int = V) -> dict[str, dict]:
    """What every loss takes, by a name for the test."""
    some = random_weights(*tokens, seed=2)
    some.view(-1)[::3] = 0
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "token weight": {"token_weight": random_weights(*tokens)},
        "some weights 0": {"token_weight": some},
        "class weight": {"weight": random_weights(v)},
        "both weights": {"token_weight": some, "weight": random_weights(v)},
        "normalizer": {"normalizer": 40.0, "token_weight": some},
        "ignore_index": {"ignore_index": 3},
    }


# ------------------------------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Records (shape, dtype) of every new storage that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.seen.append((tuple(t.shape), t.dtype))
        return result

    def largest(self) -> int:
        """Bytes of the largest."""
        return max(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.seen)
