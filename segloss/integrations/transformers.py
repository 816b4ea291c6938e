"""A transformers causal language model's logits, never made: its hidden states and its head.

    source = head_logits(model, input_ids=..., attention_mask=...)
    loss = segloss.CrossEntropyLoss()(source, next_tokens)

B sequences of T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from segloss.linear import Head
from segloss.logits import LinearLogits


def head_logits(model: nn.Module, **inputs) -> LinearLogits:
    """`LinearLogits` that stand for `model(**inputs).logits` (B, T, V).

    Works for causal models whose head is `get_output_embeddings()`, with the config's soft-cap and
    logit scale, and with a LoRA adapter (peft) on the head. The model's own forward runs, wrapped
    by DDP or not, but is asked for the last position's logits only; on a model's first call these
    are compared with what the head gives, so that a model that does more to its logits is refused
    rather than trained on the wrong ones.

    Errors: TypeError for a model without a head or a decoder; ValueError for adapter dropout on the
    head, several active adapters, or logits that are not the head's.
    """
    inner = unwrapped(model)
    decoder, head = decoder_of(inner), inner.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(inner).__name__} has no output embeddings: it is no causal LM")
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs = {**inputs, "logits_to_keep": 1}
    captured: list[Tensor] = []

    def keep(module, arguments, output):
        captured.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = decoder.register_forward_hook(keep)
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    weight, bias, lora = head_tensors(head)
    softcap, scale = logit_transform(inner.config)
    source = LinearLogits(captured[0], weight, bias, softcap=softcap, scale=scale, lora=lora)
    check_once(inner, source, outputs.logits)
    return source


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, a compiled module and peft."""
    while True:
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; it takes a transformers causal LM")
    return model


def decoder_of(model: Any) -> nn.Module:
    """What computes the last hidden states."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise TypeError(f"{type(model).__name__} has no decoder below its head")
    return decoder


def head_tensors(head: Any) -> tuple[Tensor, Tensor | None, tuple | None]:
    """(weight (V, D), bias (V,) or None, (A (r, D), B (V, r), scaling) or None)."""
    if hasattr(head, "modules_to_save"):  # peft's copy of a module that is trained in full
        head = head.modules_to_save[active_adapter(head)]
    if not hasattr(head, "lora_A"):
        return head.weight, getattr(head, "bias", None), None
    base = head.get_base_layer()
    if head.merged or head.disable_adapters:
        return base.weight, getattr(base, "bias", None), None
    name = active_adapter(head)
    dropout = getattr(head.lora_dropout[name], "p", 0.0)
    if dropout:
        raise ValueError(
            f"the head's LoRA adapter has lora_dropout={dropout}; LinearLogits takes 0: leave the "
            "head out of the adapter's target modules or set lora_dropout=0"
        )
    if getattr(head, "use_dora", {}).get(name):
        raise ValueError("the head's adapter is DoRA; LinearLogits takes plain LoRA")
    a, b = head.lora_A[name], head.lora_B[name]
    return base.weight, getattr(base, "bias", None), (a.weight, b.weight, head.scaling[name])


def active_adapter(layer: Any) -> str:
    active = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ValueError(f"the head has the active adapters {names}; LinearLogits takes one")
    return names[0]


def logit_transform(config) -> tuple[float | None, float]:
    """(softcap, scale) by the names model families use for them."""
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def check_once(model: Any, source: LinearLogits, logits: Tensor) -> None:
    """Compare with the model's own logits, the first time only: it costs a synchronisation."""
    if getattr(model, "_segloss_head_checked", False):
        return
    last = source.hidden[:, -1:].detach()
    head = Head.of(replace(source, hidden=last), None)
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        rows = head.logits()
        ours = rows.load(rows.data)[0]
        theirs = logits[:, -1].to(ours.dtype)
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    if not error < 0.05:
        raise ValueError(
            f"the logits of {type(model).__name__} differ from those of its head by {error:.0%}: "
            "it does more than soft-cap and scale; give the loss model(...).logits instead"
        )
    model._segloss_head_checked = True
