"""Fused losses over large vocabularies: the probabilities are never stored."""

from segloss.functional import (
    cross_entropy,
    dft_loss,
    dice_loss,
    focal_loss,
    focal_tversky_loss,
    generalized_cross_entropy,
    generalized_dice_loss,
    jaccard_loss,
    lovasz_softmax,
    poly_loss,
    self_adjusting_dice_loss,
    tversky_loss,
)
from segloss.logits import DenseLogits
from segloss.losses import (
    CombinedLoss,
    CrossEntropyLoss,
    DFTLoss,
    DiceLoss,
    FocalLoss,
    FocalTverskyLoss,
    GeneralizedCrossEntropyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    LovaszSoftmaxLoss,
    PolyLoss,
    SelfAdjustingDiceLoss,
    TverskyLoss,
)
from segloss.statistics import Statistics, logit_statistics

__version__ = "0.1.0"

__all__ = [
    "CombinedLoss",
    "CrossEntropyLoss",
    "DFTLoss",
    "DenseLogits",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedCrossEntropyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "LovaszSoftmaxLoss",
    "PolyLoss",
    "SelfAdjustingDiceLoss",
    "Statistics",
    "TverskyLoss",
    "cross_entropy",
    "dft_loss",
    "dice_loss",
    "focal_loss",
    "focal_tversky_loss",
    "generalized_cross_entropy",
    "generalized_dice_loss",
    "jaccard_loss",
    "logit_statistics",
    "lovasz_softmax",
    "poly_loss",
    "self_adjusting_dice_loss",
    "tversky_loss",
]
