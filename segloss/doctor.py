"""`segloss doctor`: what this installation runs on, and whether its losses are right.

Needs the core dependencies only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import segloss
from segloss import reference
from segloss.kernels.common import backend

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "trl", "datasets", "peft")

# float32 against float64: the rounding of a few hundred additions
TOLERANCE = 1e-5


def doctor() -> int:
    """Print versions, device, backend and the result of each check; 0 if all agree, else 1."""
    for name, value in environment().items():
        print(f"{name:<12} {value}")
    print()
    failed = 0
    for family, (fused, naive) in FAMILIES.items():
        problem = check(fused, naive)
        failed += problem is not None
        print(f"{family:<28} {'ok' if problem is None else f'FAILED: {problem}'}")
    print(f"\n{failed} of {len(FAMILIES)} checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


# --------------------------------------------------------------------------------- environment


def environment() -> dict[str, str]:
    """What to put into a bug report."""
    where = device()
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "segloss": segloss.__version__,  # under whatever name it was installed
        **{name: _version(name) for name in PACKAGES},
        "device": _device_name(where),
        "backend": _backend(where),
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
    }


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _device_name(where: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name()})" if where.type == "cuda" else str(where)


def _backend(where: torch.device) -> str:
    try:
        name, reason = backend(where)
    except ValueError as error:
        return f"none: {error}"
    return f"{name} ({reason})"


def _cpu() -> str:
    known = sorted(
        flag for flag in cpu_flags() if flag.startswith(("amx", "avx2", "avx512_", "avx512f"))
    )
    flags = " ".join(known) or "neither AVX2, AVX-512 nor AMX found"
    return f"{torch.backends.cpu.get_cpu_capability()} ({flags})"


def cpu_flags() -> set[str]:
    """The instruction sets that Linux names in /proc/cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(flags.split())
    return set()


# -------------------------------------------------------------------------------------- checks

Loss = Callable[[Tensor, Tensor], Tensor]


def _combined(logits: Tensor, target: Tensor) -> Tensor:
    return 0.6 * reference.cross_entropy(logits, target) + 0.4 * reference.lovasz_softmax(
        logits, target
    )


# family -> (fused loss, its naive reference)
FAMILIES: dict[str, tuple[Loss, Loss]] = {
    "cross-entropy": (segloss.CrossEntropyLoss(), reference.cross_entropy),
    "focal": (segloss.FocalLoss(), reference.focal_loss),
    "Dice": (segloss.DiceLoss(), reference.dice_loss),
    "Lovász-Softmax": (segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax),
    "0.6 * CE + 0.4 * Lovász": (
        0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss(),
        _combined,
    ),
}


def check(fused: Loss, naive: Loss) -> str | None:
    """Value and gradient of `fused` in float32 against `naive` in float64; None if they agree."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(24, 57, generator=generator, dtype=torch.float64)
    target = torch.randint(57, (24,), generator=generator)
    target[::5] = -100
    try:
        value, grad = _value_and_grad(fused, logits.float().to(device()), target.to(device()))
    except Exception as error:  # a broken installation fails in any way; doctor says how
        return f"{type(error).__name__}: {error}"
    true_value, true_grad = _value_and_grad(naive, logits, target)
    for name, got, expected in (("value", value, true_value), ("gradient", grad, true_grad)):
        difference = (got.cpu().double() - expected).norm() / expected.norm()
        if not difference <= TOLERANCE:
            return f"{name} differs from the reference by {difference:.1e} (relative)"
    return None


def _value_and_grad(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, target)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad
