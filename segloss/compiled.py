"""Losses under `torch.compile`: one custom op per call, so that a full graph holds.

Eager calls never come here. The op is opaque to the compiler: inside, the eager code runs. A scalar
loss forms its gradients in the op's forward, any other value in its backward, by a second run.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from segloss.logits import DenseLogits, LinearLogits, Source
from segloss.statistics import Statistics

if TYPE_CHECKING:
    from segloss.losses import Loss

DIFFERENTIABLE = ("logits", "hidden", "head", "bias", "lora_a", "lora_b")
LINEAR_OPTIONS = ("softcap", "scale", "compact", "chunk_bytes", "memory_budget", "grad_filter")
STATISTICS = ("log_prob", "lse", "entropy", "argmax", "valid")


@dataclass(frozen=True)
class Call:
    """Everything of a call but its tensors."""

    loss: str  # Loss.description
    linear: bool  # hidden and weight, not logits
    options: tuple[tuple[str, object], ...]  # of the source
    names: tuple[str, ...]  # of the tensors, in order
    normalizer: float | None
    return_statistics: bool
    needed: tuple[bool, ...]  # which tensors get a gradient
    reduction: str


# By a description of the whole call, so that equal calls share one and a graph finds its own.
CALLS: dict[str, Call] = {}


def build_loss(description: tuple, weights: dict[str, Tensor], path: str = "") -> Loss:
    """The loss that was described, with its class weights."""
    from segloss import losses

    kind, options = description
    if kind == "CombinedLoss":
        parts = [
            (coefficient, build_loss(part, weights, f"{path}parts.{i}."))
            for i, (coefficient, part) in enumerate(options)
        ]
        return losses.CombinedLoss(parts)
    return getattr(losses, kind)(weight=weights.get(f"{path}weight"), **dict(options))


def run(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The eager call: its loss, then its statistics."""
    given = dict(zip(call.names, tensors, strict=True))
    options: dict[str, Any] = dict(call.options)
    if "lora_a" in given:
        options["lora"] = (given["lora_a"], given["lora_b"], options.pop("lora_scale"))
    source: Source
    if call.linear:
        source = LinearLogits(given["hidden"], given["head"], given.get("bias"), **options)
    else:
        source = DenseLogits(given["logits"], **options)
    result = build_loss(ast.literal_eval(call.loss), given)(
        source,
        given["target"],
        token_weight=given.get("token_weight"),
        sample_ids=given.get("sample_ids"),
        normalizer=given.get("normalizer", call.normalizer),
        return_statistics=call.return_statistics,
    )
    if not call.return_statistics:
        return [result]
    loss, statistics = result
    return [loss, *(getattr(statistics, name) for name in STATISTICS)]


def run_with_grad(call: Call, tensors: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """[loss, statistics ..., a gradient per needed tensor], for `grad` upstream (None: 1)."""
    leaves = [
        t.detach().requires_grad_() if on else t.detach()
        for t, on in zip(tensors, call.needed, strict=True)
    ]
    # an op's body runs below autograd; this one is a whole forward and backward of its own
    autograd = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with autograd, torch.enable_grad():
        loss, *rest = run(call, leaves)
        wanted = [t for t, on in zip(leaves, call.needed, strict=True) if on]
        grads = torch.autograd.grad(loss, wanted, grad)
    return [loss.detach(), *rest, *grads]


def grads_in_forward(call: Call) -> bool:
    return any(call.needed) and call.reduction != "none"


@torch.library.custom_op("segloss::loss", mutates_args=())
def loss_op(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = CALLS[key]
    if grads_in_forward(call):
        return run_with_grad(call, tensors, None)
    with torch.no_grad():
        return [value.clone() for value in run(call, tensors)]


@loss_op.register_fake
def _(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = CALLS[key]
    given = dict(zip(call.names, tensors, strict=True))
    target, logits = given["target"], given["hidden" if call.linear else "logits"]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = target.shape if call.reduction == "none" else ()
    out = [logits.new_empty(shape, dtype=dtype)]
    if call.return_statistics:
        out += [logits.new_empty(target.shape, dtype=dtype) for _ in range(3)]
        out += [torch.empty_like(target, dtype=torch.int64), torch.empty_like(target).bool()]
    if grads_in_forward(call):
        out += [torch.empty_like(t) for t, on in zip(tensors, call.needed, strict=True) if on]
    return out


@torch.library.custom_op("segloss::loss_backward", mutates_args=())
def loss_backward_op(tensors: list[Tensor], grad: Tensor, key: str) -> list[Tensor]:
    call = CALLS[key]
    return run_with_grad(call, tensors, grad)[-sum(call.needed) :]


@loss_backward_op.register_fake
def _(tensors: list[Tensor], grad: Tensor, key: str) -> list[Tensor]:
    return [torch.empty_like(t) for t, on in zip(tensors, CALLS[key].needed, strict=True) if on]


def setup_context(ctx, inputs, output) -> None:
    tensors, ctx.key = inputs
    call = CALLS[ctx.key]
    ctx.saved_grads = grads_in_forward(call)
    ctx.save_for_backward(*(output[-sum(call.needed) :] if ctx.saved_grads else tensors))


def backward(ctx, grads):
    call, saved = CALLS[ctx.key], list(ctx.saved_tensors)
    if ctx.saved_grads:
        found = iter([s * grads[0].to(s.dtype) for s in saved])
    else:
        found = iter(torch.ops.segloss.loss_backward(saved, grads[0], ctx.key))
    return [next(found) if on else None for on in call.needed], None


loss_op.register_autograd(backward, setup_context=setup_context)


@torch.compiler.assume_constant_result
def remember(*fields) -> str:
    """The key of a call of these fields, kept for the op; runs while tracing."""
    call = Call(*fields)
    CALLS[repr(call)] = call
    return repr(call)


def compiled_loss(loss, logits, target: Tensor, keywords: dict):
    """What `Loss.forward` returns while compiling."""
    named: dict[str, Tensor | None] = {"target": target}
    options: list[tuple[str, object]] = []
    linear = isinstance(logits, LinearLogits)
    if linear:
        named |= {"hidden": logits.hidden, "head": logits.weight, "bias": logits.bias}
        options = [(name, getattr(logits, name)) for name in LINEAR_OPTIONS]
        if logits.lora is not None:
            named |= {"lora_a": logits.lora[0], "lora_b": logits.lora[1]}
            options.append(("lora_scale", logits.lora[2]))
    elif isinstance(logits, DenseLogits):
        named["logits"] = logits.logits
        options = [("softcap", logits.softcap), ("scale", logits.scale)]
    else:
        named["logits"] = logits
    normalizer = keywords["normalizer"]
    for name in ("token_weight", "sample_ids"):
        named[name] = keywords[name]
    if isinstance(normalizer, Tensor):
        named["normalizer"], normalizer = normalizer, None
    for name, buffer in loss.named_buffers():
        named[name] = buffer
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    grad = torch.is_grad_enabled()
    needed = tuple([grad and n in DIFFERENTIABLE and t.requires_grad for n, t in given.items()])
    with_statistics = keywords["return_statistics"]
    key = remember(
        loss.description,
        linear,
        tuple(options),
        tuple(given),
        normalizer,
        with_statistics,
        needed,
        loss.reduction,
    )
    out = torch.ops.segloss.loss(list(given.values()), key)
    if not with_statistics:
        return out[0]
    return out[0], Statistics(*[value.detach() for value in out[1:6]])
