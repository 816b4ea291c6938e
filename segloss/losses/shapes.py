"""Cross-entropy in every shape that PyTorch's functions take.

N tokens, V classes, D hidden size, P positions of a token that have a head each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segloss.checks import describe


def of_one_token(function: Callable) -> Callable:
    """`function(logits, target, ...)` that also takes one token alone: (V,), with () or (V,)."""

    def call(logits, target, **keywords):
        if not (isinstance(logits, Tensor) and logits.dim() == 1):
            return function(logits, target, **keywords)
        keywords = {n: v[None] if n in PER_TOKEN else v for n, v in keywords.items()}
        return alone(function(logits[None], target[None], **keywords))

    return call


PER_TOKEN = ("token_weight", "sample_ids", "columns")


def alone(result):
    """The value of one token, without its dimension where nothing was reduced."""
    value = result[0] if isinstance(result, tuple) else result
    value = value[0] if value.dim() else value
    return (value, *result[1:]) if isinstance(result, tuple) else value


def of_any_weight(function: Callable) -> Callable:
    """`function(input, linear_weight, target, ...)` in all shapes of PyTorch's.

    One token alone, (D,), and a weight (V, p, ..., D), which gives every token positions (p, ...)
    with a head each: then the target is (..., p, ...), or probabilities (..., V, p, ...).
    """

    def call(input, linear_weight, target, *, options=None, **keywords):
        if options is not None:
            keywords.setdefault("chunk_bytes", chunk_bytes(options, input, linear_weight))
        if input.dim() == 1:
            keywords = {n: v[None] if n in PER_TOKEN else v for n, v in keywords.items()}
            given = {"options": None, **keywords}
            return alone(call(input[None], linear_weight, target[None], **given))
        if linear_weight.dim() > 2:
            return over_positions(function, input, linear_weight, target, **keywords)
        return function(input, linear_weight, target, **keywords)

    return call


def chunk_bytes(options, input: Tensor, linear_weight: Tensor) -> int | None:
    """What `torch.nn.functional.LinearCrossEntropyOptions` says about chunks.

    Its other fields say how sums are kept; here they are float32, and a graph can be retained.
    """
    wanted = getattr(options, "acc_dtype", None)
    if wanted not in (None, torch.float32, input.dtype):
        raise ValueError(
            f"options.acc_dtype is {wanted}; sums over chunks are kept in float32 (float64 of "
            "float64 inputs): it takes None"
        )
    rows = getattr(options, "batch_chunk_size", None)
    if rows is None:
        return None
    return rows * linear_weight.shape[0] * linear_weight.element_size()


def over_positions(
    function: Callable,
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, p, ..., D)
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,  # (V, p, ...)
    **keywords,
) -> Tensor:
    for name in (*PER_TOKEN, "lora", "return_statistics"):
        if keywords.get(name) is not None and keywords[name] is not False:
            raise ValueError(f"{name} goes with a linear_weight of two dimensions, (V, D)")
    leading, positions = input.shape[:-1], linear_weight.shape[1:-1]
    num_classes = linear_weight.shape[0]
    soft = target.is_floating_point()
    shape = (*leading, num_classes, *positions) if soft else (*leading, *positions)
    if target.shape != shape:
        raise ValueError(
            f"target is {describe(target)}; it takes shape {shape}: the input's, then the "
            "positions of linear_weight"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias is {describe(linear_bias)}; it takes shape "
            f"{tuple(linear_weight.shape[:-1])}"
        )
    reduction = keywords.get("reduction", "mean")
    if reduction == "mean" and keywords.get("normalizer") is None:
        keywords["normalizer"] = counted(target, num_classes, keywords)
    heads = linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(heads) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    parts = target.flatten(len(leading) + soft).unbind(-1)
    values = torch.stack(
        [
            function(input, head, part, linear_bias=bias, **keywords)
            for head, bias, part in zip(heads, biases, parts, strict=True)
        ],
        -1,
    )
    return values.reshape(*leading, *positions) if reduction == "none" else values.sum()


def counted(target: Tensor, num_classes: int, keywords: dict) -> Tensor:
    """The denominator of a mean over all tokens and positions."""
    if target.is_floating_point():
        return torch.tensor(float(target.numel() // num_classes))
    valid = target != keywords.get("ignore_index", -100)
    weight = keywords.get("weight")
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()
