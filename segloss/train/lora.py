"""LoRA adapters (peft) on a model: attaching them, and merging them into it at the end."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .config import TrainConfig
from .errors import UserError, first_line

ALL_LINEAR, HEAD = "all-linear", "head"


def require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs peft: pip install 'segloss[train]'")


def attach(model: Any, config: TrainConfig) -> Any:
    """The model with adapters as its only trainable weights.

    Dropout is left out before the head's adapter: a fused loss never makes the dropped-out input.
    """
    from peft import LoraConfig, get_peft_model

    names = target_names(model, config.lora_targets)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
    )
    with warnings.catch_warnings():
        # a head that shares the embedding's weight is given its own in `merge`
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        # peft asks transformers by a name that is going out of use
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(f"--lora-targets: {first_line(error)}") from None
    head = _base(adapted).get_output_embeddings()
    for name in getattr(head, "lora_dropout", {}):
        head.lora_dropout[name] = torch.nn.Identity()
    return adapted


def target_names(model: Any, targets: Sequence[str]) -> list[str]:
    """What peft looks for: the ends of the names of layers."""
    head = model.get_output_embeddings()
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D"
    }
    ends = sorted({_end(name) for name, layer in linear.items() if layer is not head})
    names: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            names += ends
        elif target == HEAD:
            names += [name for name, layer in linear.items() if layer is head]
        elif any(f".{name}".endswith(f".{target}") for name in linear):
            names.append(target)
        else:
            raise UserError(
                f"--lora-targets has {target!r}; this model's are {' '.join(ends)}, "
                f"{HEAD} and {ALL_LINEAR}"
            )
    return list(dict.fromkeys(names))


def _end(name: str) -> str:
    """The last part of a name, as q_proj of layers.0.q_proj; with the one before if a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _base(model: Any) -> Any:
    return model.get_base_model()


def merge(model: Any) -> Any:
    """The plain model with the adapters' products added to its weights."""
    base = _base(model)
    head = base.get_output_embeddings()
    if hasattr(head, "lora_A") and head.base_layer.weight is base.get_input_embeddings().weight:
        # an adapter on a shared weight would change the embeddings as well
        head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
        base.config.tie_word_embeddings = False
        base.all_tied_weights_keys = {}  # what saving leaves out
    return model.merge_and_unload()
