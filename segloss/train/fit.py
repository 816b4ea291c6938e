"""What a run does beside training: metrics, checkpoints, early stopping, the time limit."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from . import checkpoint
from .board import Board
from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import UserError
from .run_folder import BEST, METRICS, RESUME, RunFolder
from .trainer import Trainer

if TYPE_CHECKING:
    from .run import Clock, Run


@dataclass(eq=False)
class Fit(TrainerCallback):
    """Trains a run's model and leaves it with the weights that the run ends with."""

    run: Run
    folder: RunFolder
    clock: Clock
    deadline: float
    """When training must end, by `time.monotonic`."""
    losses: list[float] = field(default_factory=list)
    """Of each step."""
    stopped: str = ""
    """What ended training before its last step: "time limit", "patience"."""
    kept_step: int = 0
    """The step whose weights the run ends with, once it is trained."""

    def __post_init__(self) -> None:
        run = self.run
        self.trainer = Trainer(
            *(run.model, run.tasks, run.loss, run.config, run.tokenizer.pad_token_id, run.dtype),
            evaluator=run.evaluator,
            callbacks=[self],
        )

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def num_steps(self) -> int:
        return self.trainer.state.global_step

    @property
    def best_step(self) -> int:
        """The step of the lowest validation loss, 0 without one."""
        return self.trainer.state.best_global_step or 0

    def train(self, found: Checkpoint | None) -> None:
        """From the beginning, or on from a checkpoint."""
        first = found.state["step"] if found else 0
        with (
            Board.open(self.folder.path, self.config.tensorboard, first) as self.board,
            tqdm(
                total=self.config.steps, initial=first, desc="training", dynamic_ncols=True
            ) as self.bar,
        ):
            if found is None:
                self.trainer.train()
            else:
                self.stopped = found.state["stopped"]
                self.trainer.resume(found, bool(self.stopped) or first == self.config.steps)
        self.kept_step = self._restore_best()

    # ---------------------------------------------------------------------- called by the trainer

    def on_step_end(self, args, state, control, **kwargs):
        every = self.config.validate_every or 1
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        control.should_evaluate = bool(self.config.patience) and due

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._log("step", logs)
        self.losses.append(logs["loss"])
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        self.bar.update()
        self._require_finite(logs)
        if not control.should_evaluate:
            self._keep_time(control)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Keep the weights of the lowest validation loss, and count those after it."""
        step, loss = state.global_step, metrics["mean_validation_loss"]
        self._log("validation", {"step": step, **metrics})
        lowest = loss < (math.inf if state.best_metric is None else state.best_metric)
        if lowest and self._write(BEST, self.trainer.weights(), {"step": step}):
            state.best_metric, state.best_global_step = loss, step
            self._prune_best()
        every = self.config.validate_every or 1
        if step // every - self.best_step // every >= self.config.patience:
            self._stop("patience", control)
        else:
            self._keep_time(control)

    def on_save(self, args, state, control, **kwargs):
        """Write a checkpoint; the oldest ones go."""
        size = self.folder.metrics_size()
        if size is None:  # the disk is full; a checkpoint needs the lines before it
            return
        numbers = self.trainer.numbers() | {
            "metrics_bytes": size,
            "timing": {name: self.clock.seconds[name] for name in ("load", "evaluate_before")},
            "stopped": self.stopped,
            "best_step": self.best_step,
        }
        self._write(RESUME, self.trainer.tensors(), numbers)
        kept = checkpoint.steps(self.folder.path / RESUME)[-self.config.keep :]
        checkpoint.prune(self.folder.path / RESUME, kept)
        self._prune_best()

    # ------------------------------------------------------------------------------------ details

    def _log(self, event: str, row: dict[str, Any]) -> None:
        self.folder.log(event, **row)
        self.board.add(row, row["step"])

    def _require_finite(self, row: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise UserError(
                    f"the training's {name} is {row[name]} at step {row['step']}; a lower --lr may "
                    f"help; the steps before are in {self.folder.path}/{METRICS}"
                )

    def _keep_time(self, control) -> None:
        now = time.monotonic()
        if self.num_steps < self.config.steps and 2 * now - self.trainer.begun > self.deadline:
            self._stop("time limit", control)

    def _stop(self, reason: str, control) -> None:
        self.stopped, control.should_training_stop = reason, True
        control.should_save = self.config.save_every > 0

    def _prune_best(self) -> None:
        """Keep the best weights so far, and those that were it at a checkpoint."""
        states = self.folder.path / RESUME
        kept = {self.best_step}
        for step in checkpoint.steps(states):
            kept.add(checkpoint.peek(states, step).get("best_step", 0))
        checkpoint.prune(self.folder.path / BEST, kept)

    def _write(self, name: str, tensors: dict, numbers: dict) -> bool:
        """Whether it could be written."""
        folder, step = self.folder.path / name, self.num_steps
        trainer = asdict(self.trainer.state)
        save = partial(checkpoint.write, folder, step, tensors, numbers, trainer)
        return self.folder.attempt(name, save)

    def _restore_best(self) -> int:
        """End with the weights of the lowest validation loss; the step that they are of."""
        if self.best_step in (0, self.num_steps):  # 0: stopped before the first
            return self.num_steps
        try:
            best = checkpoint.read(self.folder.path / BEST, self.best_step)
        except checkpoint.Damaged as damage:
            self.folder.failures.append(f"the weights of step {self.best_step} ({damage})")
            return self.num_steps
        self.trainer.load_weights(best)
        return self.best_step
