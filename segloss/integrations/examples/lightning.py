"""The same in Lightning: `python -m segloss.integrations.examples.lightning`.

Lightning's own accumulation averages the means of micro-batches, in which tokens of short ones
count more. Here one batch of the loader is all micro-batches of a step, divided by their tokens.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import segloss
from segloss.integrations.examples.pytorch import TinyModel, next_tokens, sequences


class LossModule(pl.LightningModule):
    """Trains `model` with a segloss loss, a step's rows in `accumulation` micro-batches."""

    def __init__(self, model: torch.nn.Module, criterion: Any, accumulation: int = 1):
        super().__init__()
        self.model, self.criterion, self.accumulation = model, criterion, accumulation
        self.automatic_optimization = False

    def training_step(self, batch, batch_index):
        tokens, target = batch
        num_tokens = (target != -100).sum()
        total = 0.0
        micro_batches = zip(
            tokens.chunk(self.accumulation), target.chunk(self.accumulation), strict=True
        )
        for part, part_target in micro_batches:
            loss = self.criterion(self.model(part), part_target, normalizer=num_tokens)
            self.manual_backward(loss)
            total += loss.detach()
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.log("loss", total, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(steps: int = 30, accumulation: int = 4) -> float:
    """The last step's loss."""
    torch.manual_seed(0)
    criterion = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.FocalLoss()
    module = LossModule(TinyModel(), criterion, accumulation)
    tokens, prompt = sequences(32)
    loader = DataLoader(TensorDataset(tokens, next_tokens(tokens, prompt)), batch_size=32)
    trainer = pl.Trainer(
        max_epochs=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer.callback_metrics["loss"].item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
