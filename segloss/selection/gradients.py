"""Margins of a model's samples and their gradients in a few random dimensions.

T predicted tokens of a sample, C trainable parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segloss.kernels.common import widest
from segloss.kernels.projection import project
from segloss.selection.margins import answer_margin, output_margin
from segloss.selection.store import Shard, Store

# gradients waiting for their projection: one pass over the signs serves all of them
BUFFER_BYTES = 128 << 20
SHARD_SAMPLES = 64  # what a kill can cost

Outputs = Callable[[nn.Module, Any], tuple[Any, Tensor]]


class Sample(NamedTuple):
    """One example: a name that is unique and lasts, its task, and what the model takes."""

    id: str
    task: str
    inputs: Any


def causal_lm(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """(logits source, targets) of a transformers causal model on one sample, logits not made.

    `inputs` holds input_ids, labels (-100 where nothing is to be predicted) and maybe more, (1, T)
    or (T,).
    """
    from segloss.models.head import head_logits

    device = next(model.parameters()).device
    batch = {key: value.view(-1, value.shape[-1]).to(device) for key, value in inputs.items()}
    labels = batch.pop("labels")
    target = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return head_logits(model, **batch, use_cache=False), target


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for the length of a `with`."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def margins_of(model: nn.Module, sample: Sample, outputs: Outputs) -> Tensor:
    """Margins (T,) of the sample's predicted tokens."""
    logits, target = outputs(model, sample.inputs)
    margins = output_margin(logits, target)[target != -100]
    if not margins.numel():
        raise ValueError(f"sample {sample.id!r} has no token to predict: every target is -100")
    return margins


class Collector:
    """Takes samples' margins, one sample after the other, and fills a store shard by shard."""

    def __init__(self, store: Store, parameters: Sequence[Tensor], unit: str, dim: int, seed: int):
        self.store, self.parameters = store, parameters
        self.unit, self.dim, self.seed = unit, dim, seed
        self.row_bytes = 4 * sum(p.numel() for p in parameters)
        self.shard = Shard()
        self.waiting: list[list[Tensor]] = []  # gradients of the shard's last rows

    def has(self, role: str, sample: Sample) -> bool:
        name = f"{role}:{sample.id}"
        return name in self.store.ids or name in self.shard.id

    def add(self, role: str, sample: Sample, margins: Tensor) -> None:
        shard = self.shard
        shard.id.append(f"{role}:{sample.id}")
        shard.task.append(sample.task)
        shard.role.append(role)
        shard.tokens.append(margins.numel())
        rows = [answer_margin(margins)] if self.unit == "answer" else list(margins)
        shard.rows.append(len(rows))
        values = [float(row.detach()) for row in rows]
        shard.margin = np.append(shard.margin, values)
        for number, row in enumerate(rows):
            self.waiting.append(self._gradient(row, number + 1 < len(rows)))
            if len(self.waiting) * self.row_bytes >= BUFFER_BYTES:
                self._project()
        if len(shard.id) >= SHARD_SAMPLES:
            self.flush()

    def flush(self) -> None:
        """What has been added is in the store."""
        self._project()
        if self.shard.id:
            self.store.add(self.shard)
        self.shard = Shard()

    def _gradient(self, margin: Tensor, again: bool) -> list[Tensor]:
        grads = torch.autograd.grad(margin, self.parameters, retain_graph=again, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, self.parameters, strict=True)
        ]

    def _project(self) -> None:
        waiting, shard = self.waiting, self.shard
        if not waiting:
            return
        if len(waiting) == 1:  # no copy: it may be all of a large model's
            pieces = [g.reshape(1, -1) for g in waiting[0]]
        else:
            per_parameter = zip(*waiting, strict=True)
            pieces = [torch.stack([g.flatten() for g in piece]) for piece in per_parameter]
        waiting.clear()
        new = project(pieces, self.dim, self.seed).cpu().numpy()
        shard.gradient = new if shard.gradient is None else np.concatenate([shard.gradient, new])


def norm_of(parameters: Iterable[Tensor]) -> float:
    """Their length as one vector."""
    squares = [p.detach().to(widest(p.device)).square().sum().item() for p in parameters]
    return math.fsum(squares) ** 0.5


def fingerprint(named: Sequence[tuple[str, Tensor]]) -> str:
    """Of names, shapes and values: gradients at other weights are other gradients."""
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        data = parameter.detach().contiguous().flatten().view(torch.uint8)
        digest.update(data.cpu().numpy().tobytes())
    return digest.hexdigest()
