"""TRL's `SFTTrainer` with checkpoints that can be trusted, and what a run notes while it trains.

A checkpoint is the Trainer's own folder and a manifest.json with the SHA-256 of its files, written
last: a kill, a disk or a copy that damaged it since is seen.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from segloss.integrations.trl import SFTTrainer

from .data import say
from .errors import UserError, first_line
from .report import METRICS, json_lines, write

MANIFEST, PREFIX = "manifest.json", "checkpoint-"


class Trainer(SFTTrainer):
    """`segloss.integrations.trl.SFTTrainer`; what cannot be written ends nothing.

    `failures` says what it was; the checkpoint before is kept.
    """

    validation: Sequence[dict] = ()  # the tokenised rows
    coba: Any = None  # the `CoBaCallback`, whose losses are noted

    def __init__(self, *args: Any, **kwargs: Any):
        self.failures: list[str] = []
        super().__init__(*args, **kwargs)
        self.keep, self.args.save_total_limit = self.args.save_total_limit, None
        self.save_callbacks = self.callback_handler.on_save
        self.callback_handler.on_save = lambda args, state, control: control
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any) -> Any:
        """TRL ends a text with the end of text, and some tokenizers do so again."""
        prepared = super()._prepare_dataset(dataset, processing_class, *args)
        end = processing_class.eos_token_id
        if processing_class("x")["input_ids"][-1:] != [end]:
            return prepared

        def once(row: dict[str, Any]) -> dict[str, Any]:
            twice = row["input_ids"][-2:] == [end, end]
            return {k: row[k][:-1] if twice else row[k] for k in ("input_ids", "labels")}

        return prepared.map(once)

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
            if written and self.attempt(folder.name, lambda: seal(folder)):
                rotate_checkpoints(args.output_dir, self.keep, state.best_model_checkpoint)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def attempt(self, name: str, write: Callable[[], Any]) -> bool:
        """Call `write`; whether it could."""
        try:
            with warnings.catch_warnings():  # peft's, of an adapter on the head or a GGUF
                warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
                warnings.filterwarnings("ignore", message="Could not find a config file")
                write()
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            self.failures.append(f"{name} ({reason})")
            return False
        return True


def seal(folder: Path) -> None:
    """Have the disk hold all of a checkpoint, then write its manifest."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            hashes[str(path.relative_to(folder))] = sha_fileobj(file).hex()
    write(folder / MANIFEST, hashes)


def damage(folder: Path) -> str:
    """How a checkpoint is not as its manifest says, "" where it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            with (folder / name).open("rb") as file:
                if sha_fileobj(file).hex() != digest:
                    return f"{name} differs from what was written (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({first_line(error)})"
    return ""


def last_whole(output: Path, remove: bool) -> Path | None:
    """The newest whole checkpoint; damaged ones are named, and with `remove` make room."""
    for folder in map(Path, reversed(sort_checkpoints(str(output)))):
        found = damage(folder)
        if not found:
            say(f"resuming after step {folder.name.removeprefix(PREFIX)}")
            return folder
        say(f"{folder} is damaged: {found}; trying the one before")
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
    say("there is no whole checkpoint: starting at the beginning")
    return None


@dataclass(eq=False)
class Recorder(TrainerCallback):
    """Metrics on disk as soon as they exist, progress, Ctrl-C, the time limit, and NaN seen."""

    trainer: Trainer
    tasks: Sequence[str]  # in the order of `task_ids`
    deadline: float = math.inf  # when training must end, by `time.monotonic`
    log: Path | None = None  # the file of the metrics
    title: str = ""  # of the lines of progress
    stopped: str = ""  # what ended training before its last step: "time limit", "interrupt"
    _whole: bool = False  # whether that file has every line

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._begun = state.global_step, time.monotonic()
        for row in state.log_history:  # a resumed run goes on counting, all processes' on the first
            if "num_tokens" in row:
                self.trainer._num_tokens.fill_(row["num_tokens"] * state.is_world_process_zero)
        self._note(state.log_history)
        self._previous = signal.signal(signal.SIGINT, self._interrupted)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._previous)
        if self.log is not None and not self._whole:
            self.trainer.failures.append(f"{METRICS} (no room for its last lines)")

    def _interrupted(self, number: int, frame: Any) -> None:
        if self.stopped == "interrupt":
            raise KeyboardInterrupt
        self.stopped = "interrupt"
        say("interrupted: saving after this step (again: stop at once)")

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self._each = (now - self._begun) / (state.global_step - self._first)
        if now + self._each > self.deadline and not self.stopped:
            self.stopped = "time limit"
        # where one process stops, all do, at the same step
        if any(gather_object([bool(self.stopped)])) and state.global_step < state.max_steps:
            self.stopped = self.stopped or "interrupt"
            control.should_training_stop = True
            control.should_save = self.stopped == "interrupt" or args.save_strategy != "no"
        # what is summed for the next line of metrics is not in a checkpoint
        control.should_log = control.should_log or control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(
                    f"the training's {name} is {logs[name]} at step {state.global_step}; a lower "
                    f"--learning_rate may help; the steps before are in {args.output_dir}"
                )
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        logged: dict[str, Any] = state.log_history[-1]
        row: dict[str, Any] = {k: v for k, v in logged.items() if isinstance(v, int | float)}
        if "task_weight_0" in row:
            weights = [row.pop(f"task_weight_{i}") for i in range(len(self.tasks))]
            row["task_weight"] = dict(zip(self.tasks, weights, strict=True))
            losses = self.trainer.coba.losses.tolist()
            row["validation_loss"] = dict(zip(self.tasks, losses, strict=True))
        state.log_history[-1] = row  # which a checkpoint holds
        self._note(state.log_history)
        if "loss" in logs:
            left = self._each * (state.max_steps - state.global_step)
            where = f"{self.title}step {state.global_step} of {state.max_steps}"
            rest = f"{left // 60:.0f} min {left % 60:.0f} s left"
            say(f"{where}: loss {logs['loss']:.3f}, {self._each:.2f} s a step, {rest}")

    def _note(self, rows: list[dict]) -> None:
        """Add the last line to the file; all of them, at first and after a full disk."""
        if self.log is None:
            return
        whole, self._whole = self._whole, False
        with contextlib.suppress(OSError):
            if whole:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json_lines(rows[-1:]))
            else:
                write(self.log, json_lines(rows))
            self._whole = True
