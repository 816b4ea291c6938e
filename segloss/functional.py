"""The losses as functions: a module's options and its call's in one, like `torch.nn.functional`.

segloss.focal_loss(logits, target, gamma=1.5, token_weight=w)
segloss.FocalLoss(gamma=1.5)(logits, target, token_weight=w)       # the same
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from segloss import losses


def functional(name: str, loss_class: type[losses.Loss]) -> Callable:
    """`loss_class` as a function `name(logits, target, *, options of the module and the call)`."""
    options = inspect.signature(loss_class.__init__, eval_str=False).parameters
    inner = list(inspect.signature(loss_class.forward).parameters.values())[1:]
    call = [p for p in inner if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def function(logits, target, **keywords):
        of_call = {p.name: keywords.pop(p.name) for p in call if p.name in keywords}
        return loss_class(**keywords)(logits, target, **of_call)

    of_module = [p for p in options.values() if p.name != "self"]
    keyword_only = [
        p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in of_module
    ]
    keyword_only.sort(key=lambda p: p.kind)
    named = [p for p in keyword_only if p.kind is p.KEYWORD_ONLY]
    rest = [p for p in keyword_only if p.kind is p.VAR_KEYWORD]
    function.__signature__ = inspect.Signature([*inner[:2], *named, *call, *rest])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`{loss_class.__name__}(...)(logits, target, ...)`.\n\n{loss_class.__doc__}"
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
