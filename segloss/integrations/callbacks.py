"""What a trainer's run depends on beside the model: saved with its checkpoints, told as it goes.

K tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from segloss.integrations.forward import has_head, loss_of, model_inputs
from segloss.integrations.labels import Shift
from segloss.integrations.window import IGNORE, Samples
from segloss.kernels.common import widest
from segloss.models.head import innermost
from segloss.sources import logit_statistics
from segloss.weighting import CoBa


class SavedState(TrainerCallback):
    """Keeps what a run depends on beside its checkpoints and reads it when one is resumed.

    From the folder that `LossMixin.train` is given, or the checkpoint in the output folder.
    """

    resumed_from: str | None = None

    def __init__(self, name: str, stateful: Any):
        self.name = name
        self.stateful = stateful

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self._read(args, state)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            self._write(args, state)

    def _read(self, args, state) -> None:
        path = self._path(args, state)
        if self.resumed_from is not None:
            path = os.path.join(self.resumed_from, f"{self.name}.pt")
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint is of a run without {self.name}, or lies in "
                "another folder; give LossMixin.train the folder, or begin from its model alone"
            )
        device = "cpu" if args.device.type == "cpu" else args.device  # torch.load knows no cpu:0
        self.stateful.load_state_dict(torch.load(path, map_location=device))

    def _write(self, args, state) -> None:
        torch.save(self.stateful.state_dict(), self._path(args, state))

    def _path(self, args, state) -> str:
        folder = f"checkpoint-{state.global_step}"
        return os.path.join(args.output_dir, folder, f"{self.name}.pt")


class CoBaCallback(SavedState):
    """Measures the tasks' validation losses and tells them to CoBa: all of them before training,
    then one batch after each step.

    CoBa's state is saved with checkpoints, as coba.pt, and read when training resumes from one.

    Args:
        coba: as given to the trainer as `task_weights`. On several processes, with `group=` each
            measures a part of the batches, and without it each measures all of them; a model that
            is sharded (FSDP, ZeRO-3) needs as many batches on every process.
        batches: with input_ids, labels and task_ids, such as a DataLoader that shuffles the tasks'
            validation items; kept in memory and taken in turn.
        every: steps between two updates.
        head, shift: as of `LossMixin`.

    `losses` (K,) are those that CoBa was told last, NaN for a task without tokens.
    """

    losses: Tensor

    def __init__(
        self,
        coba: CoBa,
        batches: Iterable[Mapping[str, Tensor]],
        every: int = 1,
        *,
        head: str = "fused",
        shift: bool | None = None,
    ):
        super().__init__("coba", coba)
        self.coba = coba
        self.batches = [dict(batch) for batch in batches]
        self.every = every
        self.head = head
        self.shift = Shift(shift)
        if not self.batches:
            raise ValueError("batches is empty; it takes at least one batch of validation items")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        if self.coba.step is None:
            self._update(args, model, self._own(args), step=0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        batches = self._own(args)
        number = state.global_step // self.every - 1
        self._update(args, model, [batches[number % len(batches)]], step=state.global_step)

    def _own(self, args) -> list[dict]:
        if self.coba.group is None:
            return self.batches
        if len(self.batches) < args.world_size:
            raise ValueError(
                f"batches has {len(self.batches)} batches; it takes at least one for each of the "
                f"{args.world_size} processes"
            )
        return self.batches[args.process_index :: args.world_size]

    def _update(self, args, model, batches: list[dict], step: int) -> None:
        log_prob = partial(self._log_prob, args, model)
        was_training = model.training
        model.eval()
        self.losses, counts = task_losses(
            log_prob, partial(self._samples, model), batches, self.coba.num_tasks, args.device
        )
        model.train(was_training)
        self.coba.update(self.losses, step=step, counts=counts)

    def _samples(self, model, batch: Mapping[str, Any]) -> Samples:
        return Samples.of(batch, self.shift.of(innermost(model), batch, lambda b: model(**b)))

    def _log_prob(self, args, model, batch: Mapping[str, Any], target: Tensor) -> Tensor:
        """(B, T) log-probabilities of the targets."""
        inner = innermost(model)
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            fused = self.head == "fused" and has_head(inner)
            inputs = model_inputs(inner, batch)
            return loss_of(model, logit_statistics, target, inputs, fused)[0].log_prob


@torch.no_grad()
def task_losses(
    log_prob: Callable, samples_of: Callable, batches: Iterable[Mapping], num_tasks: int, device
) -> tuple[Tensor, Tensor]:
    """(cross-entropy per token of each task (K,), NaN without tokens; tokens (K,))."""
    totals = torch.zeros(2, num_tasks, dtype=widest(torch.device(device)), device=device)
    for batch in batches:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        samples = samples_of(batch)
        if samples.task is None:
            raise ValueError(f"a batch has the columns {', '.join(batch)}; CoBa needs task_ids")
        if samples.task.numel() and int(samples.task.max()) >= num_tasks:
            raise ValueError(
                f"task_ids has {int(samples.task.max())}; with num_tasks={num_tasks} it takes "
                f"0 to {num_tasks - 1}"
            )
        values = log_prob(batch, samples.target.masked_fill(~samples.valid, IGNORE))
        sums = totals.new_zeros(2, samples.num_samples)
        index = samples.index.reshape(-1)
        sums[0].index_add_(0, index, -values.reshape(-1).to(sums.dtype))
        sums[1] = samples.num_tokens(weighed=False)
        totals.index_add_(1, samples.task.to(torch.int64), sums)
    return totals[0] / totals[1], totals[1]
