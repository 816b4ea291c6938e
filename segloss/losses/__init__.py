"""The losses: formulas on the small vectors that one sweep over the logits returns."""

from segloss.losses.base import Loss
from segloss.losses.combined import CombinedLoss
from segloss.losses.lovasz import LovaszSoftmaxLoss
from segloss.losses.region import (
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    TverskyLoss,
)
from segloss.losses.token import (
    CrossEntropyLoss,
    DFTLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    PolyLoss,
    SelfAdjustingDiceLoss,
)

__all__ = [
    "CombinedLoss",
    "CrossEntropyLoss",
    "DFTLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedCrossEntropyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "Loss",
    "LovaszSoftmaxLoss",
    "PolyLoss",
    "SelfAdjustingDiceLoss",
    "TverskyLoss",
]
