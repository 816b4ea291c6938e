"""Losses under `torch.compile`: one custom op per call, so that a full graph holds.

Eager calls never come here. The op is opaque to the compiler: inside, the eager code runs. A scalar
loss forms its gradients in the op's forward, any other value in its backward, by a second run.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import torch
from torch import Tensor

from segloss.kernels.scale import scaled
from segloss.losses import registry
from segloss.sources import SOURCES, TopK, as_source
from segloss.sweep.request import Statistics
from segloss.sweep.source import Source

STATISTICS = ("log_prob", "lse", "entropy", "argmax", "valid")
# in front of the names of their tensors
OF_SOURCE, OF_LOSS, OF_TEACHER = "source.", "loss.", "teacher."
TEACHERS: dict[str, type[Source] | type[TopK]] = {**SOURCES, "TopK": TopK}


@dataclass(frozen=True)
class Call:
    """Everything of a call but its tensors."""

    loss: str  # Loss.description
    source: str  # name of its class
    options: tuple[tuple[str, object], ...]  # of the source
    names: tuple[str, ...]  # of the tensors, in order
    normalizer: float | None
    return_statistics: bool
    needed: tuple[bool, ...]  # which tensors get a gradient
    reduction: str
    waits: bool = False  # for the device
    half: bool = False  # a float16 gradient, which without its upstream factor is mostly 0
    teacher: str = ""  # name of its class
    teacher_options: tuple[tuple[str, object], ...] = ()


# By a description of the whole call, so that equal calls share one and a graph finds its own.
CALLS: dict[str, Call] = {}


def named(given: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}


def build_loss(description: tuple, buffers: dict[str, Tensor]):
    """The loss that was described, with its buffers."""
    key, options = description
    loss_class = registry.find(key)
    if loss_class is registry.find("combined:CombinedLoss"):
        parts = [
            (coefficient, build_loss(part, named(buffers, f"parts.{i}.")))
            for i, (coefficient, part) in enumerate(options)
        ]
        return loss_class(parts)
    as_options = {n: t for n, t in buffers.items() if n == "weight" or n in loss_class.option_names}
    loss = loss_class(**as_options, **dict(options))
    for name, tensor in buffers.items():
        owner, _, own_name = name.rpartition(".")
        setattr(loss.get_submodule(owner), own_name, tensor)
    return loss


def run(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The eager call: its loss, then its statistics."""
    given = dict(zip(call.names, tensors, strict=True))
    loss = build_loss(ast.literal_eval(call.loss), named(given, OF_LOSS))
    teacher = None
    if call.teacher:
        of_teacher = named(given, OF_TEACHER), dict(call.teacher_options)
        teacher = TEACHERS[call.teacher].unpacked(*of_teacher)
    result = loss(
        SOURCES[call.source].unpacked(named(given, OF_SOURCE), dict(call.options)),
        given["target"],
        token_weight=given.get("token_weight"),
        sample_ids=given.get("sample_ids"),
        normalizer=given.get("normalizer", call.normalizer),
        teacher=teacher,
        columns=given.get("columns"),
        return_statistics=call.return_statistics,
    )
    if not call.return_statistics:
        return [result]
    value, statistics = result
    found = [getattr(statistics, name) for name in STATISTICS]
    if statistics.column_log_prob is not None:
        found.append(statistics.column_log_prob)
    return [value, *found]


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
    return any(call.needed) and call.reduction != "none" and not call.half


def loss_body(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = CALLS[key]
    if grads_in_forward(call):
        return run_with_grad(call, tensors, None)
    with torch.no_grad():
        return [value.clone() for value in run(call, tensors)]


def loss_fake(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = CALLS[key]
    given = dict(zip(call.names, tensors, strict=True))
    target, logits = given["target"], next(iter(named(given, OF_SOURCE).values()))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = target.shape[:-1] if target.is_floating_point() else target.shape
    shape = tokens if call.reduction == "none" else ()
    out = [logits.new_empty(shape, dtype=dtype)]
    if call.return_statistics:
        dtypes = dtype, dtype, dtype, torch.int64, torch.bool
        out += [logits.new_empty(tokens, dtype=each) for each in dtypes]
        if "columns" in given:
            out.append(logits.new_empty(given["columns"].shape, dtype=dtype))
    if grads_in_forward(call):
        out += [torch.empty_like(t) for t, on in zip(tensors, call.needed, strict=True) if on]
    return out


def backward_body(tensors: list[Tensor], grad: Tensor, key: str) -> list[Tensor]:
    call = CALLS[key]
    return run_with_grad(call, tensors, grad)[-sum(call.needed) :]


def backward_fake(tensors: list[Tensor], grad: Tensor, key: str) -> list[Tensor]:
    return [torch.empty_like(t) for t, on in zip(tensors, CALLS[key].needed, strict=True) if on]


def scale_body(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    return [scaled(g.contiguous(), factor, torch.empty_like(g)) for g in grads]


def scale_fake(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    return [torch.empty_like(g) for g in grads]


def operator(name: str, body, fake, waits: bool):
    """A custom op; CUDA graphs are told to leave out one that waits for the device."""
    tags = (torch.Tag.cudagraph_unsafe,) if waits and hasattr(torch.Tag, "cudagraph_unsafe") else ()
    made = torch.library.custom_op(f"segloss::{name}", body, mutates_args=(), tags=tags)
    made.register_fake(fake)
    return made


# by whether the call waits for the device: for the counts of valid rows and present classes
LOSS = {w: operator("loss" + "_waiting" * w, loss_body, loss_fake, w) for w in (False, True)}
BACKWARD = {
    w: operator("loss_backward" + "_waiting" * w, backward_body, backward_fake, w)
    for w in (False, True)
}
SCALE = operator("scale_gradients", scale_body, scale_fake, False)


def setup_context(ctx, inputs, output) -> None:
    tensors, ctx.key = inputs
    call = CALLS[ctx.key]
    ctx.saved_grads = grads_in_forward(call)
    ctx.save_for_backward(*(output[-sum(call.needed) :] if ctx.saved_grads else tensors))


def backward(ctx, grads):
    call, saved = CALLS[ctx.key], list(ctx.saved_tensors)
    if ctx.saved_grads:
        found = iter(SCALE(saved, grads[0]))
    else:
        found = iter(BACKWARD[call.waits](saved, grads[0], ctx.key))
    return [next(found) if on else None for on in call.needed], None


for op in LOSS.values():
    op.register_autograd(backward, setup_context=setup_context)


@torch.compiler.assume_constant_result
def remember(*fields) -> str:
    """The key of a call of these fields, kept for the op; runs while tracing."""
    call = Call(*fields)
    CALLS[repr(call)] = call
    return repr(call)


@torch.compiler.disable
def eager_loss(loss, logits, target: Tensor, keywords: dict):
    """The call outside any graph."""
    return loss.forward(logits, target, **keywords)


def compiled_loss(loss, logits, target: Tensor, keywords: dict):
    """What `Loss.forward` returns while compiling."""
    source = as_source(logits)
    tensors, options = source.packed()
    normalizer = keywords["normalizer"]
    given: dict[str, Tensor] = {"target": target}
    for name, tensor in tensors.items():
        given[OF_SOURCE + name] = tensor
    for name in ("token_weight", "sample_ids", "columns"):
        if keywords[name] is not None:
            given[name] = keywords[name]
    teacher, teacher_name = keywords["teacher"], ""
    teacher_options: dict[str, object] = {}
    if teacher is not None:
        teacher = teacher if isinstance(teacher, TopK) else as_source(teacher)
        teacher_name = type(teacher).__name__
        tensors, teacher_options = teacher.packed()
        for name, tensor in tensors.items():
            given[OF_TEACHER + name] = tensor.detach()
    if isinstance(normalizer, Tensor):
        given["normalizer"], normalizer = normalizer, None
    for name, buffer in loss.named_buffers():
        given[OF_LOSS + name] = buffer
    grad = torch.is_grad_enabled()
    needed = tuple([grad and n.startswith(OF_SOURCE) and t.requires_grad for n, t in given.items()])
    dtypes = [t.dtype for t, on in zip(given.values(), needed, strict=True) if on]
    half = torch.float16 in dtypes
    waits = source.waits or not loss.is_token_loss
    with_statistics = keywords["return_statistics"]
    key = remember(
        loss.description,
        type(source).__name__,
        tuple(options.items()),
        tuple(given),
        normalizer,
        with_statistics,
        needed,
        loss.reduction,
        waits,
        half,
        teacher_name,
        tuple(teacher_options.items()),
    )
    out = LOSS[waits](list(given.values()), key)
    if not with_statistics:
        return out[0]
    statistics = Statistics(*[value.detach() for value in out[1:6]])
    if "columns" in given:
        statistics.column_log_prob = out[6].detach()
    return out[0], statistics
