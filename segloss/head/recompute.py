"""Any loss of a head that is trained: backward makes the logits again, less those that were kept.

N tokens, R rows that are kept, C classes of a block of the vocabulary, V in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from segloss.head.gradients import Gradients
from segloss.head.inputs import Inputs
from segloss.head.matrices import Head
from segloss.head.rows import block_width, even_slices, rows_to_keep
from segloss.kernels.common import Rows
from segloss.kernels.logit_grad import GradTerms
from segloss.kernels.products import GradBlock
from segloss.sweep.batch import Batch
from segloss.sweep.beside import Backward, Reading, logits_gradient
from segloss.sweep.terms import column_slices, row_slices


@dataclass
class Kept:
    """Logits of the last rows, which the first backward turns into their gradient where they lie;
    another backward makes them again as forward did."""

    memory: Tensor | None  # (size,), at least R * V
    size: int
    chunks: list[slice]  # the rows, as forward multiplied them

    @property
    def rows(self) -> slice:
        return slice(self.chunks[0].start, self.chunks[-1].stop)

    def take(self, head: Head) -> Tensor:
        memory, self.memory = self.memory, None
        if memory is None:
            memory = head.hidden.new_empty(self.size)
            for here in self.chunks:
                head.take(here).logits(memory[place(here, self.rows.start, head) :])
        return memory


def place(here: slice, first: int, head: Head) -> int:
    """Where a chunk's logits begin, if those of the row `first` lie at 0; those before it, too."""
    return max(0, here.start - first) * head.weight.shape[0]


class Recompute:
    """What forward keeps for backward: logits of the last rows, as many as the budget takes.

    All chunks before lie in the same memory, so that the last one costs nothing that the others
    did not.
    """

    def __init__(self, inputs: Inputs, head: Head, slices: list[slice], keeps: bool):
        num_kept = rows_to_keep(inputs, slices) if keeps else 0
        self.first = slices[-1].stop - num_kept
        most = max(num_kept, *(s.stop - s.start for s in slices))
        self.memory = head.hidden.new_empty(most * inputs.num_classes)
        last = [s for s in slices if s.start >= self.first and s.stop > s.start]
        self.kept = Kept(self.memory, self.memory.numel(), last)

    def logits(self, head: Head, here: slice) -> Rows:
        return head.take(here).logits(self.memory[place(here, self.first, head) :])

    def exp_out(self, z: Rows, panel: Rows | None) -> Tensor | None:
        return None

    def keep(self, head: Head, z: Rows, stats, batch: Batch, here: slice) -> None:
        pass

    def keep_pairs(self, head: Head, z: Rows, reading: Reading) -> None:
        pass

    def saved(self) -> dict[str, Any]:
        return {}

    def left(self) -> Kept | None:
        return self.kept if self.kept.chunks else None


def add_gradients(
    inputs: Inputs,
    head: Head,
    terms: GradTerms,
    total: Gradients,
    kept: Kept | None,
    back: Backward,
    plain: bool,
) -> None:
    """The kept rows where they lie; then in the same memory the others, a block of the vocabulary
    at a time: each slice of dweight is contracted over them by one product and needs no float32
    copy of the whole.

    The pairs of `back` have gradients beside the terms, if `plain` says that these have any.
    """
    num_rows, num_classes = head.hidden.shape[0], head.weight.shape[0]
    if num_classes == 0:  # other ranks have them all
        return
    rest, memory = slice(0, num_rows), None
    if kept is not None:
        rest, late = slice(0, kept.rows.start), kept.rows
        terms, late_terms = row_slices(terms, [rest, late])
        memory = kept.take(head)
        z = memory[: (late.stop - late.start) * num_classes].view(-1, num_classes)
        late_rows = Rows.of(z, head.softcap, head.scale)
        logits_gradient(late_rows, late_terms, back.pairs(late_rows, late), z, plain)
        # a filter looks at blocks of the vocabulary, whichever rows they are of
        width = width_of(inputs, num_rows, total) if total.filtering else num_classes
        for classes in even_slices(num_classes, width):
            total.block(GradBlock(z[:, classes]), late, classes)
    if rest.stop == 0 and kept is not None:
        return
    width = width_of(inputs, rest.stop, total, memory)
    if memory is None or memory.numel() < rest.stop * width:  # more rows than it has places
        memory = head.hidden.new_empty(rest.stop * width)
    blocks = even_slices(num_classes, width)
    for classes, part in zip(blocks, column_slices(terms, num_classes, width), strict=True):
        rows = head.take(rest).columns(classes).logits(memory)
        beside = back.pairs(rows, rest, classes)
        dlogits = logits_gradient(rows, part, beside, rows.data[0], plain)
        del beside  # the teacher's logits
        total.block(GradBlock(dlogits), rest, classes)


def width_of(inputs: Inputs, num_rows: int, total: Gradients, memory: Tensor | None = None) -> int:
    """Classes of a block of all of so many rows: as large as a chunk (or a memory) together."""
    num_classes = inputs.num_classes
    if memory is None:
        trained = total.needed["weight"]
        rows = inputs.chunk_rows(num_rows, trained=trained, row_sum=False)
        most = rows * num_classes // max(1, num_rows)
    else:
        most = memory.numel() // num_rows
    return block_width(most, num_classes)
