"""A Llama in the precision of its parameters throughout.

Its norms and its rotary angles are computed in float32, whatever the model is. A sum in another
order, which two processes or another processor make, then moves a float64 gradient by 1e-8.
"""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding


class Norm(LlamaRMSNorm):
    def forward(self, hidden):
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden * scale)


class Rotary(LlamaRotaryEmbedding):
    def forward(self, hidden, position_ids):
        angle = position_ids[..., None] * self.inv_freq.to(hidden.dtype)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()


def exact(model):
    for module in model.modules():
        for part in (Norm, Rotary):
            if type(module) is part.__base__:
                module.__class__ = part
    return model


def all_exact() -> None:
    """Every Llama of this process, those that an engine makes included."""
    for part in (Norm, Rotary):
        part.__base__.forward = part.forward
