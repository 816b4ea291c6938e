"""TRL's `SFTTrainer` with checkpoints that can be trusted, and what a run notes while it trains.

A checkpoint is the Trainer's own folder and a manifest.json with the SHA-256 of its files, written
last: a kill, a disk or a copy that damaged it since is seen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate.utils import gather_object
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from segloss.integrations.trl import SFTTrainer
from segloss.models.head import replaced

from .data import say
from .errors import UserError, first_line
from .report import METRICS, json_lines, write

MANIFEST, PREFIX = "manifest.json", "checkpoint-"


class Trainer(SFTTrainer, TrainerCallback):
    """`segloss.integrations.trl.SFTTrainer`; what cannot be written ends nothing.

    `failures` says what it was, and why; the checkpoint before is kept. As a callback of its own it
    keeps metrics on disk as soon as they exist, tells progress, heeds Ctrl-C and the time limit,
    and ends with a loss that is not finite.
    """

    tasks: Sequence[str] = ()  # in the order of `task_ids`
    validation: Sequence[dict] = ()  # the tokenised rows
    coba: Any = None  # the `CoBaCallback`, whose losses are noted
    deadline = math.inf  # when training must end, by `time.monotonic`
    metrics: Path | None = None  # the file of what is logged
    title = ""  # of the lines of progress
    stopped = ""  # what ended training before its last step: "time limit", "interrupt"
    _whole = False  # whether the file has every line

    def __init__(self, *args: Any, **kwargs: Any):
        self.failures: dict[str, str] = {}
        super().__init__(*args, **kwargs)
        self.keep, self.args.save_total_limit = self.args.save_total_limit, None
        self.save_callbacks = self.callback_handler.on_save
        self.callback_handler.on_save = lambda args, state, control: control
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(self)  # the last one: it notes what the others have measured
        return super().train(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any) -> Any:
        """TRL ends a text with the end of text, but where the tokenizer does so of its own."""
        end = processing_class("x")["input_ids"][-1:] == [processing_class.eos_token_id]
        with replaced(self, "_tokenizer", SimpleNamespace(eos_token="")) if end else nullcontext():
            return super()._prepare_dataset(dataset, processing_class, *args)

    def _run_epoch(self, **kwargs: Any) -> None:
        """The Trainer would take a step after the last one's checkpoint as well."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's files, those of the callbacks, then the manifest; then old ones go."""
        args, state = self.args, self.state
        folder = Path(args.output_dir) / f"{PREFIX}{state.global_step}"

        def files() -> None:
            super(Trainer, self)._save_checkpoint(model, trial)
            self.save_callbacks(args, state, self.control)

        written = self.attempt(folder.name, files)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if written and self.attempt(folder.name, seal, folder):
                rotate_checkpoints(args.output_dir, self.keep, state.best_model_checkpoint)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def attempt(self, name: str, write: Callable, *arguments: Any) -> bool:
        """Call `write`; whether it could."""
        try:
            write(*arguments)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            self.failures[name] = f"{name} ({reason})"
            return False
        self.failures.pop(name, None)
        return True

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._begun = state.global_step, time.monotonic()
        for row in state.log_history:  # a resumed run goes on counting, all processes' on the first
            if "num_tokens" in row:
                self._num_tokens.fill_(row["num_tokens"] * state.is_world_process_zero)
        self._note(state.log_history)
        self._previous = signal.signal(signal.SIGINT, self._interrupted)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._previous)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self.stopped == "interrupt":
            raise KeyboardInterrupt
        self.stopped = "interrupt"
        say("interrupted: saving after this step (again: stop at once)")

    def on_step_end(self, args, state, control, **kwargs):
        now, last = time.monotonic(), state.global_step == state.max_steps
        self._each = (now - self._begun) / (state.global_step - self._first)
        if now + self._each > self.deadline and not last:
            self.stopped = self.stopped or "time limit"
        stopped = max(gather_object([self.stopped]))
        if stopped:  # where one process stops, all do, at the same step
            self.stopped, control.should_training_stop = stopped, True
            control.should_save = stopped == "interrupt" or args.save_strategy != "no"
        # what is summed for the next line of metrics is not in a checkpoint
        control.should_log = control.should_log or control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(
                    f"the training's {name} is {logs[name]} at step {state.global_step}; a lower "
                    f"--learning_rate may help; the steps before are in {args.output_dir}"
                )
        if "train_runtime" in logs:
            return
        row: dict[str, Any] = state.log_history[-1]  # which a checkpoint holds
        if "task_weight_0" in row:
            weights = [row.pop(f"task_weight_{i}") for i in range(len(self.tasks))]
            row["task_weight"] = dict(zip(self.tasks, weights, strict=True))
            row["validation_loss"] = dict(zip(self.tasks, self.coba.losses.tolist(), strict=True))
        self._note(state.log_history)
        if "loss" in logs:
            left = self._each * (state.max_steps - state.global_step)
            where = f"{self.title}step {state.global_step} of {state.max_steps}"
            rest = f"{left // 60:.0f} min {left % 60:.0f} s left"
            say(f"{where}: loss {logs['loss']:.3f}, {self._each:.2f} s a step, {rest}")

    def _note(self, rows: list[dict]) -> None:
        """Add the last line to the file; all of them, at first and after a full disk."""

        def add(log: Path) -> None:
            if not self._whole:
                return write(log, json_lines(rows))
            with log.open("a", encoding="utf-8") as file:
                file.write(json_lines(rows[-1:]))

        if self.metrics is not None:
            self._whole = self.attempt(METRICS, add, self.metrics)


def seal(folder: Path) -> None:
    """Have the disk hold all of a checkpoint, then write its manifest."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            hashes[str(path.relative_to(folder))] = sha_fileobj(file).hex()
    write(folder / MANIFEST, hashes)


def check(folder: Path) -> None:
    """Raises where a checkpoint is not as its manifest says."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest.items():
        with (folder / name).open("rb") as file:
            if sha_fileobj(file).hex() != digest:
                raise ValueError(f"{name} differs from what was written (SHA-256)")


def last_whole(output: Path, remove: bool) -> str | None:
    """The newest whole checkpoint; damaged ones are named, and with `remove` make room."""
    for folder in reversed(sort_checkpoints(str(output))):
        try:
            check(Path(folder))
        except (OSError, ValueError, AttributeError) as error:
            say(f"{folder} is damaged: {first_line(error)}; trying the one before")
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"resuming after step {folder.rpartition('-')[2]}")
            return folder
    say("there is no whole checkpoint: starting at the beginning")
    return None
