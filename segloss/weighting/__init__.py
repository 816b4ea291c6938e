"""Weights of tasks and samples: constants that no gradient flows into."""

from segloss.weighting.coba import CoBa
from segloss.weighting.samples import SampleWeighting, sample_losses, token_weights

__all__ = ["CoBa", "SampleWeighting", "sample_losses", "token_weights"]
