"""What users pass for logits: a tensor, or hidden states and a head."""

from segloss.sources.beside import TopK, is_packable, make_beside, own_probabilities
from segloss.sources.dense import DenseLogits
from segloss.sources.given import SOURCES, as_source, is_local
from segloss.sources.linear import LinearLogits
from segloss.sources.statistics import logit_statistics, public_statistics

__all__ = [
    "SOURCES",
    "DenseLogits",
    "LinearLogits",
    "TopK",
    "as_source",
    "is_local",
    "is_packable",
    "logit_statistics",
    "make_beside",
    "own_probabilities",
    "public_statistics",
]
