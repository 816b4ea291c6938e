"""The losses as functions: a module's options and its call's in one, like `torch.nn.functional`.

segloss.focal_loss(logits, target, gamma=1.5, token_weight=w)
segloss.FocalLoss(gamma=1.5)(logits, target, token_weight=w)       # the same
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from segloss import losses
from segloss.logits import LinearLogits
from segloss.losses.base import constructor_options

CALL = [
    parameter
    for parameter in inspect.signature(losses.Loss.forward).parameters.values()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]
SOURCE = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for parameter in inspect.signature(LinearLogits).parameters.values()
    if parameter.name not in ("hidden", "weight", "bias")
]


def split(keywords: dict, parameters: list[inspect.Parameter]) -> dict:
    """Take out of `keywords` those that `parameters` name."""
    return {p.name: keywords.pop(p.name) for p in parameters if p.name in keywords}


def dress(function: Callable, name: str, positional: str, keyword_only: list, text: str) -> None:
    names = positional.split()
    leading = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    function.__signature__ = inspect.Signature([*leading, *keyword_only])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = text


def functional(name: str, loss_class: type[losses.Loss]) -> Callable:
    """`loss_class` as a function `name(logits, target, *, options of the module and its call)`."""

    def function(logits, target, **keywords):
        call = split(keywords, CALL)
        return loss_class(**keywords)(logits, target, **call)

    text = f"`{loss_class.__name__}(...)(logits, target, ...)`.\n\n{loss_class.__doc__}"
    dress(function, name, "logits target", [*constructor_options(loss_class), *CALL], text)
    return function


def linear_functional(name: str, loss_class: type[losses.Loss]) -> Callable:
    """`name(input, linear_weight, target, *, linear_bias=None, ...)`, the logits never stored."""

    def function(input, linear_weight, target, *, linear_bias=None, **keywords):
        call, of_source = split(keywords, CALL), split(keywords, SOURCE)
        source = LinearLogits(input, linear_weight, linear_bias, **of_source)
        return loss_class(**keywords)(source, target, **call)

    bias = inspect.Parameter("linear_bias", inspect.Parameter.KEYWORD_ONLY, default=None)
    text = (
        f"`{loss_class.__name__}(...)(F.linear(input, linear_weight, linear_bias), target, ...)` "
        "without storing the logits.\n\n"
        "Parameters as `torch.nn.functional.linear_cross_entropy`, then the options of "
        f"`LinearLogits` and of the loss. Without a valid token the value is 0.\n\n"
        f"{loss_class.__doc__}"
    )
    options = [bias, *SOURCE, *constructor_options(loss_class), *CALL]
    dress(function, name, "input linear_weight target", options, text)
    return function


cross_entropy = functional("cross_entropy", losses.CrossEntropyLoss)
focal_loss = functional("focal_loss", losses.FocalLoss)
poly_loss = functional("poly_loss", losses.PolyLoss)
generalized_cross_entropy = functional(
    "generalized_cross_entropy", losses.GeneralizedCrossEntropyLoss
)
dft_loss = functional("dft_loss", losses.DFTLoss)
self_adjusting_dice_loss = functional("self_adjusting_dice_loss", losses.SelfAdjustingDiceLoss)
dice_loss = functional("dice_loss", losses.DiceLoss)
generalized_dice_loss = functional("generalized_dice_loss", losses.GeneralizedDiceLoss)
jaccard_loss = functional("jaccard_loss", losses.JaccardLoss)
tversky_loss = functional("tversky_loss", losses.TverskyLoss)
focal_tversky_loss = functional("focal_tversky_loss", losses.FocalTverskyLoss)
lovasz_softmax = functional("lovasz_softmax", losses.LovaszSoftmaxLoss)
linear_cross_entropy = linear_functional("linear_cross_entropy", losses.CrossEntropyLoss)
linear_focal_loss = linear_functional("linear_focal_loss", losses.FocalLoss)
linear_poly_loss = linear_functional("linear_poly_loss", losses.PolyLoss)
linear_generalized_cross_entropy = linear_functional(
    "linear_generalized_cross_entropy", losses.GeneralizedCrossEntropyLoss
)
linear_dft_loss = linear_functional("linear_dft_loss", losses.DFTLoss)
linear_self_adjusting_dice_loss = linear_functional(
    "linear_self_adjusting_dice_loss", losses.SelfAdjustingDiceLoss
)
linear_dice_loss = linear_functional("linear_dice_loss", losses.DiceLoss)
linear_generalized_dice_loss = linear_functional(
    "linear_generalized_dice_loss", losses.GeneralizedDiceLoss
)
linear_jaccard_loss = linear_functional("linear_jaccard_loss", losses.JaccardLoss)
linear_tversky_loss = linear_functional("linear_tversky_loss", losses.TverskyLoss)
linear_focal_tversky_loss = linear_functional("linear_focal_tversky_loss", losses.FocalTverskyLoss)
linear_lovasz_softmax = linear_functional("linear_lovasz_softmax", losses.LovaszSoftmaxLoss)
