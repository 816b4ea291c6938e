"""What a user may give as logits."""

from __future__ import annotations

from torch import Tensor

from segloss.checks import is_dtensor
from segloss.sources.dense import DenseLogits
from segloss.sources.linear import LinearLogits
from segloss.sweep.source import Source

SOURCES: dict[str, type[Source]] = {kind.__name__: kind for kind in (DenseLogits, LinearLogits)}


def as_source(logits: Tensor | Source) -> Source:
    """A source as it is; a plain tensor means `DenseLogits(tensor)`."""
    return logits if isinstance(logits, Source) else DenseLogits(logits)


def is_local(logits: Tensor | Source) -> bool:
    """Whether every tensor is what it seems: whole, and of this rank alone."""
    return logits.is_plain if isinstance(logits, Source) else not is_dtensor(logits)
