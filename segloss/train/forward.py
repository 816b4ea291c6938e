"""The model's forward pass, up to what stands for its logits, and what is counted of its tokens."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from segloss.integrations.transformers import head_logits
from segloss.sources import LinearLogits


def autocast(device: torch.device, dtype: torch.dtype | None):
    """The forward pass in `dtype`, None for that of the weights."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def logits_of(
    model, inputs: dict[str, Tensor], head: str, dtype: torch.dtype | None
) -> Tensor | LinearLogits:
    """Logits (B, T, V) of input_ids and attention_mask (B, T).

    With `head="fused"` they stay hidden states and a head; "logits" takes the model's own. In
    `dtype` they stay in it: a loss reads half types itself, so nothing copies them to float32.
    """
    with autocast(inputs["input_ids"].device, dtype):
        if head == "fused":
            return head_logits(model, **inputs, use_cache=False)
        return model(**inputs, use_cache=False).logits


def token_sums(statistics, target: Tensor) -> Tensor:
    """(B, T, 4) of each token that counts: cross-entropy, whether it is a hit, entropy, and 1."""
    hits = (statistics.argmax == target) & statistics.valid
    values = (-statistics.log_prob, hits, statistics.entropy, statistics.valid)
    return torch.stack([value.double() for value in values], -1)
