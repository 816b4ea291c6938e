"""Numbers computed outside autograd, differentiable by a rule of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[tuple, dict[str, Tensor], dict[str, Tensor], tuple], tuple]


class _Attach(torch.autograd.Function):
    """Makes numbers that were computed outside autograd differentiable by a rule of our own."""

    @staticmethod
    def forward(ctx, rule: Rule, outputs: dict, saved: dict, *tensors):
        ctx.rule = rule
        ctx.names = len(tensors), tuple(outputs), tuple(saved)
        # through save_for_backward, never on ctx: outputs would keep their own graph alive there
        ctx.save_for_backward(*tensors, *outputs.values(), *saved.values())
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx, *grads):
        num_tensors, output_names, saved_names = ctx.names
        values = ctx.saved_tensors
        tensors, values = values[:num_tensors], values[num_tensors:]
        saved = dict(zip(output_names + saved_names, values, strict=True))
        named = {n: g for n, g in zip(output_names, grads, strict=True) if g is not None}
        needed = ctx.needs_input_grad[3:]
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            result = ctx.rule(tensors, saved, named, needed)
        return (None, None, None, *only_once(result))


def only_once(grads: tuple) -> tuple:
    """Gradients that raise when they are differentiated again.

    `once_differentiable` lets them pass as constants where the upstream gradient is one.
    """
    if not torch.is_grad_enabled():
        return grads
    message = b"segloss losses cannot be differentiated twice (create_graph=True)"
    raising = torch._C._functions.DelayedError(message, len(grads))
    marked = raising(*(None if g is None else g.detach().requires_grad_() for g in grads))
    return marked if isinstance(marked, tuple) else (marked,)


def attach(rule: Rule, outputs: dict, saved: dict, tensors: tuple) -> dict[str, Any]:
    """`outputs`, differentiable with respect to `tensors` by `rule(tensors, saved, grads, needed)`.

    `saved` reaches the rule together with the outputs; None values are left out of both.
    """
    outputs = {name: value for name, value in outputs.items() if value is not None}
    saved = {name: value for name, value in saved.items() if value is not None}
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return outputs
    return dict(zip(outputs, _Attach.apply(rule, outputs, saved, *tensors), strict=True))
