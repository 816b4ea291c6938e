"""TRL's `SFTTrainer` with checkpoints that can be trusted, and what a run notes while it trains.

A checkpoint is the Trainer's own folder and a manifest.json with the size and SHA-256 of its files,
written last: a kill, a disk or a copy that damaged it since is seen. Reading it unpickles nothing
that `torch.load(weights_only=True)` refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from segloss.integrations.trl import SFTTrainer

from .data import say
from .errors import UserError, first_line
from .report import METRICS, WEIGHT_EDGES

MANIFEST, PREFIX = "manifest.json", "checkpoint-"
WRITING = (OSError, RuntimeError)


class Trainer(SFTTrainer):
    """`segloss.integrations.trl.SFTTrainer`; what cannot be written ends nothing.

    `failures` says what it was; the checkpoint before is kept.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.failures: list[str] = []
        super().__init__(*args, **kwargs)
        self.keep, self.args.save_total_limit = self.args.save_total_limit, None
        self.callback_handler.on_save = self._on_save
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._written = True

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
        self._written = self.attempt(
            self._folder().name, lambda: super(Trainer, self)._save_checkpoint(model, trial)
        )

    def _on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After the Trainer's files those of the callbacks, then the manifest, then old ones go."""
        handler, folder = self.callback_handler, self._folder()
        if self._written:
            self._written = self.attempt(
                folder.name, lambda: type(handler).on_save(handler, args, state, control, **kwargs)
            )
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if self._written and self.attempt(folder.name, lambda: seal(folder)):
                rotate_checkpoints(args.output_dir, self.keep, state.best_model_checkpoint)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return control

    def _folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"

    def attempt(self, name: str, write: Any) -> bool:
        """Call `write`; whether it could."""
        try:
            with warnings.catch_warnings():  # peft's, of an adapter on the head or a GGUF
                warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
                warnings.filterwarnings("ignore", message="Could not find a config file")
                write()
        except Exception as error:
            if not isinstance(error, WRITING) and type(error).__name__ != "SafetensorError":
                raise
            reason = getattr(error, "strerror", None) or first_line(error)
            self.failures.append(f"{name} ({reason})")
            return False
        return True


# --------------------------------------------------------------------------------- checkpoints


class Damaged(Exception):
    """The checkpoint is not what was written; the text says how that shows."""


def seal(folder: Path) -> None:
    """Write the manifest of a whole checkpoint, and have the disk hold all of it."""
    entries = {str(p.relative_to(folder)): entry(p) for p in files_of(folder)}
    partial = folder / f"partial-{MANIFEST}"
    partial.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(MANIFEST))


def entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check(folder: Path) -> None:
    """Raises `Damaged` unless every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, written in manifest.items():
            found = entry(folder / name)
            if found["bytes"] != written["bytes"]:
                raise Damaged(f"{name} has {found['bytes']} bytes of {written['bytes']}")
            if found != written:
                raise Damaged(f"{name} differs from what was written (SHA-256)")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None


def steps_of(output: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    names = [path.name.removeprefix(PREFIX) for path in output.glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def last_whole(output: Path, remove: bool) -> Path | None:
    """The newest whole checkpoint; damaged ones are named, and with `remove` make room."""
    for step in reversed(steps_of(output)):
        folder = output / f"{PREFIX}{step}"
        try:
            check(folder)
        except Damaged as damage:
            say(f"{folder} is damaged: {damage}; trying the one before")
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        say(f"resuming after step {step}")
        return folder
    say("there is no whole checkpoint: starting at the beginning")
    return None


# ------------------------------------------------------------------------- while a run trains


class Recorder(TrainerCallback):
    """Metrics on disk as soon as they exist, progress, Ctrl-C, the time limit, and NaN seen.

    Args:
        trainer: whose callback it is.
        tasks: their names, in the order of `task_ids`.
        deadline: when training must end, by `time.monotonic`.
        coba: the `CoBaCallback`, whose losses are noted.
        title: of the lines of progress; with it nothing is written to disk.
    """

    def __init__(
        self,
        trainer: Trainer,
        tasks: Sequence[str],
        deadline: float = math.inf,
        coba: Any = None,
        title: str = "",
    ):
        self.trainer, self.tasks, self.deadline, self.coba = trainer, tasks, deadline, coba
        self.title = title
        self.stopped = ""
        """What ended training before its last step: "time limit", "interrupt"."""
        self.counts = torch.zeros(len(WEIGHT_EDGES) + 1, dtype=torch.long)
        self.samples = 0
        self._pending = b""
        self._file: Any = None
        self._bar: Any = None
        self._begun = self._step_begun = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._begun = state.global_step, time.monotonic()
        for row in state.log_history:  # a resumed run goes on counting, all processes' on the first
            if "num_tokens" in row:
                self.trainer._num_tokens.fill_(row["num_tokens"] * state.is_world_process_zero)
        if state.is_world_process_zero:
            if not self.title:
                self._file = reopened(Path(args.output_dir) / METRICS, state.global_step)
            if sys.stderr.isatty() and not args.disable_tqdm:
                from tqdm.auto import tqdm

                self._bar = tqdm(total=state.max_steps, initial=self._first, dynamic_ncols=True)
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupted)
        except ValueError:  # not in the main thread
            self._previous = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
            if self._pending:
                self.trainer.failures.append(f"{METRICS} (no room for its last lines)")

    def _interrupted(self, number: int, frame: Any) -> None:
        if self.stopped == "interrupt":
            raise KeyboardInterrupt
        self.stopped = "interrupt"
        say("interrupted: saving after this step (again: stop at once)")

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_begun = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        weights = getattr(self.trainer.sample_weights, "weights", None)
        if weights is not None:
            relative = weights.detach().double().cpu() * len(weights)
            edges = torch.tensor(WEIGHT_EDGES, dtype=torch.float64)
            self.counts += torch.bucketize(relative, edges).bincount(minlength=len(self.counts))
            self.samples = len(weights)
        now = time.monotonic()
        if 2 * now - self._step_begun > self.deadline and not self.stopped:
            self.stopped = "time limit"
        if self._any(bool(self.stopped)) and state.global_step < state.max_steps:
            self.stopped = self.stopped or "interrupt"
            control.should_training_stop = True
            control.should_save = self.stopped == "interrupt" or args.save_strategy != "no"
        # what is summed for the next line of metrics is not in a checkpoint
        control.should_log = control.should_log or control.should_save
        if self._bar is not None:
            self._bar.update()

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process: they have to stop at the same step."""
        if self.trainer.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.trainer.args.device)
        return bool(self.trainer.accelerator.reduce(flags).item())

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"the training's {name} is {logs[name]} at step {state.global_step}; a lower "
                    f"--learning_rate may help; the steps before are in {args.output_dir}"
                )
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        if self._file is not None:
            self._write(self._row(logs, state))
        if "loss" in logs:
            self._progress(logs, state)

    def _row(self, logs: dict[str, Any], state: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"step": state.global_step}
        row |= {k: v for k, v in logs.items() if isinstance(v, int | float)}
        weights = [row.pop(k) for k in list(row) if re.fullmatch(r"task_weight_\d+", k)]
        if weights:
            row["task_weight"] = dict(zip(self.tasks, weights, strict=True))
            row["divergence_factor"] = float(self.coba.coba.divergence_factor)
            losses = self.coba.losses.tolist()
            row["validation_loss"] = dict(zip(self.tasks, losses, strict=True))
        if self.samples and "loss" in logs:
            row |= {"samples": self.samples, "sample_weight_counts": self.counts.tolist()}
            self.counts.zero_()
        return row

    def _write(self, row: dict[str, Any]) -> None:
        """Lines of a full disk wait in memory until there is room again."""
        self._pending += json.dumps(finite(row)).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError:
            pass

    def _progress(self, logs: dict[str, Any], state: Any) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}")
            return
        done = state.global_step - self._first
        each = (time.monotonic() - self._begun) / max(1, done)
        left = each * (state.max_steps - state.global_step)
        say(
            f"{self.title}step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}, "
            f"{each:.2f} s a step, {left // 60:.0f} min {left % 60:.0f} s left"
        )


def reopened(path: Path, step: int) -> Any:
    """metrics.jsonl without the lines after a step, to append to."""
    file = path.open("ab", buffering=0)
    kept = b""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and step:
                kept += line
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            break
    file.truncate(len(kept))
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Have a file to oneself. Raises `UserError` where another process has it."""
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"the run in {path.parent} is still going on in another process"
            ) from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass
        yield


def finite(value: Any) -> Any:
    """None for a number that JSON cannot spell, at any depth of dicts."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
