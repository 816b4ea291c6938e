"""Which place of a model's logits predicts which label.

Causal models predict the next token: their labels stand one place behind. Encoder-decoders, masked
models and classifiers have a label for each place of their logits, or one for each row.

B sequences of T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segloss.integrations.forward import check_own_loss
from segloss.integrations.window import IGNORE, next_tokens
from segloss.models.head import read

ALIGNED = ("ForMaskedLM", "ForTokenClassification", "Classification", "ForMultipleChoice")


def shifts_labels(model: Any) -> bool | None:
    """Whether the logits of a place predict the label of the next, None where the class of a model
    does not say: its own loss has to (`Shift`)."""
    name = type(model).__name__
    if any(part in name for part in ALIGNED):
        return False
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    if not calls_loss_function(type(model), model):
        return None
    function = getattr(standard_loss(model), "__name__", "")
    return {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}.get(function)


def calls_loss_function(model_class: type, model: Any) -> bool:
    """Whether the forward of a class of `model` calls the `loss_function` of transformers."""
    forward = getattr(model_class, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if forward else None
    return "loss_function" in getattr(code, "co_names", ()) and hasattr(model, "loss_function")


def standard_loss(model: Any) -> Any:
    """The loss that transformers has for the model's class, whatever was put in its place."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    return LOSS_MAPPING.get(getattr(model, "loss_type", None) or "ForCausalLM")


class Shift:
    """Whether labels are shifted for a model: as given, as its class says, or as its loss does.

    A model whose class does not say is asked once: the loss that it returns is compared with the
    cross-entropy of its logits at the labels, at their places and one place on.

    Args:
        given: True (next tokens), False (labels stand at their places), None to find out.
    """

    def __init__(self, given: bool | None = None):
        if given not in (None, True, False):
            raise ValueError(f"shift is {given!r}; it takes True, False or None")
        self.known = given

    def of(self, model: Any, batch: Mapping[str, Any], call: Any, reduce: Any = None) -> bool:
        """For a batch of `model`, the model itself below all wrappers.

        Args:
            call: forward of a batch with labels, which returns the model's outputs.
            reduce: sums a tensor over the processes, which have to agree.
        """
        if self.known is None:
            check_own_loss(model)
            self.known = shifts_labels(model)
        labels = batch.get("labels")
        if self.known is not None or labels is None or labels.dim() < 2:
            return bool(self.known)
        votes = places_of(call(batch), labels)
        votes = votes if reduce is None else reduce(votes)
        next_place, same_place, neither = (votes > 0).tolist()
        if neither or (next_place and same_place):
            raise ValueError(
                f"{type(model).__name__} does not say whether its labels are the next tokens, and "
                "its own loss is neither cross-entropy; give shift=True (next tokens) or False "
                "(labels of the same places)"
            )
        if next_place or same_place:
            self.known = next_place
        return True if self.known is None else self.known


def places_of(outputs: Any, labels: Tensor) -> Tensor:
    """(3,) one at: the loss is of the next places, of the same places, of neither; zeros where
    no label says so."""
    votes = torch.zeros(3, device=labels.device)
    loss, logits = read(outputs, "loss"), read(outputs, "logits")
    if not (labels != IGNORE).any():
        return votes
    if loss is None or logits is None or logits.shape[:-1] != labels.shape:
        votes[2] = 1
        return votes
    errors = []
    for target in (next_tokens(labels), labels):
        # a model may compute its loss in the dtype of its logits, or in float32
        values = [
            F.cross_entropy(rows.flatten(0, -2), target.reshape(-1), ignore_index=IGNORE)
            for rows in (logits, logits.float())
        ]
        errors.append(min(float((loss - value).abs() / value.abs()) for value in values))
    nearest = min(errors)
    if not nearest < 1e-3 or max(errors) < 4 * nearest:
        votes[2] = 1
    elif errors[0] != errors[1]:
        votes[errors.index(nearest)] = 1
    return votes
