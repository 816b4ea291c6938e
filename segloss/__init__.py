"""Fused losses over large vocabularies: the probabilities are never stored.

Every loss is a class and two functions here, exported where it is written: `FocalLoss`,
`focal_loss(logits, target)`, `linear_focal_loss(hidden, weight, target)`.
"""

from segloss.functional import *  # noqa: F403
from segloss.losses import parse_loss as parse_loss
from segloss.losses.combined import *  # noqa: F403
from segloss.losses.distillation import *  # noqa: F403
from segloss.losses.lovasz import *  # noqa: F403
from segloss.losses.region import *  # noqa: F403
from segloss.losses.token import *  # noqa: F403
from segloss.selection import GradEx as GradEx
from segloss.sharding import VocabShard as VocabShard
from segloss.sources import DenseLogits as DenseLogits
from segloss.sources import LinearLogits as LinearLogits
from segloss.sources import TopK as TopK
from segloss.sources import logit_statistics as logit_statistics
from segloss.sweep.request import Statistics as Statistics
from segloss.weighting import CoBa as CoBa
from segloss.weighting import SampleWeighting as SampleWeighting
from segloss.weighting import sample_losses as sample_losses
from segloss.weighting import token_weights as token_weights

__version__ = "0.1.0"
