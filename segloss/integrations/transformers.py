"""Segloss losses in transformers: for `Trainer`, for any trainer, for a loop of your own.

class LossTrainer(LossMixin, Trainer): ...                     # without logits
fuse_loss(model, loss)                                         # model(..., labels=...).loss
loss, outputs = head_loss(model, loss, target, input_ids=...)  # a loop of your own
Trainer(..., compute_loss_func=compute_loss_func(loss))        # from the model's logits
set_loss_function(model, loss)                                 # the same, under any trainer
"""

from segloss.integrations.callbacks import CoBaCallback, SavedState
from segloss.integrations.fuse import compute_loss_func, fuse_loss, set_loss_function
from segloss.integrations.trainer import LossMixin
from segloss.integrations.window import next_tokens
from segloss.models.head import head_logits, head_loss, head_outputs, unwrapped

__all__ = [
    "CoBaCallback",
    "LossMixin",
    "SavedState",
    "compute_loss_func",
    "fuse_loss",
    "head_logits",
    "head_loss",
    "head_outputs",
    "next_tokens",
    "set_loss_function",
    "unwrapped",
]
