"""The losses: formulas on the small vectors that one sweep over the logits returns."""

from segloss.losses.token import *  # noqa: F403  # isort: skip - losses are listed as imported
from segloss.losses.base import Loss as Loss
from segloss.losses.combined import *  # noqa: F403 - a loss is exported where it is written
from segloss.losses.distillation import *  # noqa: F403
from segloss.losses.expression import parse_loss as parse_loss
from segloss.losses.lovasz import *  # noqa: F403
from segloss.losses.region import *  # noqa: F403
from segloss.losses.registry import LOSSES as LOSSES
