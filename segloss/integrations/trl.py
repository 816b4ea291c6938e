"""TRL's `SFTTrainer` with a segloss loss.

B sequences of T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import trl
from torch import Tensor
from trl.trainer import sft_trainer

from segloss.integrations.transformers import LossMixin
from segloss.integrations.window import LOSS_COLUMNS
from segloss.losses import DFTLoss, Loss

__all__ = ["SFTTrainer"]


class SFTTrainer(LossMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` with any loss, without logits, and with LoRA on the head too::

        from segloss.integrations.trl import SFTTrainer

        SFTTrainer(model, args=SFTConfig(...), train_dataset=..., loss=FocalLoss())

    Takes what `trl.SFTTrainer` takes and what `LossMixin` adds, whose columns are kept through
    TRL's collators (but not through `packing`, which drops every column). Without `loss` it is the
    config's `loss_type`, "nll" or "dft".

    Logs what TRL logs: num_tokens, and mean_token_accuracy and entropy, here over all tokens since
    the last line, where TRL averages over micro-batches.
    """

    data_collator: Any

    def __init__(self, *args: Any, loss: Loss | None = None, **kwargs: Any):
        with head_adapters_accepted():
            super().__init__(*args, loss=loss, **kwargs)
        if self.args.loss_type == "dft":
            if loss is not None:
                raise ValueError("loss_type is 'dft' and loss is given; it takes one of the two")
            self.loss = DFTLoss()
        self.data_collator = KeepColumns(self.data_collator)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            mask = inputs.get("attention_mask")
            self._num_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            tokens = self.accelerator.reduce(self._num_tokens).item()
            logs["num_tokens"] = tokens // self.get_tp_size()
        super().log(logs, start_time)


@contextlib.contextmanager
def head_adapters_accepted() -> Iterator[None]:
    """TRL refuses an adapter on the head, which its own loss would bypass; ours does not."""
    refused = getattr(sft_trainer, "BaseTunerLayer", None)
    try:
        sft_trainer.BaseTunerLayer = ()  # isinstance(..., ()) is False
        yield
    finally:
        sft_trainer.BaseTunerLayer = refused


class KeepColumns:
    """A collator that knows only its own columns, and beside it those that the loss reads."""

    def __init__(self, collator: Callable[[list], dict]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in LOSS_COLUMNS if name in examples[0]]
        batch = self.collator(
            [{k: v for k, v in example.items() if k not in names} for example in examples]
        )
        lengths = [len(example["input_ids"]) for example in examples]
        for name in names:
            values = [torch.as_tensor(example[name]) for example in examples]
            batch[name] = collated(values, lengths, batch["input_ids"].shape)
        return batch


def collated(values: list[Tensor], lengths: list[int], shape: torch.Size) -> Tensor:
    """One column: per row (B,), per token (B, T) with 0 on the right, or rows joined to (1, T)."""
    joined = shape[0] != len(values)
    if values[0].dim() == 0 and not joined:
        return torch.stack(values)
    rows = [value.expand(length) for value, length in zip(values, lengths, strict=True)]
    if joined:
        rows = [torch.cat(rows)]
    return torch.stack([F.pad(row, (0, shape[1] - len(row))) for row in rows])
