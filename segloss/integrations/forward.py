"""A batch through a model up to its loss, on hidden states or on the logits that it makes.

B sequences of T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segloss.integrations.window import LOSS_COLUMNS
from segloss.models.head import check_no_loss, head_loss, prompt_length, read

# of the model's class or its config, the factor of the router loss of a mixture of experts
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_aux_loss_coef")


def loss_of(
    model: Any,
    criterion: Callable,
    target: Tensor,
    inputs: Mapping[str, Any],
    fused: bool,
    teacher: nn.Module | None = None,
) -> tuple[Any, Any]:
    """(`criterion(logits, target)`, the model's outputs); `fused`: the logits are never made.

    With a teacher it is `criterion(logits, target, teacher=its logits)`.
    """
    if fused:
        return head_loss(model, criterion, target, teacher=teacher, **inputs)
    outputs = model(**inputs)
    check_no_loss(model, outputs)
    logits = logits_of(model, outputs, target, inputs)
    given = {}
    if teacher is not None:
        with torch.no_grad():
            given["teacher"] = logits_of(teacher, teacher(**inputs), target, inputs)
    return criterion(logits, target.to(logits.device), **given), outputs


def logits_of(model: Any, outputs: Any, target: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    logits = read(outputs, "logits")
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned no logits but a {type(outputs).__name__}")
    prompt = prompt_length(model, dict(inputs))
    if prompt is not None and target.shape[1] == prompt:
        logits = logits[:, logits.shape[1] - prompt :]
    return logits


def virtual_tokens(model: Any) -> int:
    """Places that a peft model puts before those of its input."""
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or config.peft_type == "PREFIX_TUNING":
        return 0
    return config.num_virtual_tokens


def before(column: Tensor, count: int, fill: float) -> Tensor:
    """A column (B, T, ...) with `count` places more in front."""
    return F.pad(column, (*(0, 0) * (column.dim() - 2), count, 0), value=fill)


def has_head(model: Any) -> bool:
    """Whether the logits are a vocabulary's, of a head that a fused loss could take over."""
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


def takes(model: Any, name: str) -> bool:
    """Whether a model's forward takes an argument."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a batch: without labels it computes no loss of its own.

    An encoder-decoder reads its labels, one place on, in the decoder. `model` is the innermost.
    """
    check_own_loss(model)
    not_for_it = (*LOSS_COLUMNS, "labels", "shift_labels", "num_items_in_batch")
    inputs = {name: value for name, value in batch.items() if name not in not_for_it}
    labels = batch.get("labels")
    if reads_labels(model) and labels is not None and labels.dim() > 1:
        given = ("decoder_input_ids", "decoder_inputs_embeds")
        if all(inputs.get(name) is None for name in given):
            inputs["decoder_input_ids"] = shifted_right(model, labels)
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def reads_labels(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and (
        "decoder_input_ids" in inspect.signature(model.forward).parameters
    )


def shifted_right(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads where the labels are predicted."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"{type(model).__name__} has decoder_start_token_id {start} and pad_token_id {pad}; to "
            "make the decoder's input of labels it takes both, or give decoder_input_ids"
        )
    inputs = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return inputs.masked_fill(inputs < 0, pad)


# ------------------------------------------------------------- what a model adds to its own loss


def check_own_loss(model: Any) -> None:
    """Refuse a model whose own loss is more than one of its logits and a router's."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(model, "z_loss_coefficient", 0.0):
        raise ValueError(
            f"{name} adds a z-loss of all its logits (z_loss_coefficient is "
            f"{model.z_loss_coefficient}); set that to 0 and give CrossEntropyLoss(z_loss=...)"
        )
    streams = getattr(config, "ngram", 1)
    if streams > 1 and not getattr(model, "disable_ngram_loss", True):
        raise ValueError(
            f"{name} is trained on {streams} streams of logits, of which the loss would see one; "
            "set model.disable_ngram_loss = True to train that one alone, or keep its own loss"
        )


def auxiliary_loss(model: Any, outputs: Any) -> Tensor | None:
    """The router loss that a mixture of experts adds to its loss, None if there is none.

    Errors: ValueError for one whose factor is not found, and for other terms a model would add.
    """
    check_own_loss(model)
    if isinstance(read(outputs, "depth_loss"), Tensor):
        raise ValueError(
            f"{type(model).__name__} returned depth_loss, of a second decoder, which would be left "
            "out; leave out its labels, or keep the model's own loss"
        )
    terms = []
    for names, factor_names in (
        (("aux_loss", "encoder_aux_loss", "decoder_aux_loss"), COEFFICIENTS),
        (("encoder_z_loss", "decoder_z_loss"), ("router_z_loss_coef",)),
    ):
        for name in names:
            value = read(outputs, name)
            if isinstance(value, Tensor):  # Switch has the number 0 for one that it leaves out
                terms.append(coefficient(model, name, factor_names) * value)
    for name in ("aux_loss", "encoder_aux_loss"):
        router_logits = read(outputs, name.replace("aux_loss", "router_logits"))
        left_out = hasattr(outputs, name) and read(outputs, name) is None
        if left_out and router_logits is not None:
            raise ValueError(
                f"{type(model).__name__} returned its router's logits and, without labels, no loss "
                "of them, which would be left out; set output_router_logits to False in its config,"
                " to train without it"
            )
    return sum(terms[1:], terms[0]) if terms else None


def coefficient(model: Any, name: str, factor_names: tuple[str, ...]) -> float:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (model, config, text, getattr(text, "ffn_config", None)):
        for factor in (*factor_names, *(["moe_loss_weight"] if owner is not model else [])):
            value = getattr(owner, factor, None)
            if isinstance(value, (int, float)):
                return float(value)
    raise ValueError(
        f"{type(model).__name__} returns {name}, of which neither it nor its config says how much "
        f"to add; set {factor_names[0]} in its config (0: nothing)"
    )
