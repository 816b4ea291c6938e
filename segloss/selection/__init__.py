"""Which tasks to fine-tune on: GradEx, from gradients at one set of weights."""

from segloss.selection.gradex import GradEx
from segloss.selection.gradients import Sample
from segloss.selection.margins import answer_margin, output_margin
from segloss.selection.search import Comparison, Selection

__all__ = ["Comparison", "GradEx", "Sample", "Selection", "answer_margin", "output_margin"]
