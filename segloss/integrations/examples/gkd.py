"""TRL's experimental `GKDTrainer` (Agarwal et al., arXiv 2306.13649), its loss without logits.

TRL's own makes the logits of student and teacher, and several matrices of their size on the way:

    python -c "from segloss.integrations.examples.gkd import GKDTrainer"

Use it as TRL's: `GKDTrainer(model, teacher_model=teacher, args=GKDConfig(beta=0.5), ...)`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl.experimental import gkd

import segloss
from segloss.integrations.window import next_tokens
from segloss.models.head import head_loss


class GKDTrainer(gkd.GKDTrainer):
    """The same values and gradients; `beta` 0 and 1 are forward and reverse KL in both."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        loss = segloss.DistillationLoss("jsd", beta=self.beta)

        def criterion(student, target, teacher):
            return loss(student, target, teacher=teacher, normalizer=num_items_in_batch)

        value, outputs = head_loss(
            model,
            criterion,
            next_tokens(inputs["labels"]),
            teacher=self.teacher_model.eval(),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
        )
        return (value, outputs) if return_outputs else value
