"""A head that an engine cut by classes: what its hidden states and its logits are there.

transformers replaces the layer's forward (`tp_size=`), torch's `parallelize_module` puts hooks
around it. Either way the weight is a DTensor while the model runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segloss.checks import is_dtensor


def wrapped_by_transformers(forward: Any) -> dict[str, Any] | None:
    """What transformers' tensor parallelism knows, if `forward` is its around a linear layer's:
    the style ("self"), "module" and "mesh"."""
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    inside = inspect.getclosurevars(forward).nonlocals
    original = inside.get("original_forward")
    if getattr(original, "__func__", None) is not nn.Linear.forward:
        return None
    return dict(inside)


def takes_dtensors(head: nn.Module) -> bool:
    """Whether hooks of `parallelize_module` take what the head returns, which is a DTensor."""
    hooks = head._forward_hooks.values()
    return any(getattr(hook, "__module__", "") == "torch.distributed.tensor._api" for hook in hooks)


def placed(hidden: Tensor, forward: Any, weight: Any) -> Tensor:
    """Hidden states, which the head's `forward` would be given, as a DTensor beside its weight."""
    if is_dtensor(hidden):
        return hidden
    known = wrapped_by_transformers(forward)
    if known is None:
        raise TypeError(
            f"the head's weight is a DTensor of {weight.placements}, but its hidden states do not "
            "say on which ranks they are the same; use transformers' tp_size=, or "
            "parallelize_module with a ColwiseParallel head"
        )
    from torch.distributed.tensor import DTensor, Replicate

    before = known["self"].transform_inputs_pre_forward
    (hidden, *_), _ = before(known["module"], (hidden,), {}, known["mesh"])
    if is_dtensor(hidden):
        return hidden
    # without gradients transformers leaves them as they are
    return DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)


def gathered_logits(hidden: Any, weight: Any, bias: Any) -> Tensor:
    """Logits (..., V) of a few places on every rank, without a gradient."""
    z = F.linear(local(hidden), local(weight), None if bias is None else local(bias))
    return on_mesh(z, weight, (*hidden.shape[:-1], weight.shape[0])).full_tensor()


def on_mesh(z: Tensor, weight: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Logits beside the head's weight: these ranks' slices of `shape`, or whole ones."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = weight.device_mesh
    if shape is None:
        return DTensor.from_local(z, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [Shard(len(shape) - 1) if p.is_shard() else p for p in weight.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        z, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def local(x: Any) -> Tensor:
    return x.to_local() if is_dtensor(x) else x


def whole(x: Any) -> Tensor:
    return x.full_tensor() if is_dtensor(x) else x


def like_weight(values: Tensor, weight: Any) -> Tensor:
    """Numbers per class (V,) as the weight lies."""
    if not is_dtensor(weight):
        return values
    return on_mesh(values, weight).redistribute(placements=weight.placements)
