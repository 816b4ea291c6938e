"""What the tests share: the losses by name, random examples, and the comparison rules."""

from __future__ import annotations

import torch
from torch import Tensor

import segloss
from segloss import reference
from segloss.losses import registry

# every loss of the registry but those of a teacher: {function: name of its class}
ALONE = [loss for loss in registry.LOSSES.values() if not loss.reads_teacher]
TOKEN_LOSSES, REGION_LOSSES, LOVASZ = (
    {loss.function: loss.__name__ for loss in ALONE if issubclass(loss, kind)}
    for kind in (segloss.TokenLoss, segloss.RegionLoss, segloss.LovaszSoftmaxLoss)
)
SET_LOSSES = REGION_LOSSES | LOVASZ
LOSSES = TOKEN_LOSSES | SET_LOSSES

# V: 2 is the smallest choice; 507 is odd, no multiple of any vector or block; 4099 is prime and
# just above a block of 4096. N: 1 is a lone row; 7 leaves a ragged last block; 33 is one above 32.
RAGGED = [(1, 2), (7, 507), (33, 4099), (3, 11, 507), (1, 7, 2)]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def fused(name: str):
    return getattr(segloss, name)


def naive(name: str):
    return getattr(reference, name)


def module(name: str, **options):
    return getattr(segloss, LOSSES[name])(**options)


def example(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    ignored: float = 0.25,
    skill: float = 2.0,
    classes: int = 6,
) -> tuple[Tensor, Tensor]:
    """Logits of `shape` (..., V) and a target over few classes, so that classes repeat.

    `skill` lifts some targets' logits, so that probabilities range from tiny to near 1. At least
    one token is valid where there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, v = shape[:-1], shape[-1]
    logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    some = torch.randperm(v, generator=generator)[:classes]
    target = some[torch.randint(len(some), tokens, generator=generator)]
    lift = skill * torch.rand((*tokens, 1), generator=generator, dtype=torch.float64) * 2
    logits = logits.scatter_add(-1, target[..., None], lift)
    drop = torch.rand(tokens, generator=generator) < ignored
    if drop.numel():
        drop.view(-1)[0] = False
    return logits.to(dtype), target.masked_fill(drop, -100)


def random_weights(*shape: int, seed: int = 1) -> Tensor:
    """Positive weights, eighths so that every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 17, shape, generator=generator).double() / 8


def upstream_like(value: Tensor) -> Tensor:
    """An arbitrary upstream gradient, of both signs and exact in every dtype."""
    generator = torch.Generator().manual_seed(7)
    size = torch.randint(1, 17, value.shape, generator=generator)
    sign = 1 - 2 * torch.randint(2, value.shape, generator=generator)
    return (size * sign / 8).to(value)


def value_and_grad(loss, logits: Tensor, target: Tensor, source=None, **options):
    """`(loss, d loss / d logits)` under an arbitrary upstream gradient.

    `source` maps the leaf to what the loss is given: `DenseLogits`, `transform`, a slice.
    """
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf if source is None else source(leaf), target, **options)
    (grad,) = torch.autograd.grad(value, leaf, upstream_like(value))
    return value.detach(), grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected` (0 / 0 is no error)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    if difference == 0:
        return 0.0
    return (difference / expected.double().norm()).item()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    """Relative error within `tolerance`, or a difference within the rounding of numbers near 1.

    The latter because most losses are 1 minus something: near 0 their digits are gone.
    """
    error = relative_error(actual, expected)
    if (actual.double() - expected.double()).norm() <= 1e-14:
        return
    assert error <= tolerance, f"{what} relative error {error:.3g} > {tolerance:.3g}"


def assert_matches_reference(
    name: str,
    logits: Tensor,
    target: Tensor,
    tolerance=1e-10,
    source=None,
    transform=None,
    **options,
) -> None:
    """Value and gradient equal the float64 reference; `transform` is the reference's `source`."""
    value, grad = value_and_grad(fused(name), logits, target, source=source, **options)
    true_value, true_grad = value_and_grad(naive(name), logits, target, source=transform, **options)
    assert value.dtype == torch.float64
    assert_near(value, true_value, tolerance, f"{name} value")
    assert_near(grad, true_grad, tolerance, f"{name} gradient")


def assert_close_to_float64(name: str, logits: Tensor, target: Tensor, **options) -> None:
    """The error against float64 is at most twice that of a plain PyTorch run in the same dtype.

    To that comes an allowance per dtype, for where plain PyTorch is right by luck.
    """
    ours = value_and_grad(fused(name), logits, target, **options)
    truth = value_and_grad(naive(name), logits.double(), target, **options)
    plain = value_and_grad(naive(name), logits, target, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == logits.dtype
    for what, actual, expected, same_dtype in zip(
        ("value", "gradient"), ours, truth, plain, strict=True
    ):
        allowed = 2 * relative_error(same_dtype, expected) + TOLERANCE[logits.dtype]
        assert_near(actual, expected, allowed, f"{name} {what} in {logits.dtype}")
