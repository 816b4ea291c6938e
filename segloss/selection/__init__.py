"""Which tasks to fine-tune on: GradEx, from gradients at one set of weights."""

from segloss.selection.gradex import Comparison, GradEx, Sample, Selection
from segloss.selection.margins import answer_margin, output_margin

__all__ = ["Comparison", "GradEx", "Sample", "Selection", "answer_margin", "output_margin"]
