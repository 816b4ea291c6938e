"""transformers' `Trainer` with a segloss loss, and what a run listens to while it trains."""

from __future__ import annotations

import contextlib
import math
import time

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from segloss.integrations.transformers import head_logits

from .data import next_tokens
from .errors import UserError
from .run_folder import RunFolder


class LossTrainer(Trainer):
    """`Trainer` whose `compute_loss` is a segloss loss on the next tokens.

    Every micro-batch is normalised by the tokens of the whole accumulated batch. For a token loss
    the accumulated gradient is then exactly that of one large batch. A region or ranking loss is a
    value of a set of tokens and does not add up: each micro-batch counts with its share of the
    tokens, and the sum is their token-weighted mean (with `accumulation=1`, the loss itself).

    With `head="fused"` the model's forward ends in hidden states and its logits are never made;
    `head="logits"` gives the loss the model's own.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args,
        loss: torch.nn.Module,
        autocast: torch.dtype | None = None,
        head: str = "fused",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.autocast = autocast
        self.head = head
        # the Trainer counts the tokens of a batch only for models said to use the count
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target = next_tokens(inputs["labels"])
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        outputs = None
        with autocast(self.args.device, self.autocast):
            if self.head == "fused" and not return_outputs:
                logits = head_logits(model, **batch, use_cache=False)
            else:
                outputs = model(**batch, use_cache=False)
                logits = outputs.logits
        loss = self.loss(logits, target, normalizer=num_items_in_batch)
        if num_items_in_batch is not None:
            # processes average their gradients, but the normaliser spans all of them
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def autocast(device: torch.device, dtype: torch.dtype | None):
    """The forward pass in `dtype`. Accelerate's own wrapper would copy the logits to float32."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class MetricsLog(TrainerCallback):
    """One line of metrics.jsonl per step; a loss that is not a number ends the run."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        seconds = round(time.monotonic() - self.start, 3)
        values = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        self.folder.log("step", step=state.global_step, seconds=seconds, **values)
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the training loss is {logs['loss']} at step {state.global_step}; "
                f"a lower --lr may help; the steps before are in {self.folder.path}/metrics.jsonl"
            )


class TimeLimit(TrainerCallback):
    """Stops training where one more step would pass the deadline (a `time.monotonic()`)."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.begun = 0.0
        self.reached = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if now + (now - self.begun) > self.deadline and state.global_step < state.max_steps:
            self.reached = True
            control.should_training_stop = True


class Progress(ProgressCallback):
    """The Trainer's progress bar, with the loss on it instead of a line per step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
